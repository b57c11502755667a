"""Conversations as a chat template writes them, and where the replies lie in the text.

Everything that needs to know where a reply begins or ends asks `locate`: training, likelihoods,
choices and generation. A reply is never searched for. It is what is left of the rendered text when
what the template writes before and after it is taken away, and that is known from the same
conversation with a placeholder in the reply's place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from jaxmoo.data.example import Example, says
from jaxmoo.data.tokenization.template import ChatTemplate
from jaxmoo.errors import DataError

Messages = Sequence[Mapping[str, Any]]

# The most characters of a reply that a generation prompt may hold, such as "<think>\n".
_OPENING = 64
# What a prompt may say of thoughts: their beginning, or that there are none.
_OPENED = re.compile(r"<think>\s*(</think>\s*)?\Z")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


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
      ignored: keys of messages that the template shows nothing of, and that say nothing to learn.
    """

    example: Example
    text: str
    turns: list[Turn]
    marked: list[tuple[int, int]]
    ignored: tuple[str, ...] = ()


def locate(example: Example, template: ChatTemplate) -> Conversation:
    """Render a conversation and say where the replies lie that are learnt.

    These are the assistant turns that follow another message and say something: nothing leads to a
    first message, and an empty turn teaches nothing but to stop. Keys of messages that only
    identify them, or are about them, need not be shown; the conversation is then as without them.

    Args:
      example: a conversation; no plain text.
      template: renders it.

    Raises:
      DataError: the template cannot render the conversation or leaves out something of it, its
        generation prompt is not how a reply begins, or it changes what a reply says.
    """

    def render(messages: Messages, **options: Any) -> str:
        return template.render(messages, example.tools, **options).text

    text, marked = template.render(example.messages, example.tools)
    ignored = _ignored(example, template, text)
    messages = [_without(message, *ignored) for message in example.messages]
    conversation = Conversation(
        dataclasses.replace(example, messages=tuple(messages)), text, [], marked, ignored
    )
    holder = _placeholder(messages)
    for at, message in enumerate(messages):
        if at and message["role"] == "assistant" and _says_something(message):
            before, after, held = messages[:at], messages[at + 1 :], _bare(holder)
            prompt = render(before, add_generation_prompt=True)
            around = render([*before, held, *after]).split(holder)
            # What follows an inner turn is told apart from it by rendering up to it.
            ended = render([*before, message]) if after else text
            kept = None
            if after and _is_text_alone(message) and (thought := _thought(message["content"])):
                # Thoughts may be left out if the template shows them as long as the reply is last.
                last = conversation._replace(text=ended)
                with contextlib.suppress(DataError):
                    _turn(last, message, prompt, render([*before, held]).split(holder), ended)
                    kept = thought[1]
            conversation.turns.append(_turn(conversation, message, prompt, around, ended, kept))
    return conversation


def _ignored(example: Example, template: ChatTemplate, text: str) -> tuple[str, ...]:
    """Keys that a template shows nothing of; raises where something is said by what it hides."""
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
            f"the chat template shows nothing of {what}. Give one that does (data.chat_template), "
            "or take it out of the data."
        )

    if tools and not seen(text, messages, ()):
        refuse("the record's tools")
    beside = _beside(messages)

    def hidden(*keys: str) -> bool:
        without = [_without(message, *keys) for message in messages]
        # Some templates show the thoughts of a reply only as long as it is the last one.
        ends = {beside[key] + 1 for key in keys}
        return not seen(text, without) and not any(
            seen(messages[:end], without[:end]) for end in ends
        )

    # All at once, which is faster, or if some are shown, one by one.
    ignored = [key for key, at in beside.items() if not says(messages[at], key)]
    if not (ignored and hidden(*ignored)):
        ignored = []
    messages = [_without(message, *ignored) for message in messages]
    for key, at in beside.items():
        if key not in ignored and hidden(key):
            if says(messages[at], key):
                refuse(f"{key!r} in message {at} ({messages[at]['role']})")
            ignored.append(key)
            messages = [_without(message, key) for message in messages]
    for at, message in enumerate(messages):
        if message["content"].strip() not in text:
            without = [*messages[:at], {**message, "content": ""}, *messages[at + 1 :]]
            if not seen(text, without):
                refuse(f"the content of message {at} ({message['role']})")
    return tuple(ignored)


def _without(message: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in keys}


def _beside(messages: Messages) -> dict[str, int]:
    """What messages have beside role and content, and the first that says something by it.

    Of keys by which none does it is the first that has them.
    """
    found: dict[str, int] = {}
    for at, message in enumerate(messages):
        for key, value in message.items():
            # A weight of 0 says something, an empty list of calls nothing.
            if key not in ("role", "content") and value not in ("", [], (), {}):
                first = found.setdefault(key, at)
                if says(message, key) and not says(messages[first], key):
                    found[key] = at
    return found


