"""A corpus that is streamed: held-out examples from its beginning, the rest as it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxmoo.data.corpus import (
    Corpus,
    LanguageReport,
    check_languages_and_length,
    report_on,
    usable_examples,
)
from jaxmoo.data.example import Example
from jaxmoo.data.records import check_columns
from jaxmoo.data.streaming import ExampleStream, Place
from jaxmoo.data.streams import open_streams
from jaxmoo.data.tokenize import Tokenized
from jaxmoo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def stream_corpus(
    source: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seen: Sequence[str],
    unseen: Sequence[str] = (),
    sequence_length: int,
    held_out: float = 0.1,
    max_held_out: int,
    shuffle_buffer: int = 1000,
    max_scan: int = 100_000,
    columns: Mapping[str, str | None] | None = None,
    codes: Mapping[str, str] | None = None,
    language_column: str | None = None,
    subset: str | None = None,
    split: str = "train",
    max_malformed: float = 0.0,
    special_tokens: str = "text",
    say: Callable[[str], None] = print,
) -> Corpus:
    """Open the examples of a run, reading no more of them than the held-out ones need.

    An example is on the side on which :func:`~jaxmoo.data.corpus.load_corpus` has it (but for
    prompts that several groups share, which only that can link). The first `max_held_out` of a
    language that are held out are evaluated; unseen languages are divided, too, so that nothing is
    evaluated whose translation or copy another language trains on.

    Args:
      source: as in :func:`~jaxmoo.data.streams.open_streams`.
      tokenizer: a fast tokenizer with a chat template.
      seen: codes of the languages to train on.
      unseen: codes of the languages that are only evaluated.
      sequence_length: the most tokens of an example.
      held_out: the fraction of each language's prompts that is kept from training.
      max_held_out: examples to evaluate per language; fewer if a language has no more.
      shuffle_buffer: records of a language that are read at a time, shuffled and freed from
        duplicates.
      max_scan: records to read at most to find a language's held-out examples.
      columns: as in :func:`~jaxmoo.data.sources.read_examples`, and so are `codes`,
        `language_column`, `subset`, `split` and `max_malformed`.
      special_tokens: as in :func:`~jaxmoo.data.tokenize.tokenize_all`.
      say: called with lines about malformed records that come later.

    Returns:
      The corpus, whose report tells about the records that were read to find the held-out ones.

    Raises:
      ConfigError: arguments that contradict each other, or a source that cannot be streamed.
      DataError: the source cannot be used, or a language is left without examples.
    """
    check_languages_and_length(seen, unseen, tokenizer, sequence_length)
    for name, number in (("max_held_out", max_held_out), ("shuffle_buffer", shuffle_buffer)):
        if number < 1:
            raise ConfigError(f"{name} is a positive number, found {number}.")
    names = {language: (codes or {}).get(language, language) for language in (*seen, *unseen)}
    mapped = check_columns(columns)
    opened = open_streams(
        source, names, language_column=language_column, subset=subset, split=split
    )
    streams = {
        language: ExampleStream(
            language,
            records,
            columns=mapped,
            tokenizer=tokenizer,
            sequence_length=sequence_length,
            held_out=held_out,
            size=shuffle_buffer,
            name=names[language],
            column=opened.column,
            max_malformed=max_malformed,
            special_tokens=special_tokens,
            say=say,
        )
        for language, records in opened.streams.items()
    }
    evaluated: dict[str, list[Tokenized]] = {}
    report: dict[str, LanguageReport] = {}
    complaints: list[str] = []
    for language, stream in streams.items():
        scan = _Scan(stream, max_held_out, max_scan)
        found = {"train": scan.train if language in seen else [], "held_out": scan.held_out}
        parts = {use: [example for example, _ in part] for use, part in found.items()}
        tokens = {use: [one for _, one in part] for use, part in found.items()}
        usable = {use: [t for t in part if t.loss_mask.any()] for use, part in tokens.items()}
        for use in ("train", "held_out") if language in seen else ("held_out",):
            usable_examples(language, use, parts, usable, held_out, sequence_length)
        evaluated[language] = usable["held_out"]
        complaints += scan.complaints
        report[language] = report_on(
            language,
            language in seen,
            parts,
            tokens,
            usable,
            records=scan.records,
            skipped=len(scan.complaints),
            duplicates=scan.duplicates,
            leaked=0,
            reserve=scan.reserve + (0 if language in seen else len(scan.train)),
        )
    train = {language: streams[language] for language in seen}
    return Corpus(train, evaluated, report, tuple(complaints), special_tokens)


class _Scan:
    """The beginning of a stream, up to where enough held-out examples were found."""

    def __init__(self, stream: ExampleStream, wanted: int, limit: int) -> None:
        self.train: list[tuple[Example, Tokenized]] = []
        self.complaints: list[str] = []
        self.records = self.duplicates = 0
        found: dict[tuple[str, str], tuple[Example, Tokenized]] = {}
        place, read = Place(), 0
        while len(found) < wanted:
            if read >= limit:
                raise DataError(
                    f"Language {stream.language!r}: the first {read:,} records of its stream have "
                    f"{len(found)} examples to hold out, fewer than data.max_held_out={wanted}. "
                    f"{'Lower it, or raise' if found else 'Raise'} data.held_out or data.max_scan."
                )
            piece = stream.read(place, limit - read)
            read += piece.passed
            self.train += piece.train
            new = {one[0].key: one for one in piece.held_out if one[0].key not in found}
            found |= new
            self.complaints += piece.complaints
            self.records += piece.records
            self.duplicates += piece.duplicates + len(piece.held_out) - len(new)
            place = piece.behind
            if piece.ended:
                break
        self.held_out = list(found.values())[:wanted]
        self.reserve = len(found) - len(self.held_out)
        stream.scanned(self.records + len(self.complaints))
