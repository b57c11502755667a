"""Many tokenised examples as a few arrays, in memory or in a file that is read as needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np

from jaxmoo.data.tokenization.tokenize import Tokenized

__all__ = ["TokenTable"]

# What is marked at a token, and what an example is.
_LEARNT, _OWN = 1, 2
_OF_TOKENS = ("tokens", "marks")
_HAS_OWN, _ENDED, _UNEVEN, _LEARNS_FIRST = 1, 2, 4, 8


class TokenTable(Sequence[Tokenized]):
    """Tokenised examples, made into :class:`Tokenized` one by one when they are asked for.

    Besides, facts about all of them at once, as arrays of n numbers, without looking at a token.

    Args:
      arrays: from :attr:`arrays`.
      words: from :attr:`words`.

    Attributes:
      arrays: all there is but words, by name: ``tokens`` and ``marks`` of all examples, one behind
        the other, and numbers per example.
      words: per kind of example what its texts spell and which keys are ignored; nearly all
        examples are of a few kinds.

    Example:
      >>> table = TokenTable.of([Tokenized(np.array([5, 6]), np.array([False, True]), 1, 9)])
      >>> len(table), table[0].tokens.tolist(), table.sizes.tolist(), table.truncated.tolist()
      (1, [5, 6], [2], [True])
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], words: Sequence[Any]) -> None:
        self.arrays = dict(arrays)
        self.words = [[tuple(spelled), tuple(ignored)] for spelled, ignored in words]
        if "starts" not in self.arrays:
            self.arrays["starts"] = np.cumsum(self.sizes, dtype=np.int64) - self.sizes

    @classmethod
    def of(cls, examples: Iterable[Tokenized]) -> TokenTable:
        """Return examples as a table; a table is what it is."""
        if isinstance(examples, TokenTable):
            return examples
        examples = list(examples)
        numbers: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}
        kinds = [numbers.setdefault((e.spelled, e.ignored), len(numbers)) for e in examples]
        tokens = np.concatenate([np.zeros(0, np.int32), *(e.tokens for e in examples)])
        marks = [e.loss_mask * _LEARNT + e.scored * _OWN for e in examples]
        flags = [
            _HAS_OWN * (e.own is not None)
            + _ENDED * e.ended
            + _UNEVEN * e.uneven
            + _LEARNS_FIRST * bool(e.loss_mask[:1].any())
            for e in examples
        ]
        arrays = {
            # In half the space where that is enough.
            "tokens": tokens.astype(np.uint16 if _fits(tokens) else np.int32),
            "marks": np.concatenate([np.zeros(0, np.uint8), *marks]).astype(np.uint8),
            "sizes": np.array([len(e.tokens) for e in examples], np.int32),
            "learnt": np.array([e.loss_mask.sum() for e in examples], np.int32),
            "lengths": np.array([e.length for e in examples], np.int64),
            "bytes": np.array([e.reply_bytes for e in examples], np.int64),
            "flags": np.array(flags, np.uint8),
            "kinds": np.array(kinds, np.int32),
        }
        return cls(arrays, list(numbers))

    @classmethod
    def joined(cls, tables: Sequence[TokenTable]) -> TokenTable:
        """Return the examples of tables one behind the other."""
        if len(tables) == 1:
            return tables[0]
        tables = [cls.of([]), *tables]
        words, kinds, starts, before = [], [], [], 0
        for table in tables:
            kinds.append(table.arrays["kinds"] + np.int32(len(words)))
            starts.append(table.arrays["starts"] + before)
            words += table.words
            before += len(table.arrays["tokens"])
        names = tables[0].arrays
        arrays = {name: np.concatenate([t.arrays[name] for t in tables]) for name in names}
        arrays |= {"kinds": np.concatenate(kinds), "starts": np.concatenate(starts)}
        return cls(arrays, words)

    def chosen(self, which: np.ndarray) -> TokenTable:
        """Return some of the examples, of a table in which none is repeated.

        Args:
          which: bool [n].
        """
        if which.all():
            return self
        tokens = np.repeat(which, self.sizes)
        arrays = {
            name: array[tokens if name in _OF_TOKENS else which]
            for name, array in self.arrays.items()
            if name != "starts"
        }
        return TokenTable(arrays, self.words)

    def repeated(self, numbers: Sequence[int]) -> TokenTable:
        """Return examples by their numbers, some of them several times; tokens lie there once."""
        arrays = {
            name: array if name in _OF_TOKENS else array[np.asarray(numbers, np.int64)]
            for name, array in self.arrays.items()
        }
        return TokenTable(arrays, self.words)

    def without_tokens(self) -> TokenTable:
        """Return the facts about the examples, without what they say."""
        nothing = {name: self.arrays[name][:0] for name in _OF_TOKENS}
        return TokenTable(self.arrays | nothing, self.words)

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Tokenized: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tokenized]: ...
    def __getitem__(self, index: int | slice) -> Tokenized | list[Tokenized]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"There are {len(self)} examples, not one of number {index}.")
        arrays = self.arrays
        start = int(arrays["starts"][number])
        here = slice(start, start + int(arrays["sizes"][number]))
        marks, flags = arrays["marks"][here], int(arrays["flags"][number])
        spelled, ignored = self.words[arrays["kinds"][number]]
        return Tokenized(
            arrays["tokens"][here].astype(np.int32),
            marks & _LEARNT != 0,
            int(arrays["bytes"][number]),
            int(arrays["lengths"][number]),
            marks & _OWN != 0 if flags & _HAS_OWN else None,
            bool(flags & _ENDED),
            bool(flags & _UNEVEN),
            spelled,
            ignored,
        )

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each example: int32 [n]."""
        return self.arrays["sizes"]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each before truncation: int64 [n]."""
        return self.arrays["lengths"]

    @property
    def learnt(self) -> np.ndarray:
        """Tokens of each in its loss mask: int32 [n]."""
        return self.arrays["learnt"]

    @property
    def targets(self) -> np.ndarray:
        """Tokens of each that are predicted and learnt, its first one never: int32 [n]."""
        return self.learnt - self._flagged(_LEARNS_FIRST)

    @property
    def truncated(self) -> np.ndarray:
        """Whether each was cut at the end: bool [n]."""
        return self.lengths > self.sizes

    @property
    def ended(self) -> np.ndarray:
        """Whether the last reply of each ends with a special token: bool [n]."""
        return self._flagged(_ENDED)

    @property
    def uneven(self) -> np.ndarray:
        """Whether a reply in the middle of each is rendered otherwise than at the end: bool [n]."""
        return self._flagged(_UNEVEN)

    def spelled(self) -> dict[str, int]:
        """Return the special tokens that the texts spell, by how often."""
        return self._counted(lambda words: words[0])

    def ignored(self) -> dict[str, int]:
        """Return the keys that the template shows nothing of, by the number of examples."""
        return self._counted(lambda words: set(words[1]))

    def _counted(self, of: Callable[[Any], Iterable[str]]) -> dict[str, int]:
        found: dict[str, int] = {}
        often = np.bincount(self.arrays["kinds"], minlength=len(self.words)).tolist()
        for words, number in zip(self.words, often, strict=True):
            for word in of(words) if number else ():
                found[word] = found.get(word, 0) + number
        return found

    def _flagged(self, flag: int) -> np.ndarray:
        return self.arrays["flags"] & flag != 0


def _fits(tokens: np.ndarray) -> bool:
    return not len(tokens) or (tokens.min() >= 0 and tokens.max() < 2**16)
