"""The whole way from a source to tokenised training and held-out examples, with a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmoo.data.example import Example, normalise
from jaxmoo.data.malformed import Malformed
from jaxmoo.data.sources import read_examples
from jaxmoo.data.split import deduplicate, split_languages
from jaxmoo.data.streaming import ExampleStream, Place
from jaxmoo.data.table import text_table
from jaxmoo.data.tokenize import Tokenized, tokenize_good
from jaxmoo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class LanguageReport:
    """What became of one language's records.

    Attributes:
      language: its code.
      seen: whether it is trained on.
      records: examples in the source.
      skipped: records of the source that are malformed, or that the template cannot render.
      duplicates: records dropped because prompt and reply had occurred before.
      leaked: held-out examples dropped because they, or others of their group, are among the
        training examples of another language.
      train: examples to train on.
      held_out: examples to evaluate.
      reserve: held out but beyond the evaluation's limit, and not used.
      replies_in_train: how many of `held_out` have a reply that occurs in `train` too.
      truncated: examples of `train` and `held_out` whose reply lost its end.
      dropped: examples of both that had no reply within the sequence length, not counted in
        `train` and `held_out`.
      spelled: special tokens that texts of both spell, by how often.
      tokens_min, tokens_median, tokens_p95, tokens_max: lengths of the rendered examples of both
        (and the dropped ones) before truncation.
    """

    language: str
    seen: bool
    records: int
    skipped: int
    duplicates: int
    leaked: int
    train: int
    held_out: int
    reserve: int
    replies_in_train: int
    truncated: int
    dropped: int
    spelled: dict[str, int]
    tokens_min: int
    tokens_median: float
    tokens_p95: float
    tokens_max: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class Corpus:
    """Tokenised examples per language.

    Attributes:
      train: per seen language the examples to train on, or a stream of them.
      held_out: per seen and unseen language the examples to evaluate.
      report: per seen and unseen language what became of its records.
      complaints: what is wrong with each malformed record that was left out.
      special_tokens: what was made of texts that spell special tokens: ``text`` or ``tokens``.
    """

    train: dict[str, list[Tokenized]] | dict[str, ExampleStream]
    held_out: dict[str, list[Tokenized]]
    report: dict[str, LanguageReport]
    complaints: tuple[str, ...] = ()
    special_tokens: str = "text"

    def at_hand(self) -> dict[str, list[Tokenized]]:
        """Return training examples per language: all of them, or of a stream its first piece."""
        return {
            language: train.training(train.read(Place()))
            if isinstance(train, ExampleStream)
            else train
            for language, train in self.train.items()
        }

    def table(self) -> str:
        """Return the report as an aligned table, and what is wrong with malformed records."""
        header = ["language", "records", "malformed", "duplicates", "train", "held-out"]
        header += ["truncated", "dropped", "tokens median", "95 %", "max"]
        rows = [
            [
                r.language if r.seen else f"{r.language} (unseen)",
                r.records,
                r.skipped,
                r.duplicates,
                r.train,
                r.held_out,
                r.truncated,
                r.dropped,
                f"{r.tokens_median:.0f}",
                f"{r.tokens_p95:.0f}",
                r.tokens_max,
            ]
            for r in self.report.values()
        ]
        lines = [text_table(header, rows)]
        if self.complaints:
            lines += [
                f"Malformed records left out: {len(self.complaints):,}.",
                *self.complaints[:5],
            ]
            lines += ["..."] * (len(self.complaints) > 5)
        spelled = Counter[str]()
        for report in self.report.values():
            spelled.update(report.spelled)
        if spelled:
            found = ", ".join(f"{token} {n:,} times" for token, n in spelled.most_common(5))
            kind = "the text they are" if self.special_tokens == "text" else "these tokens"
            lines.append(
                f"Texts spell special tokens: {found}. They are learnt as {kind} "
                f"(data.special_tokens={self.special_tokens})."
            )
        return "\n".join(lines)


def load_corpus(
    source: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seen: Sequence[str],
    unseen: Sequence[str] = (),
    sequence_length: int,
    held_out: float = 0.1,
    max_held_out: int | None = None,
    disjoint_replies: bool = False,
    columns: Mapping[str, str | None] | None = None,
    codes: Mapping[str, str] | None = None,
    language_column: str | None = None,
    subset: str | None = None,
    split: str = "train",
    max_malformed: float = 0.0,
    special_tokens: str = "text",
    cache_dir: Path | None = None,
) -> Corpus:
    """Read, deduplicate, split and tokenise the examples of a run.

    Seen languages are split by a hash of their prompts (`split_examples`); of unseen languages
    every example may be evaluated. A held-out example that occurs, prompt and reply, among the
    training examples of any language is dropped, and so is one whose group is trained on.

    Args:
      source: as in `read_examples`, and so are `columns`, `codes`, `language_column`, `subset`,
        `split`, `max_malformed` and `cache_dir`.
      tokenizer: a fast tokenizer with a chat template.
      seen: codes of the languages to train on.
      unseen: codes of the languages that are only evaluated.
      sequence_length: the most tokens of an example; the ends of longer replies are cut.
      held_out: the fraction of each seen language's prompts that is kept from training.
      max_held_out: the most examples to evaluate per language; None for all.
      special_tokens: as in :func:`~jaxmoo.data.tokenize.tokenize_all`.
      disjoint_replies: keep every reply on one side of the split, as in `split_examples`. Wanted
        for the built-in corpus, many of whose prompts paraphrase one another.

    Returns:
      The tokenised examples and the report.

    Raises:
      ConfigError: arguments that contradict each other.
      DataError: the source cannot be used, or a language is left without examples.
      DownloadError: the built-in corpus could not be fetched.
    """
    check_languages_and_length(seen, unseen, tokenizer, sequence_length)
    if max_held_out is not None and max_held_out < 1:
        raise ConfigError(f"max_held_out is a positive number or null, found {max_held_out}.")
    reading = read_examples(
        source,
        [*seen, *unseen],
        columns=columns,
        codes=codes,
        language_column=language_column,
        subset=subset,
        split=split,
        max_malformed=max_malformed,
        cache_dir=cache_dir,
    )
    distinct = {
        language: deduplicate(loaded.examples) for language, loaded in reading.languages.items()
    }
    split_by_language = split_languages(distinct, seen, held_out, disjoint_replies=disjoint_replies)

    train: dict[str, list[Tokenized]] = {}
    evaluated: dict[str, list[Tokenized]] = {}
    report: dict[str, LanguageReport] = {}
    complaints = list(reading.complaints)
    for language, (examples, skipped) in reading.languages.items():
        divided = split_by_language[language]
        # The limit leaves the rest unused, so that what is trained on does not depend on how much
        # is evaluated.
        parts = {"train": divided.train, "held_out": divided.held_out[:max_held_out]}
        total = len(examples) + skipped
        malformed = Malformed(f"language {language!r}", max_malformed, skipped, total)
        tokens = {}
        for use, part in parts.items():
            parts[use], tokens[use] = tokenize_good(
                part, tokenizer, sequence_length, malformed, special_tokens=special_tokens
            )
        bad = len(malformed.complaints)
        complaints += malformed.complaints
        usable = {use: [t for t in part if t.loss_mask.any()] for use, part in tokens.items()}
        if language in seen:
            train[language] = usable_examples(
                language, "train", parts, usable, held_out, sequence_length
            )
        if held_out > 0 or language not in seen:
            evaluated[language] = usable_examples(
                language, "held_out", parts, usable, held_out, sequence_length
            )
        report[language] = report_on(
            language,
            language in seen,
            parts,
            tokens,
            usable,
            records=len(examples) - bad,
            skipped=skipped + bad,
            duplicates=len(examples) - len(distinct[language]),
            leaked=divided.leaked,
            reserve=len(divided.held_out) - len(parts["held_out"]),
        )
    return Corpus(train, evaluated, report, tuple(complaints), special_tokens)


def check_languages_and_length(
    seen: Sequence[str],
    unseen: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    sequence_length: int,
) -> None:
    """Raise `ConfigError` for languages both seen and unseen, or an impossible length."""
    if both := sorted(set(seen) & set(unseen)):
        raise ConfigError(f"Languages both seen and unseen: {', '.join(both)}.")
    limit = getattr(tokenizer, "model_max_length", None)
    if sequence_length < 2 or (limit is not None and sequence_length > limit):
        most = ""
        if limit is not None and limit <= 2**31:  # of a tokenizer without a limit it is 10^30
            most = f" and at most {limit}, the longest sequence of the tokenizer's model"
        raise ConfigError(f"sequence_length is {sequence_length}; expected at least 2{most}.")


def usable_examples(
    language: str,
    use: str,
    parts: Mapping[str, list[Example]],
    usable: Mapping[str, list[Tokenized]],
    held_out: float,
    sequence_length: int,
) -> list[Tokenized]:
    """Return the examples for one use, or raise an error that says why there are none."""
    if usable[use]:
        return usable[use]
    if parts[use]:
        raise DataError(
            f"Language {language!r} has no usable reply tokens: none of its {len(parts[use])} "
            f"{use} examples has a reply that begins within {sequence_length} tokens. The first "
            f"reply is {parts[use][0].reply[:60]!r}. Check the columns, or raise "
            "sequence_length if the model reads longer ones."
        )
    advice = "lower held_out" if use == "train" else "raise held_out"
    raise DataError(
        f"Language {language!r} has no {use} examples at held_out={held_out}: its other part has "
        f"{sum(map(len, parts.values()))}. Give it more data, or {advice}."
    )


def report_on(
    language: str,
    seen: bool,
    parts: Mapping[str, list[Example]],
    tokens: Mapping[str, list[Tokenized]],
    usable: Mapping[str, list[Tokenized]],
    **counts: int,
) -> LanguageReport:
    """Describe what became of a language's records; `counts` are fields of the report."""
    everything = [t for part in tokens.values() for t in part]
    kept = [t for part in usable.values() for t in part]
    lengths = np.array([t.length for t in everything])
    replies = {
        use: [
            normalise(example.reply)
            for example, t in zip(parts[use], tokens[use], strict=True)
            if t.loss_mask.any()
        ]
        for use in parts
    }
    trained_replies = set(replies["train"])
    return LanguageReport(
        language=language,
        seen=seen,
        train=len(usable["train"]),
        held_out=len(usable["held_out"]),
        replies_in_train=sum(reply in trained_replies for reply in replies["held_out"]),
        truncated=sum(t.truncated for t in kept),
        dropped=len(everything) - len(kept),
        spelled=dict(Counter(token for t in everything for token in t.spelled)),
        tokens_min=int(lengths.min()),
        tokens_median=float(np.median(lengths)),
        tokens_p95=float(np.percentile(lengths, 95)),
        tokens_max=int(lengths.max()),
        **counts,
    )
