"""Notes on templates and limits that teach a model something else than it looks."""

from __future__ import annotations

from jaxmoo.data.example import Example
from jaxmoo.data.inspect import notes
from jaxmoo.data.tokenization.tokenize import tokenize_all

PLAIN = (
    "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:{% endif %}"
)
# As Qwen3's: empty thoughts before the last reply only.
DROPS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As others: those of inner replies are left out.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['reasoning_content'] and loop.last %}<think>{{ m['reasoning_content'] }}</think>"
    "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SHORT = Example.from_pair("en", "Hello?", "Hi there.")
LONG = Example.from_messages("en", [user("a"), assistant("b"), user("c"), assistant("d")])
THOUGHT = Example.from_messages(
    "en", [user("a"), assistant("b", reasoning_content="Hm."), user("c"), assistant("d")]
)


def noted(tokenizer, *examples, length=512):
    return notes({"en": tokenize_all(examples, tokenizer, length)}, "data.sequence_length")


def test_ordinary_templates_are_passed_over(tokenizer):
    assert noted(tokenizer, SHORT, LONG, Example.from_text("en", "Once upon a time")) == []


def test_replies_that_end_with_no_special_token_are_noted(make_tokenizer):
    (note,) = noted(make_tokenizer(PLAIN), SHORT, LONG)
    assert "ends no reply with a special token (en: 2 of 2 examples)" in note


def test_replies_that_are_rendered_otherwise_when_others_follow_are_noted(make_tokenizer):
    (note,) = noted(make_tokenizer(DROPS), SHORT, LONG)
    assert "otherwise than at its end" in note and "(en: 1 of 2 examples)" in note
    assert noted(make_tokenizer(DROPS), SHORT) == []
    (note,) = noted(make_tokenizer(FORGETS), THOUGHT, LONG)
    assert "(en: 1 of 2 examples)" in note


def test_a_language_whose_examples_all_lose_their_end_is_noted(tokenizer):
    short = Example.from_pair("en", "a", "b")
    long = [Example.from_pair("en", "a", "b" * size) for size in (60, 70)]
    (note,) = noted(tokenizer, *long, length=50)
    assert "All examples of en lose their end" in note and "Raise data.sequence_length" in note
    assert noted(tokenizer, *long, short, length=50) == []


def test_keys_that_a_template_does_not_show_are_noted_each_once(tokenizer):
    known = Example.from_messages("en", [user("a") | {"id": 1}, assistant("b", id=2, toxic=False)])
    first, second = noted(tokenizer, known, known, SHORT)
    assert "shows nothing of 'id'" in first and "(en: 2 of 3 examples)" in first
    assert "shows nothing of 'toxic'" in second and "it is ignored" in second
