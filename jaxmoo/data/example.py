"""One training or evaluation example: a conversation that ends with a reply, or plain text."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxmoo.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


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
    return " ".join(unicodedata.normalize("NFC", text).split())


def clean_text(value: Any) -> str:
    """Return a message's text: a string or a number, without white space at its ends.

    White space at the ends of a turn is an artefact of the file it came from, and most chat
    templates trim it anyway.

    Args:
      value: what a record holds in its text column.

    Returns:
      The text.

    Raises:
      DataError: the value is neither text nor a number, or holds half of a surrogate pair, which
        no UTF-8 text can hold.

    Example:
      >>> clean_text(" 72\\n"), clean_text(72)
      ('72', '72')
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"expected text, found {type(value).__name__} {str(value)[:60]!r}")
    text = str(value).strip()
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"text is not valid Unicode ({error.reason}): {text[:60]!r}") from None
    return text


@dataclass(frozen=True)
class Example:
    """A conversation in one language whose last message is the assistant's reply, or a text.

    Attributes:
      language: the language's code, such as ``"pt"``.
      messages: chat messages ``{"role": ..., "content": ...}``, the last of role ``assistant``;
        none for plain text.
      group: an identifier shared by examples that must stay on the same side of the held-out
        split (parallel translations of one sentence, say), or None.
      text: plain text, all of which is learnt; None for a conversation.
      choices: texts that the reply is chosen from, where an evaluation asks for it.

    Example:
      >>> example = Example.from_pair("it", "Ciao!", "Ciao, come stai?")
      >>> example.prompt, example.reply
      ('Ciao!', 'Ciao, come stai?')
    """

    language: str
    messages: tuple[Mapping[str, str], ...]
    group: str | None = None
    text: str | None = None
    choices: tuple[str, ...] = ()

    @classmethod
    def from_text(cls, language: str, text: Any, *, group: str | None = None) -> Example:
        """Build an example of plain text.

        Args:
          language: the language's code.
          text: the text.
          group: see the class.

        Returns:
          The example.

        Raises:
          DataError: it is not text, or empty.
        """
        cleaned = clean_text(text)
        if not cleaned:
            raise DataError("expected text, found none")
        return cls(language, (), group, cleaned)

    @classmethod
    def from_pair(
        cls, language: str, prompt: Any, reply: Any, *, group: str | None = None
    ) -> Example:
        """Build an example of one user turn and one assistant turn.

        Args:
          language: the language's code.
          prompt: the user's text.
          reply: the assistant's text.
          group: see the class.

        Returns:
          The example.

        Raises:
          DataError: prompt or reply is not text.
        """
        return cls.from_messages(
            language,
            ({"role": "user", "content": prompt}, {"role": "assistant", "content": reply}),
            group=group,
        )

    @classmethod
    def from_messages(
        cls, language: str, messages: Sequence[Mapping[str, Any]], *, group: str | None = None
    ) -> Example:
        """Build an example from chat messages.

        Messages after the last assistant turn are dropped: nothing follows them to learn from.

        Args:
          language: the language's code.
          messages: mappings with ``role`` and ``content``.
          group: see the class.

        Returns:
          The example.

        Raises:
          DataError: a message lacks role or content, has an unknown role or no text, or no
            assistant turn follows another message.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise DataError(f"expected a list of messages, found {type(messages).__name__}")
        kept = []
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                found = sorted(message) if isinstance(message, Mapping) else type(message).__name__
                raise DataError(f"message {number}: expected role and content, found {found}")
            if message["role"] not in ROLES:
                raise DataError(
                    f"message {number}: expected a role of {', '.join(ROLES)}, "
                    f"found {message['role']!r}"
                )
            try:
                kept.append({"role": message["role"], "content": clean_text(message["content"])})
            except DataError as error:
                raise DataError(f"message {number} ({message['role']}): {error}") from None
        while kept and kept[-1]["role"] != "assistant":
            kept.pop()
        if len(kept) < 2:
            raise DataError(
                "expected at least one message and then an assistant's reply, found roles "
                f"{[message['role'] for message in messages]}"
            )
        return cls(language, tuple(kept), group)

    @property
    def prompt(self) -> str:
        """The text of every message before the reply, one per line."""
        return "\n".join(message["content"] for message in self.messages[:-1])

    @property
    def reply(self) -> str:
        """The text of the last assistant turn, or the plain text."""
        return self.messages[-1]["content"] if self.text is None else self.text

    @property
    def prompt_key(self) -> str:
        """What is given: role and normalised text of every message before the reply.

        Nothing is given of a plain text; its key is the text, so that texts differ by it.
        """
        if self.text is not None:
            return f"text:{normalise(self.text)}"
        return "\x1f".join(f"{m['role']}:{normalise(m['content'])}" for m in self.messages[:-1])

    @property
    def key(self) -> tuple[str, str]:
        """What makes two examples duplicates: prompt and reply, normalised."""
        return self.prompt_key, normalise(self.reply)
