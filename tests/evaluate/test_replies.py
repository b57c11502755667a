"""``jaxmoo generate``: replies as transformers generates them, whatever batch a prompt is in."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from jaxmoo.commands.generate import main
from jaxmoo.errors import CheckpointError
from jaxmoo.hf.generation import sampling_of
from jaxmoo.models.sampling import Sampling

PROMPTS = [
    {"prompt": "A fast horse"},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "速い馬"},
        ]
    },
    {"prompt": "Hi <|im_end|>", "stop": ["a", "b", "c", "d", "e", 100, 101, 102, 103, 104, 105]},
    {
        "messages": [
            {"role": "user", "content": "1?"},
            {"role": "assistant", "content": "2!"},
            {"role": "user", "content": "3?"},
        ]
    },
]
NEW = 24


@pytest.fixture(scope="module")
def model(chat_model, tmp_path_factory):
    """The chat model, whose makers draw tokens and end texts with some of the bytes."""
    path = shutil.copytree(chat_model, tmp_path_factory.mktemp("replies") / "model")
    config = {
        "eos_token_id": [2, 40, 41, 42, 43],
        "do_sample": True,
        "temperature": 1.2,
        "top_k": 30,
    }
    (path / "generation_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def replies(model, tmp_path_factory):
    """A function: the replies to all prompts, by more arguments."""
    directory = tmp_path_factory.mktemp("prompts")
    lines = "".join(f"{json.dumps(one)}\n" for one in PROMPTS)
    (directory / "prompts.jsonl").write_text(lines)

    def make(*more):
        output = directory / "replies.jsonl"
        command = [model, "--file", directory / "prompts.jsonl", "--max-tokens", NEW]
        assert main(list(map(str, [*command, "--output", output, *more]))) == 0
        return [json.loads(line) for line in output.read_text("utf-8").splitlines()]

    return make


@pytest.fixture(scope="module")
def greedy(replies):
    return replies("--batch-size", "3")


def test_replies_are_those_of_transformers(greedy, model, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert len(greedy) == len(PROMPTS)
    for asked, found in zip(PROMPTS, greedy, strict=True):
        messages = asked.get("messages") or [{"role": "user", "content": asked["prompt"]}]
        assert found["messages"] == messages
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # What spells a special token in a question is no such token.
        parts = re.split("(?<=Hi )(<[|]im_end[|]>)", prompt)
        ids = [
            number
            for place, part in enumerate(parts)
            for number in tokenizer(part, split_special_tokens=place == 1)["input_ids"]
        ]
        stop = [
            one if isinstance(one, int) else tokenizer.convert_tokens_to_ids(one)
            for one in asked.get("stop", [])
        ]
        ends = [*oracle.generation_config.eos_token_id, *stop]
        ids = torch.tensor([ids])
        out = oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=ends,
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
        assert found["tokens"] == len(out)
        assert found["stopped"] == (out[-1] in ends)
        kept = out[:-1] if found["stopped"] else out
        assert found["reply"] == tokenizer.decode(kept, skip_special_tokens=True).strip()
    assert {one["stopped"] for one in greedy} == {True, False}, "or this says little"


def test_what_is_drawn_does_not_depend_on_the_batch(replies, greedy):
    drawn = [replies("--sample", "--seed", "7", "--batch-size", size) for size in ("4", "1")]
    assert drawn[0] == drawn[1] != greedy
    # The likeliest token of one is the likeliest.
    assert replies("--sample", "--top-k", "1") == greedy


def test_one_reply_is_printed_as_it_is(model, capsys):
    assert main([str(model), "--prompt", "A fast horse", "--raw", "--max-tokens", "8"]) == 0
    raw = capsys.readouterr().out
    assert main([str(model), "--prompt", "A fast horse", "--max-tokens", "8"]) == 0
    assert raw.count("\n") >= 1 and raw != capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "sampling", "others"),
    [
        (None, Sampling(), []),
        ({"top_k": 0, "repetition_penalty": 1.0}, Sampling(), []),
        (
            {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "num_beams": 4},
            Sampling(temperature=0.6, top_p=0.9),
            ["repetition_penalty=1.1", "num_beams=4"],
        ),
    ],
)
def test_the_makers_settings_are_read(config, sampling, others, tmp_path):
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert sampling_of(tmp_path) == (sampling, others)


@pytest.mark.parametrize("config", [{"temperature": "hot"}, {"top_k": 0.5}, {"top_p": 7}])
def test_settings_that_make_no_sense_are_named(config, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json.*{next(iter(config))}"):
        sampling_of(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "line", "complaint"),
    [
        ([], None, "There is no prompt: give --prompt TEXT or --file"),
        (["--prompt", "a", "--max-tokens", "0"], None, "--max-tokens takes a positive number"),
        (["--prompt", "a", "--max-tokens", "250"], None, "exceeds 256, the longest sequence"),
        (["--prompt", "a", "--temperature", "0"], None, "temperature is a number above 0"),
        (["--prompt", "a", "--stop", "ab"], None, "--stop takes tokens: 'ab' is 2 of them"),
        (["--prompt", "a", "--raw", "--system", "b"], None, "no place for --system"),
        (["--raw"], {"prompt": "a"}, "--raw and --system are for --prompt"),
        ([], {"text": "a"}, r"prompts.jsonl:1: expected either a prompt or messages"),
        ([], {"prompt": 7}, r"prompts.jsonl:1: expected text, found int 7"),
        ([], {"messages": "a"}, "expected a list of messages"),
        ([], {"messages": [{"role": "assistant", "content": "a"}]}, "expected one to reply to"),
        ([], {"prompt": "a", "stop": [1.5]}, "stop is a list of tokens"),
        ([], {"prompt": "a", "stop": [10**6]}, "prompts.jsonl:1: stop takes tokens: 1000000 is no"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_first(model, arguments, line, complaint, tmp_path, capsys):
    if line is not None:
        (tmp_path / "prompts.jsonl").write_text(json.dumps(line))
        arguments = [*arguments, "--file", str(tmp_path / "prompts.jsonl")]
    assert main([str(model), *arguments]) == 2
    assert re.search(complaint, capsys.readouterr().err)
