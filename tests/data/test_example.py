"""Examples: what a conversation must look like to be learnt from."""

from __future__ import annotations

import math
import unicodedata

import pytest

from jaxmoo.data.example import MOST_CHARACTERS, Example, identifier, normalise
from jaxmoo.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_a_pair_is_a_conversation_of_two_turns():
    example = Example.from_pair("en", "Hello?", "Hi!")
    assert example.messages == (user("Hello?"), assistant("Hi!"))
    assert (example.language, example.prompt, example.reply) == ("en", "Hello?", "Hi!")


@pytest.mark.parametrize("text", ["    return 1\n", "\u3000雪国", "a ", "\n"])
def test_white_space_at_the_ends_is_part_of_a_text(text):
    kept = text if text.strip() else ""
    assert Example.from_pair("en", "Go on.", text).reply == kept
    assert Example.from_pair("en", text, "b").prompt == kept
    if kept:
        assert Example.from_text("en", text).reply == text


def test_the_reply_is_the_last_assistant_turn_and_what_follows_is_dropped():
    example = Example.from_messages(
        "en", [user("a"), assistant("b"), user("c"), assistant("d"), user("thanks")]
    )
    assert example.reply == "d"
    assert example.prompt == "a\nb\nc"
    assert len(example.messages) == 4


@pytest.mark.parametrize("value", [None, True, 4, 0.5, math.nan, math.inf, ["4"], {"text": "4"}])
def test_nothing_but_text_is_text(value):
    with pytest.raises(DataError, match=r"message 1 \(assistant\): expected text, found"):
        Example.from_pair("en", "2 + 2", value)
    with pytest.raises(DataError, match="expected text, found"):
        Example.from_text("en", value)


def test_an_example_of_endless_text_is_refused_by_its_size():
    with pytest.raises(DataError, match=r"at most 10,000,000 characters.* found 10,000,001"):
        Example.from_pair("en", "Tell me everything.", "a" * (MOST_CHARACTERS + 1))


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def test_every_key_of_a_message_is_kept_but_for_nulls():
    messages = [
        user("Rome?") | {"name": "Ada", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Hm."},
        {"role": "tool", "content": "12", "tool_call_id": "a1"},
        assistant("12 degrees."),
    ]
    example = Example.from_messages("en", messages, tools=[{"name": "weather"}])
    assert example.messages == (
        user("Rome?") | {"name": "Ada"},
        messages[1] | {"content": ""},
        messages[2],
        messages[3],
    )
    assert example.tools == ({"name": "weather"},)


def test_empty_lists_and_mappings_of_a_message_are_as_absent():
    empty = {"tool_calls": [], "function_call": {}}
    example = Example.from_messages("en", [user("a") | empty, assistant("b") | empty])
    assert example.messages == (user("a"), assistant("b"))
    with pytest.raises(DataError, match="message 1: expected role and content"):
        Example.from_messages("en", [user("a"), {"role": "assistant", "tool_calls": []}])


def test_ids_tell_no_examples_apart_that_say_the_same():
    """Else one with the same prompt could be trained on and another held out."""

    def example(number):
        return Example.from_messages(
            "en",
            [user("Rome?") | {"id": number}, assistant("Yes.") | {"id": -number, "weight": 1}],
        )

    assert example(1).key == example(2).key == Example.from_pair("en", "Rome?", "Yes.").key
    assert not example(1).says_more


def test_what_is_beside_the_text_tells_examples_apart():
    def key(tools=(), **beside):
        called = assistant("") | {"tool_calls": [CALL], **beside}
        return Example.from_messages(
            "en", [user("Rome?"), called, assistant("Yes.")], tools=tools
        ).key

    assert key() == key()
    assert len({key(), key(reasoning_content="Hm."), key(tools=[{"name": "weather"}])}) == 3


def test_parts_of_a_message_are_joined_and_only_text_is_learnt():
    parts = [{"type": "text", "text": "Ciao", "image": None}, {"type": "text", "text": ", tu!"}]
    messages = [{"role": "user", "content": parts}, assistant("Ciao!")]
    assert Example.from_messages("it", messages).prompt == "Ciao, tu!"
    parts[1] = {"type": "image", "url": "a.png"}
    with pytest.raises(DataError, match=r"message 0 \(user\): content part 1: .* 'image' with"):
        Example.from_messages("it", messages)


def deep(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value", [math.nan, "\ud83d", {"\ud83d": 1}, deep(200), deep(100_000), b"x", object()]
)
def test_what_no_template_could_render_is_refused_by_message_and_role(value):
    with pytest.raises(DataError, match=r"message 1 \(assistant\): "):
        Example.from_messages("en", [user("a"), assistant("b") | {"tool_calls": [{"x": value}]}])
    with pytest.raises(DataError, match="tools: "):
        Example.from_messages("en", [user("a"), assistant("b")], tools=[{"x": value}])


def test_ids_that_mean_the_same_are_the_same():
    assert {identifier(value) for value in (7, 7.0, "7", " 7", "7.0")} == {"7"}
    assert identifier("e\u0301") == identifier("\u00e9")
    assert identifier("07") == "07" and identifier(0.0) == "0"
    assert {identifier(value) for value in (None, "", " ")} == {None}
    for value in (True, 0.5, math.nan, math.inf, [7], {"id": 7}, "\ud83d"):
        with pytest.raises(DataError):
            identifier(value)


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


def test_a_long_text_is_normalised_as_a_short_one():
    # A blank before, behind and on both sides of where pieces of the text meet, and one of blanks.
    for blanks in ("x ", " x", " \u3000 ", "\x1c\n", " " * 70_000):
        for shift in range(4):
            text = "a" * (2**16 - shift) + blanks + "b \n" * 40_000 + "e\u0301"
            assert normalise(text) == " ".join(unicodedata.normalize("NFC", text).split())


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
