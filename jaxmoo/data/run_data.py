"""A run's data, from its settings: the tokenizer, the corpus and the batches."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmoo.config.training import Config, DataConfig
from jaxmoo.data import Corpus, LanguageBatches, Tokenized, load_corpus, shares, stream_corpus
from jaxmoo.data.clock import at_date, reads_clock
from jaxmoo.data.notes import notes
from jaxmoo.errors import ConfigError
from jaxmoo.files.bundled import find_config
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["RunData", "chat_tokenizer", "load_data", "make_batches", "read_template"]


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


def load_data(config: Config, source: Path, say: Callable[[str], None] = print) -> RunData:
    """Read, split and tokenise the examples of a run, or open them; no weights are read.

    Args:
      config: the run's settings.
      source: the model's directory, for its tokenizer.
      say: called with the corpus's table, and with what is wrong with records of a stream.

    Raises:
      ConfigError, DataError, CheckpointError, DownloadError: the data cannot be used as asked.
    """
    data = config.data
    tokenizer, date = chat_tokenizer(source, data)
    options = {
        "seen": data.seen,
        "unseen": data.unseen,
        "sequence_length": data.sequence_length,
        "held_out": data.held_out,
        "max_held_out": data.max_held_out,
        "columns": dataclasses.asdict(data.columns),
        "codes": data.codes,
        "language_column": data.language_column,
        "subset": data.subset,
        "split": data.split,
        "max_malformed": data.max_malformed,
        "special_tokens": data.special_tokens,
    }
    if data.streaming:
        options |= {"shuffle_buffer": data.shuffle_buffer, "max_scan": data.max_scan, "say": say}
        corpus = stream_corpus(data.source, tokenizer, **options)
    else:
        options |= {"disjoint_replies": data.disjoint_replies}
        corpus = load_corpus(data.source, tokenizer, **options)
    say(corpus.table())
    for note in notes(_kept(corpus), "data.sequence_length"):
        say(f"Note: {note}")
    batches = make_batches(config, corpus, tokenizer.pad_token_id or 0)
    return RunData(tokenizer, corpus, batches, date)


def _kept(corpus: Corpus) -> dict[str, list[Tokenized]]:
    """What is used of every language; of streams, what was read to find the held-out examples."""
    train = {code: part for code, part in corpus.train.items() if isinstance(part, list)}
    return {code: [*train.get(code, ()), *corpus.held_out.get(code, ())] for code in corpus.report}


def chat_tokenizer(source: Path, data: DataConfig) -> tuple[PreTrainedTokenizerFast, str | None]:
    """Load a model's tokenizer with the chat template that the settings ask for.

    Args:
      source: the model's directory.
      data: the settings.

    Returns:
      The tokenizer, and the date that its template sees: that of the settings, by default today;
      None where the template reads no clock.

    Raises:
      ConfigError, CheckpointError: template or tokenizer cannot be read.
    """
    template = read_template(data.chat_template)
    tokenizer = load_tokenizer(source)
    if template is not None:
        tokenizer.chat_template = template
    date = datetime.date.fromisoformat(data.date) if data.date else datetime.date.today()
    found = tokenizer.chat_template
    named = found if isinstance(found, dict) else {"default": found or ""}
    if not any(map(reads_clock, named.values())):
        return tokenizer, None
    fixed = {name: at_date(text, date) for name, text in named.items()}
    tokenizer.chat_template = fixed if isinstance(found, dict) else fixed["default"]
    return tokenizer, date.isoformat()


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
    )


def _shares(config: Config, corpus: Corpus) -> dict[str, float] | None:
    sampling, seen = config.data.sampling, config.data.seen
    if sampling.weights is not None:
        return {code: sampling.weights.get(code, 1.0) for code in seen}
    if sampling.temperature is not None:
        return shares({code: len(corpus.train[code]) for code in seen}, sampling.temperature)
    return None


def read_template(path: str | None) -> str | None:
    """Read a chat template from a file.

    Args:
      path: the file, or None.

    Returns:
      The template; None without a file.

    Raises:
      ConfigError: there is no such file, or it is not a template.
    """
    if path is None:
        return None
    try:
        text = find_config(typed_path(path)).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.chat_template: cannot read {path} ({error}). Expected a text file with a Jinja "
            "template, such as a model's chat_template.jinja."
        ) from None
    if "messages" not in text:
        raise ConfigError(
            f"data.chat_template: {path} is no chat template: it never mentions messages."
        )
    return text
