"""Tokenising: the loss falls on replies and their end-of-turn tokens, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from jaxmoo.data.example import Example
from jaxmoo.data.tokenization.tokenize import tokenize, tokenize_all
from jaxmoo.errors import DataError

EXAMPLES = [
    Example.from_pair("en", "Hello?", "Hi there, 42!"),
    Example.from_pair("fa", "سلام", "حال شما چطور است؟"),
    Example.from_pair("zh", "你好吗", "我很好。😀"),
    Example.from_pair("en", "Print two lines.", "one\n\n  two\n"),
    Example.from_messages(
        "it",
        [
            {"role": "system", "content": "Sii breve."},
            {"role": "user", "content": "Ciao"},
            {"role": "assistant", "content": "Ciao, come stai?"},
            {"role": "user", "content": "Bene"},
            {"role": "assistant", "content": "Bene!"},
        ],
    ),
]


@pytest.mark.parametrize("example", EXAMPLES[:4], ids=lambda e: e.reply[:8])
def test_the_mask_covers_the_reply_and_its_end_token(example, tokenizer):
    result = tokenize(example, tokenizer, 512)
    assert tokenizer.decode(result.tokens[result.loss_mask]) == example.reply + "<|im_end|>"
    assert np.diff(result.loss_mask).sum() == 1, "one span, at the end"
    assert result.tokens.dtype == np.int32 and result.loss_mask.dtype == bool
    assert result.reply_bytes == len(example.reply.encode())
    assert not result.truncated


@pytest.mark.parametrize("example", EXAMPLES[:4], ids=lambda e: e.reply[:8])
def test_what_comes_before_is_what_the_model_is_prompted_with(example, tokenizer):
    result = tokenize(example, tokenizer, 512)
    prompt = tokenizer.apply_chat_template(
        list(example.messages[:-1]), add_generation_prompt=True, return_dict=False
    )
    assert result.tokens[~result.loss_mask].tolist() == prompt


def test_the_templates_default_system_prompt_is_kept(tokenizer):
    text = tokenizer.decode(tokenize(EXAMPLES[0], tokenizer, 512).tokens)
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello?")


def spans(tokenizer, result):
    """The texts of the stretches that are learnt."""
    edges = np.flatnonzero(np.diff([0, *result.loss_mask, 0])).reshape(-1, 2)
    return [tokenizer.decode(result.tokens[start:stop]) for start, stop in edges]


REPLIES = ["Ciao, come stai?", "Bene!"]


def test_every_assistant_turn_is_learnt(tokenizer):
    result = tokenize(EXAMPLES[4], tokenizer, 512)
    assert spans(tokenizer, result) == [f"{reply}<|im_end|>" for reply in REPLIES]
    assert result.reply_bytes == sum(len(reply.encode()) for reply in REPLIES)


def test_each_turn_is_what_the_model_would_answer_there(tokenizer):
    """Cut behind its reply, a conversation has the mask of its last turn."""
    whole = tokenize(EXAMPLES[4], tokenizer, 512)
    for end in (3, 5):
        messages = list(EXAMPLES[4].messages[:end])
        prompt = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        assert whole.tokens[: len(prompt)].tolist() == prompt
        assert not whole.loss_mask[len(prompt) - 1] and whole.loss_mask[len(prompt)]


def test_a_conversation_cut_in_the_middle_keeps_the_turns_that_are_left(tokenizer):
    whole = tokenize(EXAMPLES[4], tokenizer, 512)
    first_end = int(np.flatnonzero(np.diff(whole.loss_mask.astype(int)) == -1)[0]) + 1
    second_start = int(np.flatnonzero(~whole.loss_mask)[-1]) + 1
    for length in range(first_end, second_start + 1):
        cut = tokenize(EXAMPLES[4], tokenizer, length)
        # What no token is learnt from goes too.
        assert len(cut.tokens) == first_end and cut.truncated
        assert spans(tokenizer, cut) == ["Ciao, come stai?<|im_end|>"]
        assert cut.reply_bytes == len(REPLIES[0].encode())


def test_turns_without_end_token_end_where_the_next_message_begins(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:{% endif %}"
    )
    assert spans(tokenizer, tokenize(EXAMPLES[4], tokenizer, 512)) == [f" {r}\n" for r in REPLIES]


def test_a_template_that_renders_the_last_turn_otherwise(make_tokenizer):
    """As Qwen3's, which puts empty thoughts before the last reply only."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}END\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(template.replace("END", "<|im_end|>"))
    assert spans(tokenizer, tokenize(EXAMPLES[4], tokenizer, 512)) == [
        "Ciao, come stai?<|im_end|>",
        "<think>\n\n</think>\n\nBene!<|im_end|>",
    ]
    with pytest.raises(DataError, match="cannot tell where this turn ends"):
        template = template.replace("END", "").replace("<|im_start|>", "###")
        tokenize(EXAMPLES[4], make_tokenizer(template), 512)


