"""A run's data, from its settings: the tokenizer, the corpus and the batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmoo.config.training import Config
from jaxmoo.data.batches import LanguageBatches
from jaxmoo.data.corpus import Corpus, load_corpus
from jaxmoo.data.inspect import notes
from jaxmoo.data.mixture import shares
from jaxmoo.data.sources.source import Source
from jaxmoo.data.streaming import ExampleStream
from jaxmoo.data.token_table import TokenTable
from jaxmoo.data.tokenization.tokenizer import chat_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["RunData", "load_data", "make_batches"]


@dataclasses.dataclass(frozen=True)
class RunData:
    """What :func:`load_data` put together.

    Attributes:
      tokenizer: with the chat template that is used.
      corpus: tokenised examples.
      batches: training batches by step.
      date: the date that the chat template sees; None where it reads no clock.
    """

    tokenizer: PreTrainedTokenizerFast
    corpus: Corpus
    batches: LanguageBatches
    date: str | None


def load_data(
    config: Config,
    model: Path,
    say: Callable[[str], None] = print,
    *,
    source: Source | None = None,
    reads: Collection[str] | None = None,
) -> RunData:
    """Read, split and tokenise the examples of a run, or open them; no weights are read.

    Args:
      config: the run's settings.
      model: the model's directory, for its tokenizer.
      say: called with the corpus's table, and with what is wrong with records of a stream.
      source: where the records come from, if not from ``data.source``.
      reads: see :func:`~jaxmoo.data.corpus.load_corpus`.

    Raises:
      ConfigError, DataError, CheckpointError, DownloadError: the data cannot be used as asked.
    """
    data = config.data
    tokenizer, date = chat_tokenizer(model, data)
    corpus = load_corpus(data, tokenizer, source=source, say=say, reads=reads)
    say(corpus.table())
    for note in notes(_kept(corpus), "data.sequence_length"):
        say(f"Note: {note}")
    pad: Any = tokenizer.pad_token_id
    batches = make_batches(config, corpus, pad or 0)
    return RunData(tokenizer, corpus, batches, date)


def _kept(corpus: Corpus) -> dict[str, TokenTable]:
    """What is used of every language; of streams, what was read to find the held-out examples."""
    kept = {}
    for code in corpus.report:
        train = corpus.train.get(code, ())
        parts = [corpus.held_out.get(code, ())]
        if not isinstance(train, ExampleStream):
            parts.insert(0, train)
        kept[code] = TokenTable.joined([TokenTable.of(part).without_tokens() for part in parts])
    return kept


def make_batches(config: Config, corpus: Corpus, pad_id: int) -> LanguageBatches:
    """Make the training batches of a corpus.

    Args:
      config: the run's settings.
      corpus: its examples.
      pad_id: the token to pad with.

    Raises:
      ConfigError, DataError: a language cannot be trained on.
    """
    data = config.data
    return LanguageBatches(
        corpus.train,
        data.seen,
        data.batch_size,
        data.sequence_length,
        config.seed,
        pad_id=pad_id,
        packing=data.packing,
        per_step=data.languages_per_step,
        shares=_shares(config, corpus),
        readers=corpus.readers,
    )


def _shares(config: Config, corpus: Corpus) -> dict[str, float] | None:
    sampling, seen = config.data.sampling, config.data.seen
    if sampling.weights is not None:
        return {code: sampling.weights.get(code, 1.0) for code in seen}
    if sampling.temperature is not None:
        train = corpus.at_hand()
        return shares({code: len(train[code]) for code in seen}, sampling.temperature)
    return None
