"""Where a reply begins and ends: by construction, and the same for all that ask."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxmoo.data.example import Example
from jaxmoo.data.tokenization.chat import locate
from jaxmoo.data.tokenization.template import ChatTemplate
from jaxmoo.data.tokenization.tokenize import reply_prompts, tokenize, tokenize_choices
from jaxmoo.errors import DataError
from tiny_tokenizer import bytes_tokenizer

THOUGHT = "<think>\n\n</think>\n\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Empty thoughts before every reply.
THINK = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}" + PROMPT
)
# As Qwen3's: thoughts are found in a reply's text, and an empty one stands where there are none.
FOUND = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}"
    "{{ '<think>\n' + (parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '') }}"
    "{{ '\n</think>\n\n' + parts[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
)


def learnt(tokenizer, result):
    return tokenizer.decode(result.tokens[result.loss_mask])


def scored(tokenizer, result):
    return tokenizer.decode(result.tokens[result.scored])


def chat(*texts):
    """Messages by turns, the user's first."""
    roles = ("user", "assistant") * len(texts)
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


@pytest.mark.parametrize("reply", ["yes", "<", ">", "i", "n", "think", "<think>", "\u3000a"])
def test_a_reply_is_found_behind_what_the_template_puts_before_it(reply, make_tokenizer):
    tokenizer = make_tokenizer(THINK)
    example = dataclasses.replace(
        Example.from_pair("en", "1 < 2?", "x"), messages=tuple(chat("1 < 2?", reply))
    )
    result = tokenize(example, tokenizer, 512)
    assert learnt(tokenizer, result) == f"{THOUGHT}{reply}<|im_end|>"
    assert scored(tokenizer, result) == f"{reply}<|im_end|>"
    assert result.reply_bytes == len(reply.encode())
    (prompt,) = reply_prompts([example], tokenizer)
    assert prompt.tolist() == result.tokens[: len(prompt)].tolist()
    assert tokenizer.decode(prompt).endswith(f"<|im_start|>assistant\n{THOUGHT}")


def test_choices_stand_where_the_reply_stands(make_tokenizer):
    tokenizer = make_tokenizer(THINK)
    example = dataclasses.replace(Example.from_pair("en", "1 < 2?", "<"), choices=("<", "think"))
    whole = tokenize(example, tokenizer, 512)
    ((first, second),) = tokenize_choices([example], tokenizer)
    assert first.tokens.tolist() == whole.tokens[:-1].tolist(), "all but the end of the turn"
    for choice, text in ((first, "<"), (second, "think")):
        assert tokenizer.decode(choice.tokens).endswith(f"<|im_start|>assistant\n{THOUGHT}{text}")
        assert scored(tokenizer, choice) == f"\n\n{text}", "with the white space before it"
        assert choice.reply_bytes == len(text)


def test_the_prompt_of_a_reply_does_not_tell_its_text(make_tokenizer):
    tokenizer = make_tokenizer(FOUND + PROMPT)
    asked = [Example.from_pair("en", "1 < 2?", reply) for reply in ("yes", "no, </thing>")]
    one, other = reply_prompts(asked, tokenizer)
    assert one.tolist() == other.tolist()


def test_equal_texts_are_told_apart(tokenizer):
    messages = [
        {"role": "assistant", "content": "Ciao"},
        *chat("Ciao", "Ciao", "assistant", "assistant", "Ciao", "Ciao"),
    ]
    found = locate(Example.from_messages("it", messages), ChatTemplate(tokenizer))
    assert [found.text[turn.start : turn.end] for turn in found.turns] == [
        "Ciao",
        "assistant",
        "Ciao",
    ]
    for turn in found.turns:
        assert found.text[: turn.start] == turn.prompt
        assert found.text[turn.end : turn.limit] == "<|im_end|>\n"


def test_white_space_that_a_template_trims_is_not_missed(make_tokenizer):
    tokenizer = make_tokenizer(THINK.replace("m['content']", "m['content'] | trim"))
    example = Example("en", tuple(chat("Indent a line.", "    two\n")))
    result = tokenize(example, tokenizer, 512)
    assert scored(tokenizer, result) == "two<|im_end|>" and result.reply_bytes == 3


