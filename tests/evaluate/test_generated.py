"""Scores of generated text."""

from __future__ import annotations

import json

import pytest
import sacrebleu

from jaxmoo.errors import CheckpointError
from jaxmoo.evaluate.generated import score_generated, stop_tokens
from small_runs import CHATML
from tiny_tokenizer import bytes_tokenizer

REPLIES = ["The cat sat.", "昨日は雨が降った", "", "नमस्ते दुनिया", "cafe\u0301  noir"]
REFERENCES = ["A cat sat down.", "昨日、雨が降った", "nothing", "नमस्ते दुनिया", "café noir"]


def test_chrf_is_that_of_sacrebleu():
    scores = score_generated(REPLIES, REFERENCES)
    expected = [
        sacrebleu.sentence_chrf(reply, [reference]).score
        for reply, reference in zip(REPLIES, REFERENCES, strict=True)
    ]
    assert scores.chrf == expected
    assert scores.corpus_chrf == sacrebleu.corpus_chrf(REPLIES, [REFERENCES]).score


def test_exact_match_ignores_normal_form_and_white_space_alone():
    assert score_generated(REPLIES, REFERENCES).exact == [0, 0, 0, 1, 1]
    assert score_generated(["Yes"], ["yes"]).exact == [0]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (2,)),
        ({"config.json": {"eos_token_id": 7}}, (2, 7)),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {}}, (2, 7)),
        (
            {
                "config.json": {"eos_token_id": 7},
                "generation_config.json": {"eos_token_id": [5, 2]},
            },
            (2, 5),
        ),
    ],
)
def test_replies_stop_where_transformers_would(files, expected, tokenizer, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert stop_tokens(tmp_path, tokenizer) == expected


def test_replies_stop_where_they_ended_in_training(tmp_path):
    """As a base model does not, which ends its texts with another token."""
    tokenizer = bytes_tokenizer(
        ["<|end_of_text|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|end_of_text|>",
        chat_template=CHATML,
    )
    assert stop_tokens(tmp_path, tokenizer) == (0, 2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5]}')
    assert stop_tokens(tmp_path, tokenizer) == (0, 2, 5)


@pytest.mark.parametrize("content", ['{"eos_token_id": "</s>"}', '{"eos_token_id": [1.0]}', "{"])
def test_a_damaged_generation_config_is_named(content, tokenizer, tmp_path):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        stop_tokens(tmp_path, tokenizer)
