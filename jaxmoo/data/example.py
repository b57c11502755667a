"""One training or evaluation example: a conversation that ends with a reply, or plain text."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxmoo.errors import DataError, shown

ROLES = ("system", "user", "assistant", "tool")
# Of one text: far beyond every context, and far below what makes reading it slow or memory short.
MOST_CHARACTERS = 10_000_000
# Is set into texts while they are tokenised; Unicode has no such character, so neither has a text.
MARK = "\ufdd0"
# What a message may say beside its text: to leave it out is to learn, or be given, something else.
_CONTENT = {
    *("tool_calls", "function_call", "functions", "tools", "documents", "tool_plan"),
    *("tool_responses", "tool_results", "reasoning_content", "reasoning", "reasoning_details"),
    *("thinking", "thinking_blocks", "thoughts", "thought", "refusal"),
    *("audio", "image", "images", "video", "videos"),
}
# What says of a reply whether and how it is learnt, and the value that says: as any other.
_HOW_LEARNT = {
    **{"weight": 1, "loss_weight": 1, "loss": True, "train": True, "training": True},
    **{"trainable": True, "prefix": False, "partial": False},
}
# What tells apart messages that say the same.
_IDENTIFIERS = {"id", "tool_call_id", "message_id", "parent_id", "turn_identifier", "timestamp"}
_DEEPEST = 100
_PIECE = 2**16
_BLANKS = re.compile(r"\s+")


def normalise(text: str) -> str:
    """Return text in the form in which two texts are compared.

    Unicode normal form C and every run of white space as one blank. Letter case and punctuation
    stay, because they can carry the difference between two prompts.

    Args:
      text: any text.

    Returns:
      The normalised text.

    Example:
      >>> normalise("  Cafe\\u0301   noir\\n") == "Caf\\u00e9 noir"
      True
    """
    text = unicodedata.normalize("NFC", text)
    if len(text) <= _PIECE:
        return " ".join(text.split())
    # In pieces: a list of all words would take twenty times the text.
    pieces = (text[at : at + _PIECE] for at in range(0, len(text), _PIECE))
    text = "".join(_BLANKS.sub(" ", piece) for piece in pieces)
    while "  " in text:  # where pieces met
        text = text.replace("  ", " ")
    return text.strip(" ")


def checked_text(value: Any) -> str:
    """Return a text as it is, white space at its ends included.

    An indent is part of a program, and U+3000 begins a Japanese paragraph. White space alone is no
    text, and becomes the empty one.

    Args:
      value: what a record holds in its text column.

    Returns:
      The text.

    Raises:
      DataError: the value is no text (a number would be one only as it happens to be written), is
        longer than `MOST_CHARACTERS`, or holds half of a surrogate pair, which no UTF-8 text can.

    Example:
      >>> checked_text("    return 72\\n"), checked_text(" \\n")
      ('    return 72\\n', '')
    """
    if not isinstance(value, str):
        hint = ". Write numbers in quotes" if type(value) in (int, float) else ""
        raise DataError(f"expected text, found {type(value).__name__} {shown(value)}{hint}")
    if len(value) > MOST_CHARACTERS:
        raise DataError(
            f"expected at most {MOST_CHARACTERS:,} characters of text, found {len(value):,}: "
            f"{shown(value)}. Divide it"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"text is not valid Unicode ({error.reason}): {shown(value)}") from None
    if MARK in value:
        raise DataError(f"text with U+FDD0, which is no character: {shown(value)}")
    return "" if value.isspace() else value


def identifier(value: Any) -> str | None:
    """Return a group's id, or a language's name, by which it is compared.

    Args:
      value: what a record holds in that column: a text or a whole number.

    Returns:
      The same for all that mean the same: 7, 7.0, "7" and " 7.0 "; None for null and for a text
      that is empty, as the cells of a CSV file are.

    Raises:
      DataError: it is something else.

    Example:
      >>> identifier(7.0), identifier("07"), identifier("")
      ('7', '07', None)
    """
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        found = f"{type(value).__name__} {shown(value)}"
        raise DataError(f"expected a text or a whole number that names it, found {found}")
    text = normalise(checked_text(str(value)))
    return re.sub(r"^(-?[0-9]+)\.0+$", r"\1", text) or None


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    # Parquet has every key in every message, and templates print a null as "None".
    return {key: value for key, value in message.items() if value is not None}


def _empty(value: Any) -> bool:
    return isinstance(value, list | tuple | Mapping) and not value


def _checked_json(value: Any, depth: int = 0) -> None:
    """Raise `DataError` unless a value is what JSON holds, no deeper than templates need."""
    if depth > _DEEPEST:
        raise DataError(f"nested more than {_DEEPEST} deep")
    if isinstance(value, str):
        checked_text(value)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            checked_text(key)
            _checked_json(part, depth + 1)
    elif isinstance(value, list | tuple):
        for part in value:
            _checked_json(part, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{value} is no number that JSON has")
    elif value is not None and not isinstance(value, bool | int | float):
        raise DataError(f"{type(value).__name__} {shown(value)} is nothing that JSON has")


def _text_of_content(content: Any) -> str:
    """Return a message's text: a string, or the text of its parts, joined."""
    if not isinstance(content, list | tuple) or not all(isinstance(p, Mapping) for p in content):
        return checked_text(content)
    texts = []
    for number, part in enumerate(map(_without_nulls, content)):
        if part.get("type") != "text" or set(part) != {"type", "text"}:
            raise DataError(
                f"content part {number}: expected type 'text' and a text, found type "
                f"{shown(part.get('type'))} with {listed(part)}. Only text can be learnt"
            )
        texts.append(checked_text(part["text"]))
    return checked_text("".join(texts))