def test_thoughts_that_a_reply_has_are_its_own(make_tokenizer):
    tokenizer = make_tokenizer(FOUND + PROMPT)
    reply = "<think>\nOne is less.\n</think>\n\nyes"
    result = tokenize(Example.from_pair("en", "1 < 2?", reply), tokenizer, 512)
    assert scored(tokenizer, result) == learnt(tokenizer, result) == f"{reply}<|im_end|>"
    assert result.reply_bytes == len(reply)


def test_a_thought_that_the_prompt_opens_is_given(make_tokenizer):
    tokenizer = make_tokenizer(FOUND + PROMPT.replace("assistant\n", "assistant\n<think>\n"))
    reply = "<think>\nOne is less.\n</think>\n\nyes"
    result = tokenize(Example.from_pair("en", "1 < 2?", reply), tokenizer, 512)
    rest = reply.removeprefix("<think>\n")
    assert scored(tokenizer, result) == learnt(tokenizer, result) == f"{rest}<|im_end|>"
    assert result.reply_bytes == len(rest)


@pytest.mark.parametrize(
    ("template", "reply", "complaint"),
    [
        (THINK.replace("m['content']", "m['content'].split('.')[-1]"), "It is. Yes", "as it is"),
        (THINK.replace("m['content']", "m['content'][:3]"), "yes!", "as it is"),
        (THINK.replace("m['content']", "m['content'] + m['content']"), "yes", "found 2 times"),
        (THINK.replace("{{ m['content'] }}", ""), "think", "left out"),
    ],
    ids=["a part", "its beginning", "twice", "nothing"],
)
def test_a_reply_that_a_template_changes_is_refused(template, reply, complaint, make_tokenizer):
    with pytest.raises(DataError, match=rf"reply '{reply}'.*{complaint}"):
        tokenize(Example.from_pair("en", "", reply), make_tokenizer(template), 512)


def test_a_space_before_the_reply_stays_with_its_first_word(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:{% endif %}"
    )
    example = dataclasses.replace(Example.from_pair("en", "a", "how"), choices=("how", "你"))
    result = tokenize(example, tokenizer, 512)
    assert scored(tokenizer, result) == " how\n"
    assert tokenizer.decode(reply_prompts([example], tokenizer)[0]).endswith("### assistant:")
    ((first, second),) = tokenize_choices([example], tokenizer)
    assert (scored(tokenizer, first), scored(tokenizer, second)) == (" how", " 你")


# Thoughts in a reply's text

# As Qwen3's: those of replies that others follow are left out.
FORGETS = FOUND.replace(
    "{{ '<think>", "{% if not loop.last %}{{ parts[-1].lstrip('\n') }}{% else %}{{ '<think>"
).replace("lstrip('\n') }}{% else %}{{ m", "lstrip('\n') }}{% endif %}{% else %}{{ m")


def test_an_empty_thought_that_a_reply_has_is_its_own(make_tokenizer):
    for template in (FOUND + PROMPT, FORGETS + PROMPT):
        tokenizer = make_tokenizer(template)
        result = tokenize(Example.from_pair("en", "1 < 2?", f"{THOUGHT}yes"), tokenizer, 512)
        assert scored(tokenizer, result) == learnt(tokenizer, result) == f"{THOUGHT}yes<|im_end|>"
        without = tokenize(Example.from_pair("en", "1 < 2?", "yes"), tokenizer, 512)
        assert result.tokens.tolist() == without.tokens.tolist()


@pytest.mark.parametrize("reply", [f"{THOUGHT}yes", "<think></think>yes", "yes"])
def test_an_empty_thought_that_the_prompt_says_is_given(reply, make_tokenizer):
    tokenizer = make_tokenizer(FOUND + PROMPT.replace("assistant\n", f"assistant\n{THOUGHT}"))
    result = tokenize(Example.from_pair("en", "1 < 2?", reply), tokenizer, 512)
    assert scored(tokenizer, result) == learnt(tokenizer, result) == "yes<|im_end|>"


