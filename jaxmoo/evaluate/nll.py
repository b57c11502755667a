"""Negative log-likelihood of held-out replies, per language."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmoo.data.tokenization.tokenize import Tokenized
from jaxmoo.errors import ConfigError, DataError
from jaxmoo.runs.scores import LanguageScore
from jaxmoo.runtime.watching import watched

# Lengths to which batches are padded, so that one program is compiled per length, not per batch.
# Steps of a third to a half waste about a quarter of the work on the short replies of chat data.
BUCKETS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)

__all__ = [
    "BUCKETS",
    "Likelihoods",
    "evaluate_nll",
    "length_batches",
    "likelihoods",
]


class Likelihoods(NamedTuple):
    """How well a model predicts one language's replies, one by one.

    Attributes:
      nats: per reply the negative log-likelihood of its target tokens.
      tokens: per reply the number of those.
      bytes: per reply its length in UTF-8.

    Example:
      >>> Likelihoods([2.0, 4.0], [1, 2], [3, 4]).score().nll
      2.0
    """

    nats: list[float]
    tokens: list[int]
    bytes: list[int]

    def score(self) -> LanguageScore:
        """Return the score of all replies together."""
        return LanguageScore.of_sum(
            # Exactly rounded, so that the order of the batches leaves no trace.
            nats=math.fsum(self.nats),
            tokens=sum(self.tokens),
            bytes=sum(self.bytes),
            examples=len(self.nats),
        )


def evaluate_nll(
    nll_fn: Callable[[dict[str, np.ndarray]], Any],
    tokenized: Mapping[str, Sequence[Tokenized]],
    *,
    batch_size: int,
    pad_id: int = 0,
    buckets: Sequence[int] = BUCKETS,
    progress: bool = True,
) -> dict[str, LanguageScore]:
    """Score every language's replies under a model.

    Examples of all languages are sorted by length and cut into batches of one size, each padded
    to the smallest bucket that holds its longest, so `nll_fn` sees few shapes and little padding.
    Sums are kept in float64 per example: beyond the rounding of `nll_fn` itself, the result does
    not depend on the batch size, the buckets, or which languages are scored together.

    Args:
      nll_fn: maps ``{"tokens": int32 [B, S], "loss_mask": bool [B, S]}`` to float [B, S], where
        entry [b, t] is the negative log-likelihood in nats of token t given those before it.
        Entries outside the mask are ignored. Jit it.
      tokenized: per language its examples, each with at least one target token.
      batch_size: B, rows per call; missing rows are padding.
      pad_id: the token to pad with.
      buckets: ascending lengths to pad to; longer examples double the last one.
      progress: show how far it has come.

    Returns:
      Per language its score, in the order of `tokenized`.

    Raises:
      ConfigError: `batch_size` is not positive.
      DataError: a language has no examples, or an example no target tokens.

    Example:
      >>> example = Tokenized(np.array([5, 6, 7]), np.array([False, True, True]), 4, 3)
      >>> coin = lambda batch: np.full(batch["tokens"].shape, np.log(2))
      >>> evaluate_nll(coin, {"en": [example]}, batch_size=2, progress=False)["en"].bits_per_byte
      0.5
    """
    for language, examples in tokenized.items():
        # The first token of a sequence is predicted from nothing and is never a target.
        if not examples or not all(e.scored[1:].any() and e.reply_bytes for e in examples):
            raise DataError(
                f"Language {language!r} has no held-out examples, or some without reply tokens."
            )
    total = sum(map(len, tokenized.values()))
    with watched(total, "evaluating", unit="example", shown=progress) as advance:
        found = likelihoods(
            nll_fn,
            tokenized,
            batch_size=batch_size,
            pad_id=pad_id,
            buckets=buckets,
            advance=advance,
        )
    return {language: one.score() for language, one in found.items()}


def likelihoods(
    nll_fn: Callable[[dict[str, np.ndarray]], Any],
    tokenized: Mapping[str, Sequence[Tokenized]],
    *,
    batch_size: int,
    pad_id: int = 0,
    buckets: Sequence[int] = BUCKETS,
    advance: Callable[[int], object] = lambda rows: None,
) -> dict[str, Likelihoods]:
    """Score every reply by itself; `evaluate_nll` sums them.

    Args:
      nll_fn: see `evaluate_nll`.
      tokenized: see `evaluate_nll`.
      batch_size: see `evaluate_nll`.
      pad_id: see `evaluate_nll`.
      buckets: see `evaluate_nll`.
      advance: called with the number of examples of each batch that is done.

    Returns:
      Per language its replies' likelihoods, in the order of its examples.

    Raises:
      ConfigError: `batch_size` is not positive.

    Example:
      >>> example = Tokenized(np.array([5, 6, 7]), np.array([False, True, True]), 4, 3)
      >>> coin = lambda batch: np.full(batch["tokens"].shape, np.log(2))
      >>> likelihoods(coin, {"en": [example]}, batch_size=2)["en"]
      Likelihoods(nats=[1.386...], tokens=[2], bytes=[4])
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is a positive number, found {batch_size}.")
    rows = [example for examples in tokenized.values() for example in examples]
    nats = np.full(len(rows), np.nan)
    for length, chosen in length_batches([len(e.tokens) for e in rows], batch_size, buckets):
        tokens = np.full((batch_size, length), pad_id, np.int32)
        mask = np.zeros((batch_size, length), bool)
        for row, number in enumerate(chosen):
            example = rows[number]
            tokens[row, : len(example.tokens)] = example.tokens
            mask[row, 1 : len(example.tokens)] = example.scored[1:]
        result = np.asarray(nll_fn({"tokens": tokens, "loss_mask": mask}), np.float64)
        nats[chosen] = np.where(mask, result, 0.0).sum(axis=1)[: len(chosen)]
        advance(len(chosen))
    own = iter(nats.tolist())
    return {
        language: Likelihoods(
            nats=list(itertools.islice(own, len(examples))),
            tokens=[int(e.scored[1:].sum()) for e in examples],
            bytes=[e.reply_bytes for e in examples],
        )
        for language, examples in tokenized.items()
    }


def length_batches(
    lengths: Sequence[int], batch_size: int, buckets: Sequence[int] = BUCKETS
) -> Iterator[tuple[int, list[int]]]:
    """Cut sequences into batches of like lengths, longest first.

    What runs out of memory does so at once.

    Args:
      lengths: of the sequences.
      batch_size: the most sequences of a batch.
      buckets: ascending lengths to pad to; longer sequences double the last one.

    Yields:
      For each batch the length to pad to and the numbers of its sequences.

    Example:
      >>> list(length_batches([70, 300, 5], batch_size=2))
      [(384, [1, 0]), (64, [2])]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield _padded(lengths[chosen[0]], buckets), chosen


def _padded(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds so many tokens; longer ones double the last bucket."""
    for bucket in buckets:
        if length <= bucket:
            return bucket
    bucket = buckets[-1]
    while bucket < length:
        bucket *= 2
    return bucket