def listed(names: Iterable[Any], most: int = 20) -> str:
    """Return names of a record's columns or keys, or what a table has, for an error."""
    first = list(itertools.islice(names, most + 1))
    return ", ".join(shown(str(name)[:60])[1:-1] for name in first[:most]) + ", ..." * (
        len(first) > most
    )


@dataclass(frozen=True)
class Example:
    """A conversation in one language whose last message is the assistant's reply, or a text.

    Attributes:
      language: the language's code, such as ``"pt"``.
      messages: chat messages ``{"role": ..., "content": ...}``, the last of role ``assistant``;
        none for plain text. What else a message has (``tool_calls``, ``name``, ...) is for the
        chat template.
      group: an identifier shared by examples that must stay on the same side of the held-out
        split (parallel translations of one sentence, say), or None.
      text: plain text, all of which is learnt; None for a conversation.
      choices: texts that the reply is chosen from, where an evaluation asks for it.
      tools: descriptions of tools, for the chat template.
      place: where it was found, "data/en.jsonl:12"; nothing that examples differ by.
      source: which of several sources it is from; likewise.
      preset: whether the first message is a system message that is not the example's own, but
        comes before all; it tells no examples apart, so that the same are held out without it.

    Example:
      >>> example = Example.from_pair("it", "Ciao!", "Ciao, come stai?")
      >>> example.prompt, example.reply
      ('Ciao!', 'Ciao, come stai?')
    """

    language: str
    messages: tuple[Mapping[str, Any], ...]
    group: str | None = None
    text: str | None = None
    choices: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    place: str = field(default="", compare=False)
    source: int = field(default=0, compare=False)
    preset: bool = False

    @classmethod
    def from_text(
        cls, language: str, text: Any, *, group: str | None = None, place: str = ""
    ) -> Example:
        """Build an example of plain text.

        Args:
          language: the language's code.
          text: the text.
          group: what it belongs to; see the class.
          place: where it comes from, for errors.

        Returns:
          The example.

        Raises:
          DataError: it is not text, or empty.
        """
        text = checked_text(text)
        if not text:
            raise DataError("expected text, found none")
        return cls(language, (), group, text, place=place)

    @classmethod
    def from_pair(
        cls,
        language: str,
        prompt: Any,
        reply: Any,
        *,
        group: str | None = None,
        place: str = "",
    ) -> Example:
        """Build an example of one user turn and one assistant turn.

        Args:
          language: the language's code.
          prompt: the user's text.
          reply: the assistant's text.
          group: what it belongs to; see the class.
          place: where it comes from, for errors.

        Returns:
          The example.

        Raises:
          DataError: prompt or reply is not text.
        """
        return cls.from_messages(
            language,
            ({"role": "user", "content": prompt}, {"role": "assistant", "content": reply}),
            group=group,
            place=place,
        )

    @classmethod
    def from_messages(
        cls,
        language: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        group: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        place: str = "",
    ) -> Example:
        """Build an example from chat messages.

        Messages after the last assistant turn are dropped: nothing follows them to learn from.

        Args:
          language: the language's code.
          messages: mappings with ``role``, ``content`` (a text, or parts of type ``text``, which
            are joined) and whatever else the chat template reads; a key whose value is null or an
            empty list or mapping is as absent. A turn with ``tool_calls`` needs no content.
          group: what it belongs to; see the class.
          tools: what the assistant may call, as the chat template reads it.
          place: where it comes from, for errors.

        Returns:
          The example.

        Raises:
          DataError: a message lacks role or content, has an unknown role or no text, or no
            assistant turn follows another message.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise DataError(f"expected a list of messages, found {type(messages).__name__}")
        kept = [_checked_message(number, message) for number, message in enumerate(messages)]
        while kept and kept[-1]["role"] != "assistant":
            kept.pop()
        if len(kept) < 2:
            raise DataError(
                "expected at least one message and then an assistant's reply, found roles "
                f"{listed(message['role'] for message in messages) or 'none'}"
            )
        try:
            tools = tuple(tools)
            _checked_json(tools)
        except DataError as error:
            raise DataError(f"tools: {error}") from None
        return cls(language, tuple(kept), group, tools=tools, place=place)

    def after_system(self, text: str) -> Example:
        """Return the example behind a system message, unless that is empty or it has its own.

        Raises:
          DataError: it is plain text.

        Example:
          >>> example = Example.from_pair("en", "Hi", "Hello").after_system("Be brief.")
          >>> [message["role"] for message in example.messages], example.prompt_key
          (['system', 'user', 'assistant'], 'user:Hi')
        """
        if self.text is not None:
            raise DataError("plain text has no system message: data.system is for conversations")
        text = checked_text(text)
        if not text or self.messages[0]["role"] == "system":
            return self
        messages = ({"role": "system", "content": text}, *self.messages)
        return dataclasses.replace(self, messages=messages, preset=True)

    @property
    def prompt(self) -> str:
        """The text of every message before the reply, one per line."""
        return "\n".join(message["content"] for message in self.messages[:-1])

    @property
    def _own(self) -> tuple[Mapping[str, Any], ...]:
        return self.messages[1:] if self.preset else self.messages

    @property
    def characters(self) -> int:
        """Length of all its texts together, but for a system message that is not its own."""
        return sum(len(m["content"]) for m in self._own) if self.text is None else len(self.text)

    @property
    def reply(self) -> str:
        """The text of the last assistant turn, or the plain text."""
        return self.messages[-1]["content"] if self.text is None else self.text

    @property
    def says_more(self) -> bool:
        """Whether the last assistant turn has more than its text, such as calls of tools."""
        return bool(self.messages) and any(says(self.messages[-1], key) for key in _CONTENT)

    @property
    def prompt_key(self) -> str:
        """What is given: role and normalised text of every message before the reply.

        Nothing is given of a plain text; its key is the text, so that texts differ by it.
        """
        if self.text is not None:
            return f"text:{normalise(self.text)}"
        given = [f"{m['role']}:{normalise(m['content'])}{_rest(m)}" for m in self._own[:-1]]
        return "\x1f".join(
            [*given, json.dumps(self.tools, sort_keys=True)] if self.tools else given
        )

    @property
    def key(self) -> tuple[str, str]:
        """What makes two examples duplicates: prompt and reply, normalised."""
        rest = _rest(self.messages[-1]) if self.messages else ""
        return self.prompt_key, normalise(self.reply) + rest

    def error(self, what: object) -> DataError:
        """Return an error that names the example by its place, or else by its language."""
        return DataError(f"{self.place or f'Language {self.language!r}'}: {what}")


def says(message: Mapping[str, Any], key: str) -> bool:
    """Return whether a message would be learnt otherwise, or another be given, without a key.

    Keys that only identify a message, or are about it, say nothing, as a weight of 1 does.

    Example:
      >>> message = {"role": "assistant", "content": "Hi!", "id": 7, "weight": 0, "tool_calls": []}
      >>> [key for key in message if says(message, key)]
      ['weight']
    """
    if key in _HOW_LEARNT:
        asked = message.get("role") == "assistant" and key in message
        return asked and message[key] != _HOW_LEARNT[key]
    return key in _CONTENT and bool(message.get(key))


def _rest(message: Mapping[str, Any]) -> str:
    """What a message has beside role and content that tells it from others, in one form."""
    left_out = {"role", "content"} | _IDENTIFIERS
    left_out |= {key for key in _HOW_LEARNT if not says(message, key)}
    rest = {key: value for key, value in message.items() if key not in left_out}
    return f"\x1e{json.dumps(rest, sort_keys=True)}" if rest else ""


def _checked_message(number: int, message: Any) -> dict[str, Any]:
    """One message of a record without nulls, with its content as one text."""
    if not isinstance(message, Mapping):
        found = type(message).__name__
        raise DataError(f"message {number}: expected role and content, found {found}")
    # Some templates ask whether there are calls at all, not how many.
    present = {k: v for k, v in _without_nulls(message).items() if k == "content" or not _empty(v)}
    calls = present.get("role") == "assistant" and present.get("tool_calls")
    if "role" not in message or not ("content" in message or calls):
        found = listed(sorted(map(str, message)))
        raise DataError(f"message {number}: expected role and content, found [{found}]")
    role = message["role"]
    if role not in ROLES:
        raise DataError(
            f"message {number}: expected a role of {', '.join(ROLES)}, found {shown(role)}"
        )
    rest = {key: present[key] for key in present if key not in ("role", "content")}
    try:
        content = "" if calls and "content" not in present else _text_of_content(message["content"])
        _checked_json(rest)
    except DataError as error:
        raise DataError(f"message {number} ({role}): {error}") from None
    return {"role": role, "content": content, **rest}
