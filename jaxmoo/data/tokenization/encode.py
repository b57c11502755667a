"""Tokenizers run as what they are: programs from elsewhere, whose results are checked."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxmoo.data.example import MARK, Example
from jaxmoo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Characters that a normaliser may make of one; Unicode's own forms make at most 18.
_MOST_GROWTH = 1000
_BEGINNING = 250_000  # characters; what is longer is tokenised as far as it is needed
_MARGIN = 256  # tokens


class Encoded(NamedTuple):
    """A text as tokens.

    Attributes:
      text: the text, as far as it was tokenised.
      ids: its tokens.
      offsets: the first and behind the last character of each.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]


class Encoder:
    """Tokenises texts, and says what becomes of them.

    Args:
      tokenizer: a fast tokenizer.
      special_tokens: what is made of a text that spells a special token: ``text`` or ``tokens``.
      max_length: tokens that are needed of a text; None for all.

    Raises:
      DataError: the tokenizer gives no character offsets, or its normaliser makes endless texts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        special_tokens: str = "text",
        max_length: int | None = None,
    ):
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer "
                "(tokenizer.json) is needed."
            )
        self.tokenizer, self.as_text = tokenizer, special_tokens == "text"
        self._backend, self._needed = tokenizer.backend_tokenizer, max_length
        _check_growth(self._backend)
        added = tokenizer.added_tokens_decoder
        self.special = set(tokenizer.all_special_ids) | set(added)
        self._control = {number for number, token in added.items() if token.special}
        # One character cannot be told from itself, and white space is no forgery.
        spellings = {added[number].content for number in self._control}
        spellings = sorted((s for s in spellings if len(s) > 1 and s.strip()), key=len)
        self._spelling = re.compile("|".join(map(re.escape, spellings[::-1])) or "(?!)")

    def spelled(self, example: Example) -> list[str]:
        """Return the special tokens that an example's texts spell, every time."""
        found: list[str] = []
        for text in _texts([example.text, *example.messages, *example.tools]):
            found += self._spelling.findall(text)
        return found

    def marked(self, example: Example) -> Example:
        """Return a conversation with a mark in all that spells a special token, to stay text."""
        change = functools.partial(self._spelling.sub, lambda m: m[0][0] + MARK + m[0][1:])
        messages = tuple(_changed(message, change) for message in example.messages)
        tools = tuple(_changed(tool, change) for tool in example.tools)
        return dataclasses.replace(example, messages=messages, tools=tools)

    def encode(self, texts: Sequence[str], *, plain: bool = False) -> list[Encoded | DataError]:
        """Tokenise texts.

        Args:
          texts: the texts; what spells a special token and has the mark is no such token.
          plain: whether they are plain texts, to which the tokenizer may add tokens, and which have
            no special tokens of their own; else a template has written every one.

        Returns:
          For each text what it is as tokens, or why the tokenizer cannot say.
        """
        long = {number for number, text in enumerate(texts) if len(text) > _BEGINNING}
        odd = {n for n, t in enumerate(texts) if MARK in t or (plain and self._reads_special(t))}
        alone = odd | long
        usual = [n for n in range(len(texts)) if n not in alone]
        found = dict(zip(usual, self._usual([texts[n] for n in usual], plain), strict=True))
        for number in alone:
            one = functools.partial(self._odd if number in odd else self._one, plain=plain)
            try:
                found[number] = self._as_needed(one, texts[number])
            except DataError as error:
                found[number] = error
        return [found[number] for number in range(len(texts))]

    def _reads_special(self, text: str) -> bool:
        return self.as_text and self._spelling.search(text) is not None

    def _as_needed(self, encode: Callable[[str], Encoded], text: str) -> Encoded:
        """Tokenise a text, or so much of its beginning as has the tokens that are needed."""
        if self._needed is None:
            return encode(text)
        size = _BEGINNING
        while True:
            found = encode(text[:size])
            if size >= len(text) or len(found.ids) >= self._needed + _MARGIN:
                return found
            size *= 4

    def _usual(self, texts: Sequence[str], plain: bool) -> list[Encoded | DataError]:
        if not texts:
            return []
        try:
            encoded = self.tokenizer(
                list(texts),
                add_special_tokens=plain,
                return_attention_mask=False,
                return_offsets_mapping=True,
                verbose=False,
            )
        except BaseException as error:
            failure = _failure(error, texts[0])
            if len(texts) > 1:
                return [one for text in texts for one in self._usual([text], plain)]
            return [failure]
        columns = (texts, encoded["input_ids"], encoded["offset_mapping"])
        return [Encoded(*one) for one in zip(*columns, strict=True)]

    def _one(self, text: str, plain: bool) -> Encoded:
        (found,) = self._usual([text], plain)
        return given(found)

    def _odd(self, text: str, plain: bool) -> Encoded:
        if plain:
            return Encoded(text, *self._as_plain_text(text, add_special_tokens=True))
        # Special tokens that the template has written are found beside the marked ones, which are
        # none. What lies between two of them is tokenised anew if it has a mark.
        first = self._one(text, plain=False)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        edges = [n for n, number in enumerate(first.ids) if number in self._control]
        behind, start = 0, 0
        for edge in [*edges, len(first.ids)]:
            end = first.offsets[edge][0] if edge < len(first.ids) else len(text)
            part = text[behind:end]
            if MARK in part:
                some = self._between(part, first=behind == 0)
                ids += some[0]
                offsets += [(behind + a, behind + b) for a, b in some[1]]
            else:
                ids += first.ids[start:edge]
                offsets += first.offsets[start:edge]
            if edge < len(first.ids):
                ids.append(first.ids[edge])
                offsets.append(first.offsets[edge])
                behind, start = first.offsets[edge][1], edge + 1
        return Encoded(text, ids, offsets)

    def _between(self, part: str, *, first: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of a part of a text without its marks, and where they lie in the part."""
        if not first and self._begins_otherwise:
            (spelled, *_) = self._spelling.findall(part.replace(MARK, ""))
            raise DataError(
                f"the text spells the special token {spelled!r}, which this tokenizer cannot "
                "read as text behind another token. Change the text, or let it be that token "
                "(data.special_tokens=tokens)."
            )
        ids, offsets = self._as_plain_text(part.replace(MARK, ""), add_special_tokens=False)
        places = np.flatnonzero([character != MARK for character in part]).tolist()
        return ids, [(places[a], places[b - 1] + 1) if b else (a, b) for a, b in offsets]

    def _as_plain_text(
        self, text: str, *, add_special_tokens: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        before = self._backend.encode_special_tokens
        self._backend.encode_special_tokens = True
        try:
            found = self._backend.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:
            raise _failure(error, text) from None
        finally:
            self._backend.encode_special_tokens = before
        return found.ids, found.offsets

    @functools.cached_property
    def _begins_otherwise(self) -> bool:
        """Whether a text by itself has other tokens than behind a special one."""
        token = next(iter(self._control))
        behind = self._one(self.tokenizer.added_tokens_decoder[token].content + "a", plain=False)
        return behind.ids[1:] != self._one("a", plain=False).ids


def given(found: Encoded | DataError) -> Encoded:
    """Return what a text is as tokens, or raise why the tokenizer cannot say."""
    if isinstance(found, DataError):
        raise found
    return found


def _failure(error: BaseException, text: str) -> DataError:
    """What is wrong with a text; raises what comes from elsewhere than the tokenizer."""
    # The Rust library raises bare Exception, and where it panics what is none.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return DataError(f"the tokenizer fails ({error}) on {text.replace(MARK, '')[:60]!r}")


def lost(encoded: Encoded, start: int, end: int, unknown: int | None) -> int:
    """Return how many characters of a part of a text no token stands for.

    Args:
      encoded: the text.
      start: of the part.
      end: of the part.
      unknown: the token that stands for what a tokenizer does not know, if it has one.
    """
    starts, ends = np.clip(np.asarray(encoded.offsets, np.int64).reshape(-1, 2), start, end).T
    known = np.ones(len(starts), bool) if unknown is None else np.not_equal(encoded.ids, unknown)
    # How many tokens more begin than end at each character.
    open_ = np.zeros(end - start + 1, np.int64)
    np.add.at(open_, starts[known] - start, 1)
    np.add.at(open_, ends[known] - start, -1)
    (missing,) = np.nonzero(np.cumsum(open_[:-1]) == 0)
    return sum(not encoded.text[start + at].isspace() for at in missing.tolist())


def _texts(values: Iterable[Any]) -> Iterable[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _texts(value.values())
        elif isinstance(value, list | tuple):
            yield from _texts(value)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A value with every text in it changed, but for a message's role."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {k: v if k == "role" else _changed(v, change) for k, v in value.items()}
    return [_changed(v, change) for v in value] if isinstance(value, list | tuple) else value


def _check_growth(backend: Any) -> None:
    for name in ("normalizer", "decoder"):
        part = getattr(backend, name)
        growth = 1 if part is None else _growth(json.loads(part.__getstate__()))
        if growth > _MOST_GROWTH:
            raise DataError(
                f"The tokenizer's {name} may make {growth:,} characters of one. Expected at most "
                f"{_MOST_GROWTH:,}: tokenizer.json is damaged, or meant to harm."
            )


def _growth(part: Mapping[str, Any]) -> int:
    """The most characters that a part of a tokenizer makes of one."""
    growth = 1
    for one in part.get("normalizers", part.get("decoders", ())):
        growth *= _growth(one)
    if part["type"] == "Precompiled":
        # The size of a trie, the trie, and the texts it leads to, each behind a zero.
        charsmap = base64.b64decode(part["precompiled_charsmap"] or "")
        texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")
        growth = max(map(len, texts))
    elif part["type"] == "Replace":
        growth = max(1, len(part["content"]))
    elif part["type"] == "Prepend":
        growth = 1 + len(part["prepend"])
    return growth