@pytest.mark.parametrize("opened", ["", "<think>\n"])
@pytest.mark.parametrize(
    ("reply", "rendered"),
    [
        ("<think>Less.</think>yes", "<think>\nLess.\n</think>\n\nyes"),
        ("<think>\nLess.\n</think>\nyes", "<think>\nLess.\n</think>\n\nyes"),
        ("<think> Less. </think> yes", "<think>\n Less. \n</think>\n\n yes"),
        ("<think></think>yes", "<think>\n\n</think>\n\nyes"),
    ],
)
def test_a_thought_is_learnt_with_the_white_space_of_the_template(
    reply, rendered, opened, make_tokenizer
):
    tokenizer = make_tokenizer(FOUND + PROMPT.replace("assistant\n", f"assistant\n{opened}"))
    result = tokenize(Example.from_pair("en", "1 < 2?", reply), tokenizer, 512)
    rest = f"{rendered.removeprefix(opened)}<|im_end|>"
    assert scored(tokenizer, result) == learnt(tokenizer, result) == rest


@pytest.mark.parametrize(
    "reply",
    [
        "The tag </think> ends thoughts.",
        "Hm. <think>Less.</think>yes",
        "<think>Less.</think>So </think>yes",
        "Less.</think>yes",
    ],
)
def test_a_reply_in_which_a_template_finds_other_thoughts_is_refused(reply, make_tokenizer):
    with pytest.raises(DataError, match="render the reply as it is"):
        tokenize(Example.from_pair("en", "1 < 2?", reply), make_tokenizer(FOUND + PROMPT), 512)
    messages = chat("1 < 2?", reply, "2 < 1?", "no")
    with pytest.raises(DataError, match="render the reply as it is"):
        tokenize(Example.from_messages("en", messages), make_tokenizer(FORGETS + PROMPT), 512)


@pytest.mark.parametrize(
    "thought", ["<think>\nLess.\n</think>\n\n", "<think>Less.</think>", THOUGHT]
)
def test_thoughts_that_are_shown_only_at_the_end_are_not_learnt_within(thought, make_tokenizer):
    tokenizer = make_tokenizer(FORGETS + PROMPT)
    more = "<think>\nMore.\n</think>\n\nno"
    messages = chat("1 < 2?", f"{thought}yes", "2 < 1?", more)
    result = tokenize(Example.from_messages("en", messages), tokenizer, 512)
    assert (
        scored(tokenizer, result) == learnt(tokenizer, result) == f"yes<|im_end|>{more}<|im_end|>"
    )
    assert (
        result.uneven
        and not tokenize(Example.from_messages("en", messages[:2]), tokenizer, 512).uneven
    )


def test_thoughts_that_a_template_never_shows_are_refused(make_tokenizer):
    never = THINK.replace("m['content']", "m['content'].split('</think>')[-1]")
    for messages in (chat("a", "<think>Hm.</think>b"), chat("a", "<think>Hm.</think>b", "c", "d")):
        with pytest.raises(DataError, match="render the reply as it is"):
            tokenize(Example.from_messages("en", messages), make_tokenizer(never), 512)


# Marks

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "<think>\n\n</think>\n\n{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}" + PROMPT
)
TURNS = Example.from_messages("en", chat("a", "b", "c", "think"))


def marks_of(tokenizer, example):
    """The tokens that transformers says are marked."""
    found = tokenizer.apply_chat_template(
        list(example.messages), return_assistant_tokens_mask=True, return_dict=True
    )
    return [bool(mark) for mark in found["assistant_masks"]]


def test_what_a_template_does_not_mark_before_a_reply_is_not_learnt(make_tokenizer):
    tokenizer = make_tokenizer(MARKED)
    result = tokenize(TURNS, tokenizer, 512)
    assert result.loss_mask.tolist() == marks_of(tokenizer, TURNS)[: len(result.tokens)]
    assert learnt(tokenizer, result) == "b<|im_end|>think<|im_end|>"


def test_the_end_of_a_turn_is_learnt_whether_it_is_marked_or_not(make_tokenizer):
    outside = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    inside, outside = (tokenize(TURNS, make_tokenizer(t), 512) for t in (MARKED, outside))
    assert outside.tokens.tolist() == inside.tokens.tolist()
    assert outside.loss_mask.tolist() == inside.loss_mask.tolist()


@pytest.mark.parametrize("template", [THINK, MARKED], ids=["prefixes", "marks"])
def test_a_first_message_is_learnt_in_no_template(template, make_tokenizer):
    greeting = {"role": "assistant", "content": "b"}
    tokenizer = make_tokenizer(template)
    example = Example.from_messages("en", [greeting, *TURNS.messages])
    result = tokenize(example, tokenizer, 512)
    assert scored(tokenizer, result) == "b<|im_end|>think<|im_end|>"


