"""Conversations as a chat template writes them, and where the replies lie in the text.

Everything that needs to know where a reply begins or ends asks `locate`: training, likelihoods,
choices and generation. A reply is never searched for. It is what is left of the rendered text when
what the template writes before and after it is taken away, and that is known from the same
conversation with a placeholder in the reply's place.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from jaxmoo.data.example import Example
from jaxmoo.data.template import ChatTemplate
from jaxmoo.errors import DataError

Messages = Sequence[Mapping[str, Any]]

# The most characters of a reply that a generation prompt may hold, such as "<think>\n".
_OPENING = 64


class Turn(NamedTuple):
    """Where one reply lies in a rendered conversation; all but the prompt in characters.

    Attributes:
      prompt: the conversation before it with the generation prompt: what a model is given.
      start: where what the message itself says begins. Between the prompt and here lies what the
        template puts before any reply, such as empty thoughts.
      end: where it ends.
      limit: where what ends the turn ends at the latest, and the next message begins.
      uneven: whether the turn is rendered otherwise than it would be as the last one.
    """

    prompt: str
    start: int
    end: int
    limit: int
    uneven: bool


class Conversation(NamedTuple):
    """An example as its template renders it.

    Attributes:
      example: the example.
      text: the rendered conversation.
      turns: the replies that are learnt, in order.
      marked: where what the template marks as generated (``{% generation %}``) begins and ends, in
        characters.
    """

    example: Example
    text: str
    turns: list[Turn]
    marked: list[tuple[int, int]]


def locate(example: Example, template: ChatTemplate) -> Conversation:
    """Render a conversation and say where the replies lie that are learnt.

    These are the assistant turns that follow another message and say something: nothing leads to a
    first message, and an empty turn teaches nothing but to stop.

    Args:
      example: a conversation; no plain text.
      template: renders it.

    Raises:
      DataError: naming the place, when the template cannot render the conversation or leaves out
        something of it, its generation prompt is not how a reply begins, or it changes what a reply
        says.
    """

    def render(messages: Messages, **options: Any) -> str:
        return template.render(messages, example.tools, place=example.place, **options).text

    messages = example.messages
    text, marked = template.render(messages, example.tools, place=example.place)
    _check_shown(example, template, text)
    conversation = Conversation(example, text, [], marked)
    for at, message in enumerate(messages):
        if at and message["role"] == "assistant" and _says_something(message):
            holder = _placeholder(messages)
            prompt = render(messages[:at], add_generation_prompt=True)
            around = render([*messages[:at], _bare(holder), *messages[at + 1 :]]).split(holder)
            # What follows an inner turn is told apart from it by rendering up to it.
            ended = render(messages[: at + 1]) if at + 1 < len(messages) else text
            conversation.turns.append(_turn(conversation, message, prompt, around, ended))
    return conversation


def _check_shown(example: Example, template: ChatTemplate, text: str) -> None:
    """Raise where the template would render a conversation just so without something it has."""
    messages, tools = example.messages, example.tools

    def seen(with_it: str | Messages, without: Messages, tools: Messages = tools) -> bool:
        try:
            if not isinstance(with_it, str):
                with_it = template.render(with_it, tools).text
            return template.render(without, tools).text != with_it
        except DataError:
            return True  # the template misses it

    def refuse(what: str) -> NoReturn:
        raise DataError(
            f"{_placed(example)}the chat template shows nothing of {what}. Give one that does "
            "(data.chat_template), or take it out of the data."
        )

    if tools and not seen(text, messages, ()):
        refuse("the record's tools")
    for key, at in _beside(messages).items():
        without = [{k: v for k, v in message.items() if k != key} for message in messages]
        # Some templates show the thoughts of a reply only as long as it is the last one.
        if not seen(text, without) and not seen(messages[: at + 1], without[: at + 1]):
            refuse(f"{key!r} in message {at} ({messages[at]['role']})")
    for at, message in enumerate(messages):
        if message["content"].strip() not in text:
            without = [*messages[:at], {**message, "content": ""}, *messages[at + 1 :]]
            if not seen(text, without):
                refuse(f"the content of message {at} ({message['role']})")


def _beside(messages: Messages) -> dict[str, int]:
    """What messages have beside role and content, and the first that has it."""
    found: dict[str, int] = {}
    for at, message in enumerate(messages):
        for key, value in message.items():
            # A weight of 0 says something, an empty list of calls nothing.
            if key not in ("role", "content") and value not in ("", [], (), {}):
                found.setdefault(key, at)
    return found


def not_a_prefix(conversation: Conversation, turn: Turn) -> DataError:
    """The error that a generation prompt is not how the rendered conversation goes."""
    return _no_prefix(conversation, turn.prompt, conversation.text[turn.start : turn.end])


def no_end(conversation: Conversation, turn: Turn) -> DataError:
    """The error that nothing tells where a turn ends."""
    reply = conversation.text[turn.start : turn.end]
    return DataError(
        f"{_described(conversation.example, reply)}: cannot tell where this turn ends, for the "
        "chat template renders it otherwise when others follow. Give a template "
        "(data.chat_template) that does not, or that marks replies with {% generation %}."
    )


def _turn(
    conversation: Conversation,
    message: Mapping[str, Any],
    prompt: str,
    around: Sequence[str],
    ended: str,
) -> Turn:
    """One turn.

    Args:
      conversation: the whole.
      message: the reply.
      prompt: the conversation before it, with the generation prompt.
      around: the whole with a placeholder for the reply, split there.
      ended: the conversation up to it.
    """
    text, reply = conversation.text, str(message["content"])
    described = _described(conversation.example, reply)
    if not text.startswith(prompt):
        raise _no_prefix(conversation, prompt, reply)
    if len(around) != 2:
        how = "its text is left out, or found only in a later turn"
        raise DataError(
            f"{described}: expected the chat template to render the reply as it is and once, but "
            f"{how if len(around) < 2 else f'its text is found {len(around) - 1} times'}."
        )
    before, after = around
    start, end = len(before), len(text) - len(after)
    expected = _trimmed(reply)
    if start < len(prompt) or not text.startswith(before):
        # The template looks into a reply, as those do that find thoughts in it, or the prompt says
        # how a reply begins, as with an opened thought: the rest comes behind the prompt.
        start = len(prompt)
        expected |= {one[at:] for one in expected for at in _overlaps(prompt, one)}
    said = text[start:end]
    alone = set(message) == {"role", "content"}
    if not (said and text.endswith(after)) or (alone and said not in expected):
        raise DataError(
            f"{described}: expected the chat template to render the reply as it is, found "
            f"{text[len(prompt) :][:60]!r}."
        )
    # Some templates render a turn otherwise once another follows; then only a special token ends
    # it.
    shared = len(ended) if text.startswith(ended) else _shared(text, ended)
    uneven = shared < end
    return Turn(prompt, start, end, len(text) if uneven else shared, uneven)


def _overlaps(prompt: str, reply: str) -> list[int]:
    """How many characters of a reply the end of the prompt may already say."""
    return [at for at in range(1, min(len(reply), _OPENING)) if prompt.endswith(reply[:at])]


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _says_something(message: Mapping[str, Any]) -> bool:
    return any(value for key, value in message.items() if key != "role")


def _bare(content: str) -> dict[str, str]:
    """A reply that says this and nothing else."""
    return {"role": "assistant", "content": content}


def _placeholder(messages: Messages) -> str:
    """A text that no message holds, and that no template changes: of characters without meaning."""
    said = json.dumps([*map(dict, messages)], ensure_ascii=False, default=str)
    holders = (f"\ue000{number}\ue001" for number in itertools.count())
    return next(one for one in holders if one not in said)


def _trimmed(text: str) -> set[str]:
    """What templates make of a text that take white space from its ends."""
    return {text, text.strip(), text.lstrip(), text.rstrip()}


def _no_prefix(conversation: Conversation, prompt: str, reply: str) -> DataError:
    text = conversation.text
    return DataError(
        f"{_described(conversation.example, reply)}: expected the rendered prompt to be a prefix "
        f"of the rendered conversation, token by token; found a prompt that ends in "
        f"{prompt[-40:]!r} and a conversation that goes on as "
        f"{text[max(len(prompt) - 20, 0) :][:60]!r}. The chat template does not suit training "
        "on replies: give one (data.chat_template) whose generation prompt is how a reply begins."
    )


def _described(example: Example, reply: str) -> str:
    return f"{_placed(example)}reply {reply[:40]!r}"


def _placed(example: Example) -> str:
    return f"{example.place}: " if example.place else f"Language {example.language!r}, "
