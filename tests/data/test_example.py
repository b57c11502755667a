"""Examples: what a conversation must look like to be learnt from."""

from __future__ import annotations

import pytest

from jaxmoo.data.example import Example, normalise
from jaxmoo.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_a_pair_is_a_conversation_of_two_turns():
    example = Example.from_pair("en", "  Hello?\n", "\nHi! \n")
    assert example.messages == (user("Hello?"), assistant("Hi!"))
    assert (example.language, example.prompt, example.reply) == ("en", "Hello?", "Hi!")


def test_the_reply_is_the_last_assistant_turn_and_what_follows_is_dropped():
    example = Example.from_messages(
        "en", [user("a"), assistant("b"), user("c"), assistant("d"), user("thanks")]
    )
    assert example.reply == "d"
    assert example.prompt == "a\nb\nc"
    assert len(example.messages) == 4


def test_numbers_are_texts_but_nothing_else_is():
    assert Example.from_pair("en", "2 + 2", 4).reply == "4"
    for value in (None, True, ["4"], {"text": "4"}):
        with pytest.raises(DataError, match=r"message 1 \(assistant\): expected text, found"):
            Example.from_pair("en", "2 + 2", value)


def test_a_lone_surrogate_is_refused_since_no_tokenizer_takes_it():
    with pytest.raises(DataError, match="not valid Unicode"):
        Example.from_pair("en", "hello", "broken \ud83d emoji")


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("hello", "expected a list of messages, found str"),
        ([user("a")], "expected at least one message and then an assistant's reply"),
        ([assistant("a")], "expected at least one message and then an assistant's reply"),
        ([], "expected at least one message and then an assistant's reply"),
        ([user("a"), {"role": "assistant"}], r"message 1: expected role and content, found \["),
        ([user("a"), "b"], "message 1: expected role and content, found str"),
        ([{"role": "human", "content": "a"}, assistant("b")], "expected a role of .* 'human'"),
    ],
)
def test_malformed_conversations_say_what_was_found(messages, complaint):
    with pytest.raises(DataError, match=complaint):
        Example.from_messages("en", messages)


def test_duplicates_differ_only_in_white_space_and_unicode_composition():
    key = Example.from_pair("fr", "Un café ?", "Oui").key
    assert Example.from_pair("fr", "Un  cafe\u0301\n?", "Oui ").key == key
    assert Example.from_pair("fr", "Un café !", "Oui").key != key
    assert Example.from_pair("fr", "un café ?", "Oui").key != key


def test_the_key_of_a_prompt_knows_its_roles():
    one_turn = Example.from_messages("en", [user("a b"), assistant("c")])
    two_turns = Example.from_messages("en", [user("a"), assistant("b"), assistant("c")])
    assert one_turn.prompt_key != two_turns.prompt_key


def test_normalising_twice_changes_nothing():
    for text in (" a\t b ", "e\u0301", "\u3000全角　空白"):
        assert normalise(normalise(text)) == normalise(text)


def test_texts_differ_by_what_they_say():
    first, same, other = (
        Example.from_text("en", text) for text in ("Once  upon", " Once upon\n", "Twice")
    )
    assert first.key == same.key != other.key
    assert first.reply == "Once  upon" and first.messages == () and first.prompt == ""
    assert first.key != Example.from_pair("en", "Once upon", "Once upon").key
    with pytest.raises(DataError, match="expected text, found none"):
        Example.from_text("en", " ")
