"""A run's data, from its settings: the tokenizer, the corpus and the batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmoo.data import Corpus, LanguageBatches, load_corpus
from jaxmoo.hf import load_tokenizer
from jaxmoo.train.config import Config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["RunData", "load_data"]


@dataclasses.dataclass(frozen=True)
class RunData:
    """What :func:`load_data` put together.

    Attributes:
      tokenizer: with the chat template that is used.
      corpus: tokenised examples.
      batches: training batches by step.
    """

    tokenizer: PreTrainedTokenizerFast
    corpus: Corpus
    batches: LanguageBatches


def load_data(config: Config, source: Path, say: Callable[[str], None] = print) -> RunData:
    """Read, split and tokenise the examples of a run; no weights are read.

    Args:
      config: the run's settings.
      source: the model's directory, for its tokenizer.
      say: called with the corpus's table.

    Raises:
      ConfigError, DataError, CheckpointError, DownloadError: the data cannot be used as asked.
    """
    data = config.data
    tokenizer = load_tokenizer(source)
    corpus = load_corpus(
        data.source,
        tokenizer,
        seen=data.seen,
        unseen=data.unseen,
        sequence_length=data.sequence_length,
        held_out=data.held_out,
        max_held_out=data.max_held_out,
        disjoint_replies=data.disjoint_replies,
        columns=dataclasses.asdict(data.columns),
        codes=data.codes,
        language_column=data.language_column,
        subset=data.subset,
        split=data.split,
    )
    say(corpus.table())
    batches = LanguageBatches(
        corpus.train,
        data.seen,
        data.batch_size,
        data.sequence_length,
        config.seed,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
    return RunData(tokenizer, corpus, batches)