def not_a_prefix(conversation: Conversation, turn: Turn) -> DataError:
    """The error that a generation prompt is not how the rendered conversation goes."""
    return _no_prefix(conversation.text, turn.prompt, conversation.text[turn.start : turn.end])


def no_end(conversation: Conversation, turn: Turn) -> DataError:
    """The error that nothing tells where a turn ends."""
    reply = conversation.text[turn.start : turn.end]
    return DataError(
        f"reply {reply[:40]!r}: cannot tell where this turn ends, for the "
        "chat template renders it otherwise when others follow. Give a template "
        "(data.chat_template) that does not, or that marks replies with {% generation %}."
    )


def _turn(
    conversation: Conversation,
    message: Mapping[str, Any],
    prompt: str,
    around: Sequence[str],
    ended: str,
    kept: str | None = None,
) -> Turn:
    """One turn.

    Args:
      conversation: the whole.
      message: the reply.
      prompt: the conversation before it, with the generation prompt.
      around: the whole with a placeholder for the reply, split there.
      ended: the conversation up to it.
      kept: what may stand for the reply, where thoughts are left out once others follow.
    """
    text, reply = conversation.text, str(message["content"])
    if not text.startswith(prompt):
        raise _no_prefix(text, prompt, reply)
    if len(around) != 2:
        how = "its text is left out, or found only in a later turn"
        raise DataError(
            f"reply {reply[:40]!r}: expected the chat template to render the reply as it is and "
            f"once, but {how if len(around) < 2 else f'its text is found {len(around) - 1} times'}."
        )
    before, after = around
    start, end = len(before), len(text) - len(after)
    # Where the reply may begin, and what has said already how it does. If not where the placeholder
    # did, the template looks into a reply, as those do that find thoughts in it, or the prompt says
    # how a reply begins, as with an opened thought: the rest comes behind the prompt.
    starts = {start: ""} if start >= len(prompt) and text.startswith(before) else {}
    if start not in starts or start != len(prompt) or _thought(reply):
        starts[len(prompt)] = prompt
    alone = _is_text_alone(message)
    start = next(
        (at for at, given in starts.items() if not alone or _is_reply(text[at:end], reply, given)),
        None,
    )
    dropped = False
    if start is None and kept is not None:
        dropped = True
        start = next((at for at in starts if text[at:end] in _trimmed(kept)), None)
    if start is None or start >= end or not text.endswith(after):
        raise DataError(
            f"reply {reply[:40]!r}: expected the chat template to render the reply as it is, found "
            f"{text[len(prompt) :][:60]!r}."
        )
    # Some templates render a turn otherwise once another follows; then only a special token ends
    # it.
    shared = len(ended) if text.startswith(ended) else _shared(text, ended)
    uneven = dropped or shared < end
    return Turn(prompt, start, end, len(text) if uneven else shared, uneven)


def _is_reply(said: str, reply: str, prompt: str) -> bool:
    """Whether a template has rendered a reply, but for white space at its ends and its thoughts'.

    Args:
      said: what it has rendered.
      reply: the reply.
      prompt: what comes before, if it may say how the reply begins.
    """
    expected = _trimmed(reply)
    if said in expected or any(said == r[at:] for r in expected for at in _overlaps(prompt, r)):
        return True
    opened, thought = _OPENED.search(prompt), _thought(reply)
    begun = opened[0] if opened else ""
    return thought is not None and thought in (_thought(said), _thought(begun + said))


def _thought(text: str) -> tuple[str, str] | None:
    """The thought that a text begins with and what follows, without white space around them."""
    found = _THOUGHT.fullmatch(text)
    return (found[1].strip(), found[2].strip()) if found else None


def _overlaps(prompt: str, reply: str) -> list[int]:
    """How many characters of a reply the end of the prompt may already say."""
    return [at for at in range(1, min(len(reply), _OPENING)) if prompt.endswith(reply[:at])]


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _says_something(message: Mapping[str, Any]) -> bool:
    return any(value for key, value in message.items() if key != "role")


def _is_text_alone(message: Mapping[str, Any]) -> bool:
    return set(message) == {"role", "content"}


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


def _no_prefix(text: str, prompt: str, reply: str) -> DataError:
    return DataError(
        f"reply {reply[:40]!r}: expected the rendered prompt to be a prefix "
        f"of the rendered conversation, token by token; found a prompt that ends in "
        f"{prompt[-40:]!r} and a conversation that goes on as "
        f"{text[max(len(prompt) - 20, 0) :][:60]!r}. The chat template does not suit training "
        "on replies: give one (data.chat_template) whose generation prompt is how a reply begins."
    )
