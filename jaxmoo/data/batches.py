"""Training batches: every language in its own shuffled order, addressed by step."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jaxmoo.data.mixture import Mixture
from jaxmoo.data.packing import ShuffledRows, StreamedRows
from jaxmoo.data.readers import Readers
from jaxmoo.data.streaming import ExampleStream
from jaxmoo.data.token_table import TokenTable
from jaxmoo.data.tokenization.tokenize import Tokenized
from jaxmoo.errors import ConfigError, DataError, did_you_mean


class _Step(NamedTuple):
    """What a step is made of, as far as this process reads it: see `batch`, `tokens`, `state`."""

    batch: dict[str, np.ndarray]
    tokens: np.ndarray
    state: dict[str, Any]


class Counts(NamedTuple):
    """Numbers of a step's batch; of a language that others read 0.

    Attributes:
      tokens: that are not padding, per language of the step: int [k].
      epochs: passes over each language's rows so far; over streams whole ones: [K].
      malformed: records of each language left out so far: int [K] of streams, else [0].
      unread: 1 for languages whose rows could not be read: int [K] of streams, else [0].
    """

    tokens: np.ndarray
    epochs: np.ndarray
    malformed: np.ndarray
    unread: np.ndarray


class LanguageBatches:
    """Batches of several languages, ``batch(step)`` being a pure function of seed and step.

    Each language goes through its rows in an order shuffled anew in every epoch, and starts over
    when it has shown them all, so small languages repeat while large ones are on their first
    pass. The order comes from the seed and the language's code alone: it does not change when
    other languages are added or `languages` is reordered, and no two languages share it. So a run
    is resumed from its step number, and every process of a run makes the same batches.

    A language that is streamed (:class:`~jaxmoo.data.streaming.ExampleStream`) is shuffled piece by
    piece instead. Its batches are a function of seed and step, too, but found by reading on:
    :meth:`state` tells where, and :meth:`seek` goes there. With `readers`, each process reads the
    streams of its own rows only; what is of all languages, :meth:`whole` and :meth:`state`, all
    processes have to ask for together.

    A row holds one example, padded on the right, or with `packing` as many as fit (see
    :func:`~jaxmoo.data.packing.plan_rows`). With `mixture`, a step has k of the K languages.

    Args:
      tokenized: per language its training examples, each with at least one target token, or a
        stream of them.
      languages: the K languages, in order.
      batch_size: B, rows per language and step.
      sequence_length: S, tokens per row.
      seed: any integer.
      pad_id: the token to pad with; the loss mask is false there.
      packing: put several examples of a language into one row.
      per_step: k, languages per step; all of them by default.
      shares: per language its share of the steps' places; equal by default.
      readers: which process reads which stream; by default each reads all.

    Raises:
      ConfigError: a size is not positive, a language is unknown, or k or a share makes no sense.
      DataError: a language has no examples, or an example is too long or without target tokens.

    Example:
      >>> example = Tokenized(np.array([5, 6, 7], np.int32), np.array([False, True, True]), 2, 3)
      >>> batches = LanguageBatches({"en": [example]}, ["en"], 2, 4, seed=0)
      >>> batches.batch(0)["tokens"].tolist()
      [[[5, 6, 7, 0], [5, 6, 7, 0]]]
      >>> batches.epochs(3)
      {'en': 6.0}
    """

    def __init__(
        self,
        tokenized: Mapping[str, Sequence[Tokenized] | ExampleStream],
        languages: Sequence[str],
        batch_size: int,
        sequence_length: int,
        seed: int,
        *,
        pad_id: int = 0,
        packing: bool = False,
        per_step: int | None = None,
        shares: Mapping[str, float] | None = None,
        readers: Readers | None = None,
    ):
        for name, size in (("batch_size", batch_size), ("sequence_length", sequence_length)):
            if size < 1:
                raise ConfigError(f"{name} is a positive number, found {size}.")
        for language in languages:
            if language not in tokenized:
                raise ConfigError(
                    f"No examples of language {language!r} were given; there are "
                    f"{', '.join(tokenized)}.{did_you_mean(language, tokenized)}"
                )
        self.languages = tuple(languages)
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.pad_id = pad_id
        self.packing = packing
        self.readers = readers
        self.mixture = None
        if per_step is not None and per_step != len(self.languages):
            weights = [1.0 if shares is None else shares[language] for language in languages]
            self.mixture = Mixture(weights, per_step, _derived_seed(seed, "/mixture"))
        self.rows: dict[str, ShuffledRows | StreamedRows] = {}
        for language in languages:
            examples = tokenized[language]
            options: dict[str, Any] = {"packing": packing, "seed": _derived_seed(seed, language)}
            if isinstance(examples, ExampleStream):
                self.rows[language] = StreamedRows(examples, sequence_length, **options)
            else:
                table = TokenTable.of(examples)
                _check(language, table, sequence_length)
                self.rows[language] = ShuffledRows(table, sequence_length, **options)
        # Of a step; a stream need not be read again for what was read last.
        self._last: tuple[int, bytes | None, _Step] | None = None

    def batch(self, step: int, only: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return the batch of one step.

        Args:
          step: from 0.
          only: bool [k, B], the rows that are needed; the others are left empty. By default all
            those of languages that this process reads.

        Returns:
          The arrays that :func:`batch_spec` lists, with k = K unless languages are sampled.

        Raises:
          ValueError: `step` is negative.
        """
        return self._at(step, only).batch

    def whole(self, step: int) -> dict[str, np.ndarray]:
        """Return the batch of one step with the rows of all languages, whoever reads them.

        Args:
          step: from 0.

        Raises:
          DataError: a process cannot read its rows, or those that read one language have not read
            the same.
        """
        if self.readers is None:
            return self._at(step).batch
        batch = self.readers.all_do(lambda: self._at(step)).batch
        number = {language: k for k, language in enumerate(self.languages)}
        mine = {
            language: {name: array[number[language]] for name, array in batch.items()}
            for language in self.languages
            if language in self.readers.mine
        }
        found = self.readers.rows(mine)
        return {
            name: np.stack([found[language][name] for language in self.languages]) for name in batch
        }

    def tokens(self, step: int, only: np.ndarray | None = None) -> np.ndarray:
        """Count the tokens of a step that are not padding, in all rows.

        Args:
          step: from 0.
          only: as for the batch, if that is wanted, too; does not change what is counted.

        Returns:
          int [k], per language of the step; 0 of one that others read.
        """
        return self._at(step, only).tokens

    def counts(self, step: int, only: np.ndarray | None = None) -> Counts:
        """Return what a reader of metrics wants to know of a step's batch and those before it.

        Args:
          step: from 0.
          only: as for the batch.
        """
        tokens, malformed = self.tokens(step, only), list(self.malformed().values())
        return Counts(
            tokens,
            np.array(list(self.epochs(step + 1).values())),
            np.array(malformed, np.int64),
            np.zeros(len(malformed), np.int64),
        )

    def state(self, step: int) -> dict[str, Any]:
        """Return what finds the batch of a step again besides its number, as JSON holds it.

        Args:
          step: from 0.

        Returns:
          Per language that is streamed a place in its stream.
        """
        if self.readers is None:
            return self._at(step).state
        return self.readers.told(self.readers.all_do(lambda: self._at(step)).state)

    @contextlib.contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """Read and tokenise the next pieces of streams meanwhile, in a thread of their own."""
        streams = [rows for rows in self.rows.values() if isinstance(rows, StreamedRows)]
        if not streams:
            yield
            return
        with ThreadPoolExecutor(1, "reading ahead") as pool:
            for rows in streams:
                rows.read_ahead(pool)
            try:
                yield
            finally:
                pool.shutdown(cancel_futures=True)
                for rows in streams:
                    rows.read_ahead(None)

    def seek(self, state: Mapping[str, Any]) -> None:
        """Go to where the batch of a step was found.

        Args:
          state: from :meth:`state`.
        """
        for language, mark in state.items():
            self.rows[language].seek(mark)
        self._last = None

    def _at(self, step: int, only: np.ndarray | None = None) -> _Step:
        if step < 0:
            raise ValueError(f"step counts from 0, found {step}.")
        which = None if only is None else only.tobytes()
        last = self._last
        if last is None or last[0] != step or last[1] not in (None, which):
            firsts = (self._taken(step) * self.batch_size).tolist()
            marks = {
                language: self.rows[language].mark(first)
                for language, first in zip(self.languages, firsts, strict=True)
                if self._reads(language)
            }
            state = {language: mark for language, mark in marks.items() if mark is not None}
            last = self._last = step, which, _Step(*self._batch(step, only), state)
        return last[2]

    def _reads(self, language: str) -> bool:
        return self.readers is None or language in self.readers.mine

    def _taken(self, step: int) -> np.ndarray:
        """In how many of the steps before one each language took part, int [K]."""
        if self.mixture is None:
            return np.full(len(self.languages), step)
        return self.mixture.taken(step)

    def _batch(
        self, step: int, only: np.ndarray | None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        taking_part, before = np.arange(len(self.languages)), self._taken(step)
        if self.mixture is not None:
            taking_part = self.mixture.languages(step)
        batch = {
            name: np.zeros(shape, dtype)
            for name, (shape, dtype) in batch_spec(
                len(taking_part),
                self.batch_size,
                self.sequence_length,
                packing=self.packing,
                sampled=self.mixture is not None,
            ).items()
        }
        batch["tokens"][:] = self.pad_id
        if self.mixture is not None:
            batch["language"][:] = taking_part[:, None]
        tokens = np.zeros(len(taking_part), np.int64)
        for k, number in enumerate(taking_part):
            language = self.languages[number]
            if not self._reads(language):
                continue
            for b in range(self.batch_size):
                index = int(before[number]) * self.batch_size + b
                tokens[k] += self.rows[language].size(index)
                if only is None or only[k, b]:
                    self._fill(language, index, {n: x[k, b] for n, x in batch.items()})
        return batch, tokens

    def _fill(self, language: str, index: int, row: Mapping[str, np.ndarray]) -> None:
        """Write a language's row of all its epochs, counted through."""
        start = 0
        for segment, example in enumerate(self.rows[language].row(index), start=1):
            here = slice(start, start := start + len(example.tokens))
            row["tokens"][here] = example.tokens
            row["loss_mask"][here] = example.loss_mask
            if self.packing:
                # A text's first token is predicted from nothing, not from the text before.
                row["loss_mask"][here.start] = False
                row["positions"][here] = np.arange(len(example.tokens))
                row["segment_ids"][here] = segment

    def epochs(self, step: int) -> dict[str, float]:
        """Return how often each language's rows were shown before a step.

        Args:
          step: from 0; of a stream as far as was read.

        Returns:
          Per language the number of passes over its rows, with fractions; over a stream, of which
          nobody knows how long it is, the whole ones.
        """
        return {
            language: self.rows[language].epochs(int(taken) * self.batch_size)
            for language, taken in zip(self.languages, self._taken(step), strict=True)
        }

    def malformed(self) -> dict[str, int]:
        """Return per language that is streamed the malformed records that were left out so far."""
        counts = {language: rows.malformed() for language, rows in self.rows.items()}
        return {language: count for language, count in counts.items() if count is not None}

    def in_step(self, step: int) -> list[str]:
        """Return the languages of a step, in the order of its batch."""
        if self.mixture is None:
            return list(self.languages)
        return [self.languages[number] for number in self.mixture.languages(step)]


def batch_spec(
    num_languages: int, batch_size: int, sequence_length: int, *, packing: bool, sampled: bool
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return the arrays of a batch.

    ``tokens`` int32 and ``loss_mask`` bool [k, B, S]; with packing ``positions``, which start at 0
    in every example, and ``segment_ids``, from 1 on in every row and 0 for padding, int32
    [k, B, S]; where languages are sampled ``language`` int32 [k, B], each row's number among the
    K languages. The first two axes of all of them are languages and rows, so one sharding suits
    all.

    Args:
      num_languages: k, languages of a step.
      batch_size: B, rows per language.
      sequence_length: S.
      packing: whether rows hold several examples.
      sampled: whether k of K languages are sampled.

    Returns:
      Per name a shape and a dtype.
    """
    rows = (num_languages, batch_size)
    whole = (*rows, sequence_length)
    spec: dict[str, tuple[tuple[int, ...], Any]] = {
        "tokens": (whole, np.int32),
        "loss_mask": (whole, np.bool_),
    }
    if packing:
        spec |= {"positions": (whole, np.int32), "segment_ids": (whole, np.int32)}
    if sampled:
        spec |= {"language": (rows, np.int32)}
    return spec


def count_tokens(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Count the tokens of a batch that are not padding.

    Args:
      batch: from :meth:`LanguageBatches.batch`.

    Returns:
      int [k], per language of the step.

    Example:
      >>> mask = np.array([[[0, 1, 1, 0], [0, 1, 0, 0]]], bool)
      >>> count_tokens({"loss_mask": mask}).tolist()
      [5]
    """
    if "segment_ids" in batch:
        return (batch["segment_ids"] > 0).sum((1, 2))
    # An example ends with a target: what comes behind its last is padding.
    mask = batch["loss_mask"]
    length = np.where(mask.any(-1), mask.shape[-1] - mask[..., ::-1].argmax(-1), 0)
    return length.sum(1)


def _check(language: str, examples: TokenTable, sequence_length: int) -> None:
    if not examples:
        raise DataError(f"Language {language!r} has no training examples.")
    longest = examples.sizes.max()
    if longest > sequence_length:
        raise DataError(
            f"Language {language!r} has an example of {longest} tokens, longer than the sequence "
            f"length {sequence_length}. Tokenise with max_length={sequence_length}."
        )
    if not examples.targets.all():
        raise DataError(f"Language {language!r} has an example without target tokens.")


def _derived_seed(seed: int, name: str) -> int:
    """A seed of its own for each language and purpose, the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
