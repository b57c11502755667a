"""Examples of a language whose records are streamed: read, split and tokenised piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from jaxmoo.config.data_section import DataConfig
from jaxmoo.data.example import Example
from jaxmoo.data.lengths import fits, fits_tokens
from jaxmoo.data.sources.records import (
    Malformed,
    Position,
    Record,
    RecordStream,
    language_of,
    layout,
    take_examples,
)
from jaxmoo.data.split import deduplicate, hash_fraction, side_key
from jaxmoo.data.tokenization.tokenize import Tokenized, tokenize_good

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SHOWN = 5  # complaints about malformed records


class Place(NamedTuple):
    """A place in a stream that is repeated without end.

    Attributes:
      position: where the next record is; None at the beginning.
      good: well-formed records before it, those of earlier passes included.
      bad: malformed ones.
    """

    position: Position = None
    good: int = 0
    bad: int = 0


class Piece(NamedTuple):
    """The examples of consecutive records.

    Attributes:
      train: those to train on and what they are as tokens, without duplicates, in the stream's
        order.
      held_out: those to evaluate, likewise.
      records: how many well-formed records there were.
      passed: records read in all, those of other languages and malformed ones included.
      complaints: what is wrong with each malformed one.
      duplicates: examples left out.
      filtered: examples left out for their length.
      ended: whether the stream is over.
      behind: the place behind them: the beginning, if it is over.
    """

    train: list[tuple[Example, Tokenized]]
    held_out: list[tuple[Example, Tokenized]]
    records: int
    passed: int
    complaints: list[str]
    duplicates: int
    filtered: int
    ended: bool
    behind: Place


class ExampleStream:
    """One language's examples, a function of the place in the stream.

    What is held out is decided by the hash that `split_examples` takes, for every example by
    itself. Duplicates are found within a piece, so nothing has to be remembered from piece to
    piece, and reading can begin at any place between two.

    Args:
      language: its code.
      records: its source; nothing else reads from it.
      data: the settings; ``shuffle_buffer`` well-formed records are a piece.
      tokenizer: a fast tokenizer.
      column: the column of the language; None where all records are of this one.
      say: called with lines about malformed records.
    """

    def __init__(
        self,
        language: str,
        records: RecordStream,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        column: str | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.language = language
        self._records, self._data, self._tokenizer = records, data, tokenizer
        self._layout = layout(data)
        self._name, self._column = data.codes.get(language, language), column
        self._say = say
        self._scanned = self._said = 0

    def read(self, place: Place, most: int | None = None) -> Piece:
        """Read the piece that begins at a place.

        Args:
          place: the beginning, or what another piece has behind it.
          most: records to read at most, those of other languages included.

        Raises:
          DataError: a record is malformed and too many were, or the source cannot be read.
        """
        if place.position is None or place.position != self._records.position():
            self._records.seek(place.position)
        data = self._data
        malformed = Malformed(f"language {self.language!r}", data.max_malformed, place.bad)
        taken = take_examples(
            self._records,
            self.language,
            self._layout,
            malformed,
            size=data.shuffle_buffer,
            most=most,
            belongs=self._belongs,
        )
        examples, position = taken.examples, None if taken.ended else self._records.position()
        fitting = [example for example in examples if fits(example, data.lengths)]
        distinct = deduplicate(fitting)
        good, tokens = tokenize_good(
            distinct,
            self._tokenizer,
            data.sequence_length,
            malformed,
            special_tokens=data.special_tokens,
        )
        records = len(examples) - (len(distinct) - len(good))
        malformed.check(place.good + records)
        train, held = [], []
        kept = [
            one
            for one in zip(good, tokens, strict=True)
            if fits_tokens(one[1].length, data.lengths)
        ]
        for one in kept:
            (held if hash_fraction(side_key(one[0])) < data.held_out else train).append(one)
        return Piece(
            train,
            held,
            records,
            taken.passed,
            malformed.complaints,
            len(fitting) - len(distinct),
            len(examples) - len(fitting) + len(good) - len(kept),
            taken.ended,
            Place(
                position,
                place.good + records,
                place.bad + len(malformed.complaints),
            ),
        )

    def _belongs(self, record: Record) -> bool:
        return self._column is None or language_of(record, self._column) == self._name

    def training(self, piece: Piece) -> list[Tokenized]:
        """Return what of a piece can be trained on."""
        # The first token of a sequence is predicted from nothing and is never a target.
        return [tokens for _, tokens in piece.train if tokens.loss_mask[1:].any()]

    def scanned(self, records: int) -> None:
        """Note that the faults of so many records at the beginning are known."""
        self._scanned = records

    def complain(self, piece: Piece) -> None:
        """Say what is wrong with malformed records that nobody knows of; only the first few."""
        if piece.behind.good + piece.behind.bad <= self._scanned:
            return
        for complaint in piece.complaints[: max(_SHOWN - self._said, 0)]:
            self._say(f"Left out: {complaint}")
        self._said += len(piece.complaints)