def test_a_marked_header_is_not_learnt_for_the_prompt_gives_it(make_tokenizer):
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "<|im_start|>assistant\n{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    tokenizer = make_tokenizer(template + PROMPT)
    assert learnt(tokenizer, tokenize(TURNS, tokenizer, 512)) == "b<|im_end|>think<|im_end|>"


def test_marks_do_not_excuse_another_prompt(make_tokenizer):
    tokenizer = make_tokenizer(MARKED.replace("%}<|im_start|>assistant\n", "%}<|im_start|>bot\n"))
    with pytest.raises(DataError, match="to be a prefix of the rendered conversation"):
        tokenize(TURNS, tokenizer, 512)


def test_training_reads_what_is_scored_and_more(make_tokenizer):
    for template in (THINK, MARKED, FOUND + PROMPT):
        result = tokenize(TURNS, make_tokenizer(template), 512)
        assert not (result.scored & ~result.loss_mask).any()
        edges = np.flatnonzero(np.diff([0, *result.scored, 0])).reshape(-1, 2)
        assert len(edges) == 2 and result.loss_mask[edges[:, 1] - 1].all()


# What is beside the text

TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}" + PROMPT
)
CALL = {"name": "weather", "arguments": {"city": "Rome"}}
CALLED = '<call>{"name": "weather", "arguments": {"city": "Rome"}}</call>'


def test_tool_calls_and_thoughts_are_learnt_as_the_template_writes_them(make_tokenizer):
    tokenizer = make_tokenizer(TOOLS)
    messages = [
        {"role": "user", "content": "Rome?", "name": "Ada"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "12", "name": "weather"},
        {"role": "assistant", "content": "Twelve.", "reasoning_content": "12 C"},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": "Sure.", "tool_calls": [CALL]},
    ]
    example = Example.from_messages("en", messages, tools=[{"name": "weather"}])
    result = tokenize(example, tokenizer, 1024)
    turns = [f"{CALLED}{CALLED}", "<think>12 C</think>Twelve.", f"Sure.{CALLED}"]
    assert scored(tokenizer, result) == "".join(f"{turn}<|im_end|>" for turn in turns)
    assert learnt(tokenizer, result) == scored(tokenizer, result)
    assert result.reply_bytes == len("".join(turns))
    whole = tokenizer.apply_chat_template(messages, tools=[{"name": "weather"}], tokenize=False)
    assert tokenizer.decode(result.tokens) == whole.removesuffix("\n")


@pytest.mark.parametrize(
    ("beside", "tools", "what"),
    [
        ({"tool_calls": [CALL]}, (), r"'tool_calls' in message 1 \(assistant\)"),
        ({"reasoning_content": "Hm."}, (), r"'reasoning_content' in message 1 \(assistant\)"),
        ({"weight": 0}, (), r"'weight' in message 1 \(assistant\)"),
        ({"train": False}, (), r"'train' in message 1 \(assistant\)"),
        ({"prefix": True}, (), r"'prefix' in message 1 \(assistant\)"),
        ({}, [{"name": "weather"}], "the record's tools"),
    ],
)
def test_what_the_template_leaves_out_is_refused_by_name(beside, tools, what, tokenizer):
    messages = chat("Rome?", "Yes.")
    messages[1] |= beside
    example = Example.from_messages("en", messages, tools=tools, place="en.jsonl:5")
    with pytest.raises(DataError, match=rf"en\.jsonl:5: the chat template shows nothing of {what}"):
        tokenize(example, tokenizer, 512)


def test_a_later_weight_is_not_missed_behind_one_that_says_nothing(tokenizer):
    messages = chat("Rome?", "Yes.", "Oslo?", "No.")
    messages[1]["weight"], messages[3]["weight"] = 1, 0
    with pytest.raises(DataError, match=r"nothing of 'weight' in message 3 \(assistant\)"):
        tokenize(Example.from_messages("en", messages), tokenizer, 512)