def test_a_turn_left_out_by_the_template_is_not_taken_for_a_later_one(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [*EXAMPLES[4].messages[:3], {"role": "user", "content": "Bene"}]
    messages.append(messages[2])
    with pytest.raises(DataError, match="only in a later turn"):
        tokenize(Example.from_messages("it", messages), tokenizer, 512)


def test_a_greeting_before_any_message_is_not_learnt(tokenizer):
    messages = [{"role": "assistant", "content": "Benvenuto"}, *EXAMPLES[4].messages[1:]]
    result = tokenize(Example.from_messages("it", messages), tokenizer, 512)
    assert spans(tokenizer, result) == [f"{reply}<|im_end|>" for reply in REPLIES]


@pytest.mark.parametrize("bos", [False, True])
def test_plain_text_is_learnt_whole_but_for_its_first_token(bos, make_tokenizer):
    tokenizer = make_tokenizer(None)
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    text = "سلام, how are you?"
    result = tokenize(Example.from_text("fa", text), tokenizer, 512)
    assert tokenizer.decode(result.tokens).removeprefix("<|endoftext|>") == f"{text}<|im_end|>"
    assert result.loss_mask.tolist() == [False] + [True] * (len(result.tokens) - 1)
    # What is scored is counted: all of the text, but for what the first token says.
    unscored = 0 if bos else len("س".encode())
    assert result.reply_bytes == len(text.encode()) - unscored
    cut = tokenize(Example.from_text("fa", text), tokenizer, 8)
    assert cut.tokens.tolist() == result.tokens[:8].tolist() and cut.truncated


def test_marks_that_miss_a_reply_are_not_trusted(make_tokenizer):
    # The last turn is not marked; the difference of prefixes finds both.
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not"
        " loop.last %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}"
        "{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    result = tokenize(EXAMPLES[4], tokenizer, 512)
    assert spans(tokenizer, result) == [f"{reply}<|im_end|>" for reply in REPLIES]


def test_the_mask_is_the_templates_own_where_it_marks_the_assistant(make_tokenizer):
    # transformers' own mask, from a template whose marks are unlike a difference of prefixes
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "[thinking]\n{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}"
        "{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    for example in EXAMPLES:
        result = tokenize(example, tokenizer, 512)
        expected = tokenizer.apply_chat_template(
            list(example.messages), return_assistant_tokens_mask=True, return_dict=True
        )
        n = len(result.tokens)
        assert result.tokens.tolist() == expected["input_ids"][:n]
        assert result.loss_mask.tolist() == [bool(m) for m in expected["assistant_masks"][:n]]
        assert not any(expected["assistant_masks"][n:])


def test_many_at_once_are_as_one_by_one(tokenizer):
    for together, example in zip(tokenize_all(EXAMPLES, tokenizer, 40), EXAMPLES, strict=True):
        if together.loss_mask.any():
            alone = tokenize(example, tokenizer, 40)
            assert alone.tokens.tolist() == together.tokens.tolist()
            assert alone.loss_mask.tolist() == together.loss_mask.tolist()
            assert alone.reply_bytes == together.reply_bytes
    assert tokenize_all([], tokenizer, 40) == []


def test_a_long_reply_loses_its_end_and_says_so(tokenizer):
    example = Example.from_pair("zh", "你好吗", "我很好。" * 20)
    whole = tokenize(example, tokenizer, 512)
    start = int(whole.loss_mask.argmax())
    for length in range(start + 1, len(whole.tokens) + 1):
        cut = tokenize(example, tokenizer, length)
        assert cut.tokens.tolist() == whole.tokens[:length].tolist()
        assert cut.loss_mask.sum() == length - start
        assert cut.length == len(whole.tokens)
        assert cut.truncated == (length < len(whole.tokens))
        kept = tokenizer.decode(cut.tokens[start:]).rstrip("�").removesuffix("<|im_end|>")
        # A character whose bytes were cut in the middle counts whole.
        assert 0 <= cut.reply_bytes - len(kept.encode()) <= 4
    assert cut.reply_bytes == len(example.reply.encode())


def test_a_prompt_that_fills_the_sequence_leaves_no_target(tokenizer):
    example = Example.from_pair("nl", "heel lang " * 30, "ja")
    result = tokenize_all([example], tokenizer, 64)[0]
    assert len(result.tokens) == 64
    assert not result.loss_mask.any() and result.reply_bytes == 0
    with pytest.raises(DataError, match="'nl' has no reply token within 64 tokens"):
        tokenize(example, tokenizer, 64)


def test_an_empty_reply_has_no_target_although_it_ends(tokenizer):
    with pytest.raises(DataError, match="'id' has no reply token"):
        tokenize(Example.from_pair("id", "Halo", "  "), tokenizer, 512)


def test_a_template_without_end_token_is_masked_to_its_end(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:{% endif %}"
    )
    result = tokenize(EXAMPLES[0], tokenizer, 512)
    assert tokenizer.decode(result.tokens[result.loss_mask]) == " Hi there, 42!\n"


def test_a_template_that_writes_before_the_reply_needs_reply_text_too(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}[thinking]\n{% endif %}{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    result = tokenize(EXAMPLES[0], tokenizer, 512)
    text = tokenizer.decode(result.tokens[result.loss_mask])
    assert text == "[thinking]\nHi there, 42!<|im_end|>"
    start = int(result.loss_mask.argmax())
    assert not tokenize_all([EXAMPLES[0]], tokenizer, start + 2)[0].loss_mask.any()


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "no chat template"),
        (
            "{% for m in messages %}{{ m['role'] }} {{ m['content'] | upper }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant {% endif %}",
            "render the reply as it is, found 'HOW ARE YOU",
        ),
        (
            "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>your turn{% endif %}",
            "Language 'en'.*to be a prefix of the rendered conversation",
        ),
        # The text is a prefix, but its last blank merges with the word that follows.
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            "Language 'en'.*token by token.*found a prompt that ends in .*assistant: '",
        ),
    ],
    ids=["none", "changes the reply", "another prompt", "tokens merge"],
)
def test_unsuitable_templates_are_refused(template, complaint, make_tokenizer):
    example = Example.from_pair("en", "Hello?", "how are you? Hi there")
    with pytest.raises(DataError, match=complaint):
        tokenize(example, make_tokenizer(template), 512)


def test_a_tokenizer_without_offsets_is_refused():
    from transformers import PreTrainedTokenizerBase

    with pytest.raises(DataError, match="gives no character offsets"):
        tokenize(EXAMPLES[0], PreTrainedTokenizerBase(), 512)
