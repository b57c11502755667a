"""What an evaluation asks: which examples, which choices, which tokens are scored."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from jaxmoo.config.data_section import DataConfig
from jaxmoo.data import Example, load_examples
from jaxmoo.errors import CheckpointError, ConfigError, DataError
from jaxmoo.evaluate.measures import score
from jaxmoo.evaluate.nll import likelihoods
from jaxmoo.evaluate.questions import (
    check_references,
    choose_some,
    digest,
    prepare_questions,
    with_choices,
)
from jaxmoo.hf import check_tokenizer


def pairs(language, *replies, group=False):
    return [
        Example.from_pair(language, f"{language} {i}", reply, group=str(i) if group else None)
        for i, reply in enumerate(replies)
    ]


def test_bits_per_byte_count_utf8(tokenizer):
    """By hand: はい is 6 bytes of UTF-8, 6 tokens here, and with the end of turn 7 are scored."""
    asked = prepare_questions(pairs("ja", "はい"), tokenizer, max_length=64)
    bits = {"tokens": 7, "bytes": 6}
    assert asked.replies[0].loss_mask.sum() == bits["tokens"]
    assert asked.replies[0].reply_bytes == bits["bytes"]
    columns = likelihoods(
        lambda batch: np.full(batch["tokens"].shape, math.log(2)), {"": asked.replies}, batch_size=2
    )[""]._asdict()
    assert (columns["tokens"], columns["bytes"]) == ([7], [6])
    assert score(columns, "bits_per_byte") == pytest.approx(7 / 6)
    assert score(columns, "nll") == pytest.approx(math.log(2))


def test_a_choice_is_scored_with_the_white_space_before_it_and_without_its_end(tokenizer):
    examples = with_choices({"en": pairs("en", "yes", "no")}, "yes,no")["en"]
    asked = prepare_questions(examples, tokenizer, max_length=64)
    for some in asked.choices:
        texts = [tokenizer.decode(one.tokens[one.loss_mask]) for one in some]
        assert texts == ["\nyes", "\nno"]
        before = tokenizer.decode(some[0].tokens[~some[0].loss_mask])
        assert before.endswith("<|im_start|>assistant")


def test_prompts_end_where_a_reply_begins(tokenizer):
    asked = prepare_questions(pairs("en", "yes"), tokenizer, max_length=64, new_tokens=3)
    assert tokenizer.decode(asked.prompts[0]).endswith("en 0<|im_end|>\n<|im_start|>assistant\n")
    assert asked.rows == 2


def test_labels_come_from_the_data_the_command_line_or_each_record():
    data = {"en": pairs("en", "no", "yes"), "fa": pairs("fa", "yes", "no", "no")}
    for found in with_choices(data, "replies").values():
        assert {e.choices for e in found} == {("no", "yes")}
    for found in with_choices(data, "maybe, no,yes").values():
        assert {e.choices for e in found} == {("maybe", "no", "yes")}
    own = {"en": [dataclasses.replace(data["en"][0], choices=("no", "never"))]}
    assert with_choices(own, "column:options") == own


def test_a_column_may_hold_each_records_choices(tmp_path):
    record = {"prompt": "1 + 1", "completion": "2", "options": ["1", "2", " 3 "]}
    (tmp_path / "en.jsonl").write_text(json.dumps(record))
    source = str(tmp_path / "{language}.jsonl")
    data = DataConfig(source=source, seen=["en"])
    (found,) = load_examples(data, ["en"], choices="options")["en"]
    assert (found.reply, found.choices) == ("2", ("1", "2", " 3 "))
    (tmp_path / "en.jsonl").write_text(json.dumps(record | {"options": "1, 2"}))
    with pytest.raises(DataError, match=r"en.jsonl:1: expected a list of choices, found str"):
        load_examples(data, ["en"], choices="options")


@pytest.mark.parametrize(
    ("data", "what", "complaint"),
    [
        (
            {"en": pairs("en", "yes", "no"), "fa": pairs("fa", "yes", "نه")},
            "replies",
            r"'en' and 'fa' do not have the same labels \(only fa: \['نه'\]; only en: \['no'\]\)",
        ),
        ({"en": pairs("en", "yes", "yes")}, "replies", "nothing to choose"),
        ({"en": pairs("en", "yes")}, "no,never", "the reply 'yes' is none of its choices"),
        ({"en": pairs("en", "yes ")}, "yes,no", "differ in white space at their ends"),
        ({"en": pairs("en", "no", "yes", "yes ")}, "replies", "differ in nothing but white space"),
        ({"en": pairs("en", "yes")}, "column:x", "at least two different choices, found"),
        ({"en": pairs("en", "yes")}, "yes,yes", "at least two different labels"),
    ],
)
def test_labels_that_do_not_fit_are_named(data, what, complaint):
    with pytest.raises((ConfigError, DataError), match=complaint):
        with_choices(data, what)


def test_empty_references_are_counted_per_language():
    data = {"en": pairs("en", "a", "b"), "fa": pairs("fa", "", "b", "")}
    with pytest.raises(DataError, match=r"empty reply.*\(fa: 2 of 3\).*--skip-empty"):
        check_references(data)


def test_what_cannot_be_scored_is_an_error_or_left_out(tokenizer):
    examples = pairs("en", "yes", "", "no")
    with pytest.raises(DataError, match="1 of 3 examples have no reply within 64 tokens"):
        prepare_questions(examples, tokenizer, max_length=64)
    asked = prepare_questions(examples, tokenizer, max_length=64, drop_unusable=True)
    assert [e.reply for e in asked.examples] == ["yes", "no"] and len(asked.replies) == 2
    with pytest.raises(DataError, match="2 of 6 prompts with their choices exceed 30 tokens"):
        labelled = with_choices({"en": pairs("en", "a", "b")}, "a,b, a long choice")["en"]
        prepare_questions(labelled, tokenizer, max_length=30)


def test_what_a_template_cannot_render_is_left_out_as_in_training(tokenizer):
    options = {"max_length": 64, "max_malformed": 0.4}
    examples = pairs("en", "yes", "no", "no")
    template = "{% if messages[0].content == 'en 1' %}{{ 1 / 0 }}{% endif %}"
    tokenizer.chat_template, before = template + tokenizer.chat_template, tokenizer.chat_template
    try:
        asked = prepare_questions(examples, tokenizer, **options)
        assert asked.examples == [examples[0], examples[2]] and len(asked.replies) == 2
        with pytest.raises(DataError, match=r"ZeroDivisionError.*\n.*1 of the 3 records"):
            prepare_questions(examples, tokenizer, **(options | {"max_malformed": 0.3}))
    finally:
        tokenizer.chat_template = before


def test_of_parallel_examples_the_same_are_chosen():
    data = {code: pairs(code, *"abcdefgh", group=True) for code in ("en", "fa")}
    chosen = {code: [e.group for e in choose_some(part, 3)] for code, part in data.items()}
    assert chosen["en"] == chosen["fa"] and len(chosen["en"]) == 3
    assert choose_some(list(reversed(data["en"])), 3)[::-1] == choose_some(data["en"], 3)
    assert choose_some(data["en"], 99) == data["en"]


def test_the_digest_is_of_what_is_asked():
    data = pairs("en", "a", "b")
    assert digest(data) == digest(pairs("en", "a", "b", group=True))
    others = [pairs("en", "a"), pairs("en", "a", "c"), with_choices({"": data}, "a,b")[""]]
    assert len({digest(one) for one in (data, *others)}) == 4


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tokenizer, tmp_path):
    check_tokenizer(tokenizer, 259, tmp_path)
    with pytest.raises(CheckpointError, match=r"tokens up to number 258.*vocab_size=258"):
        check_tokenizer(tokenizer, 258, tmp_path)