def test_keys_that_only_identify_are_ignored_where_the_template_does_not_show_them(make_tokenizer):
    """Ids of tool results, as OpenAI and Hugging Face write them, and whatever data sets keep."""
    tokenizer = make_tokenizer(TOOLS)
    messages = [
        {"role": "user", "content": "Rome?", "toxic": False, "weight": 0},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 1, "id": "m1"},
        {"role": "tool", "content": "12", "name": "weather", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Twelve.", "prefix": False, "id": "m2"},
    ]
    bare = [
        {key: value for key, value in message.items() if key in ("role", "content", "tool_calls")}
        for message in messages
    ]
    bare[2]["name"] = "weather"  # which this template shows
    result, other = (
        tokenize(Example.from_messages("en", turns), tokenizer, 512) for turns in (messages, bare)
    )
    assert result.tokens.tolist() == other.tokens.tolist()
    assert result.loss_mask.tolist() == other.loss_mask.tolist()
    assert set(result.ignored) == {"toxic", "weight", "id", "tool_call_id", "prefix"}
    assert other.ignored == ()


def test_an_id_does_not_excuse_a_reply_that_a_template_changes(make_tokenizer):
    messages = chat("a", "It is. Yes")
    messages[1]["id"] = 7
    tokenizer = make_tokenizer(THINK.replace("m['content']", "m['content'].split('.')[-1]"))
    with pytest.raises(DataError, match="render the reply as it is"):
        tokenize(Example.from_messages("en", messages), tokenizer, 512)


def test_an_id_makes_no_reply_of_an_empty_turn(tokenizer):
    messages = chat("a", "", "b", "c")
    messages[1]["id"] = 7
    result = tokenize(Example.from_messages("en", messages), tokenizer, 512)
    assert learnt(tokenizer, result) == "c<|im_end|>"


def test_keys_of_which_a_template_shows_one_or_the_other_are_not_both_ignored(make_tokenizer):
    template = THINK.replace("{{ m['content'] }}", "{{ m.who or m.name }}: {{ m['content'] }}", 1)
    messages = [{"role": "user", "content": "a", "name": "Ada", "who": "Ada"}, *chat("", "b")[1:]]
    result = tokenize(Example.from_messages("en", messages), make_tokenizer(template), 512)
    assert result.ignored == ("name",)


def test_a_message_that_the_template_leaves_out_is_refused(make_tokenizer):
    template = "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}"
    messages = [{"role": "system", "content": "Be kind."}, *chat("a", "b")]
    with pytest.raises(DataError, match=r"nothing of the content of message 0 \(system\)"):
        tokenize(Example.from_messages("en", messages), make_tokenizer(template + THINK), 512)


def test_keys_that_say_nothing_need_not_be_shown(tokenizer):
    messages = chat("Rome?", "Yes.")
    messages[1] |= {"tool_calls": [], "name": None, "reasoning_content": ""}
    result = tokenize(Example.from_messages("en", messages), tokenizer, 512)
    assert learnt(tokenizer, result) == "Yes.<|im_end|>"


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "\n", "###"])
@pytest.mark.parametrize("lead", ["", "<think>\n\n</think>\n\n", "[a]: ", "> ", " ", "assistant\n"])
def test_whatever_a_reply_says_it_is_found_where_it_was_put(lead, end, trim):
    """Replies and what surrounds them, drawn from the same few characters."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}"
        "{{ LEAD if m['role'] == 'assistant' }}{{ m['content'] TRIM }}{{ END }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    template = template.replace("LEAD", repr(lead)).replace("END", repr(end))
    tokenizer = bytes_tokenizer(
        ["<|im_start|>", "<|im_end|>"],
        chat_template=template.replace("TRIM", "| trim" if trim else ""),
    )
    stop = end.strip("\n") or end
    letters, rng = sorted(set(f"{lead}ab \n<{end[-1]}")), np.random.default_rng(0)

    def text(length):
        drawn = "".join(rng.choice(letters, length))
        return drawn if drawn.strip() else f"{drawn}a"

    for _ in range(6):
        texts = [text(rng.integers(1, 8)) for _ in range(6)]
        texts[3] = texts[1]
        messages = [{"role": "assistant", "content": texts[5]}, *chat(*texts)]
        result = tokenize(Example.from_messages("en", messages), tokenizer, 512)
        replies = [reply.strip() if trim else reply for reply in texts[1::2]]
        assert learnt(tokenizer, result) == "".join(f"{lead}{r}{stop}" for r in replies)
        kept = "" if lead.strip() else lead
        assert scored(tokenizer, result) == "".join(f"{kept}{r}{stop}" for r in replies)
        assert result.reply_bytes == sum(map(len, replies))
