"""Training batches: every language in its own shuffled order, addressed by step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from jaxmoo.data.languages import nearest_language
from jaxmoo.data.tokenize import Tokenized
from jaxmoo.errors import ConfigError, DataError


class LanguageBatches:
    """Batches of all languages, ``batch(step)`` being a pure function of the seed and the step.

    Each language goes through its examples in an order shuffled anew in every epoch, and starts
    over when it has shown them all, so small languages repeat while large ones are on their first
    pass. The order comes from the seed and the language's code alone: it does not change when
    other languages are added or `languages` is reordered, and no two languages share it. Nothing
    is stored between calls, so a run is resumed from its step number.

    Args:
      tokenized: per language its training examples, each with at least one target token.
      languages: the K languages of a batch, in order.
      batch_size: B, examples per language and step.
      sequence_length: S; shorter examples are padded on the right.
      seed: any integer.
      pad_id: the token to pad with; the loss mask is false there.

    Raises:
      ConfigError: a size is not positive, or a language is unknown.
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
        tokenized: Mapping[str, Sequence[Tokenized]],
        languages: Sequence[str],
        batch_size: int,
        sequence_length: int,
        seed: int,
        *,
        pad_id: int = 0,
    ):
        for name, size in (("batch_size", batch_size), ("sequence_length", sequence_length)):
            if size < 1:
                raise ConfigError(f"{name} is a positive number, found {size}.")
        for language in languages:
            if language not in tokenized:
                raise ConfigError(
                    f"No examples of language {language!r} were given; there are "
                    f"{', '.join(tokenized)}.{nearest_language(language, tokenized)}"
                )
            _check(language, tokenized[language], sequence_length)
        self.languages = tuple(languages)
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.pad_id = pad_id
        self._sizes = {language: len(tokenized[language]) for language in languages}
        self._order = {
            language: grain.MapDataset.source(list(tokenized[language]))
            .seed(_language_seed(seed, language))
            .shuffle()
            .repeat()
            for language in languages
        }

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Return the batch of one step.

        Args:
          step: from 0.

        Returns:
          ``tokens`` int32 [K, B, S] and ``loss_mask`` bool [K, B, S].

        Raises:
          ValueError: `step` is negative.
        """
        if step < 0:
            raise ValueError(f"step counts from 0, found {step}.")
        shape = (len(self.languages), self.batch_size, self.sequence_length)
        tokens = np.full(shape, self.pad_id, np.int32)
        loss_mask = np.zeros(shape, bool)
        for k, language in enumerate(self.languages):
            order = self._order[language]
            for b in range(self.batch_size):
                example = order[step * self.batch_size + b]
                tokens[k, b, : len(example.tokens)] = example.tokens
                loss_mask[k, b, : len(example.tokens)] = example.loss_mask
        return {"tokens": tokens, "loss_mask": loss_mask}

    def epochs(self, step: int) -> dict[str, float]:
        """Return how often each language's examples were shown before a step.

        Args:
          step: from 0.

        Returns:
          Per language the number of passes over its examples, with fractions.
        """
        shown = step * self.batch_size
        return {language: shown / size for language, size in self._sizes.items()}


def _check(language: str, examples: Sequence[Tokenized], sequence_length: int) -> None:
    if not examples:
        raise DataError(f"Language {language!r} has no training examples.")
    longest = max(len(example.tokens) for example in examples)
    if longest > sequence_length:
        raise DataError(
            f"Language {language!r} has an example of {longest} tokens, longer than the sequence "
            f"length {sequence_length}. Tokenise with max_length={sequence_length}."
        )
    # The first token of a sequence is predicted from nothing and is never a target.
    if not all(example.loss_mask[1:].any() for example in examples):
        raise DataError(f"Language {language!r} has an example without target tokens.")


def _language_seed(seed: int, language: str) -> int:
    """A seed of its own for each language, the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{language}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
