"""One language's examples, divided and tokenised, and what became of its records."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxmoo.config.data_section import DataConfig
from jaxmoo.data.division import divide
from jaxmoo.data.example import Example, normalise
from jaxmoo.data.lengths import fits_tokens
from jaxmoo.data.mixture import in_shares
from jaxmoo.data.sources.records import Malformed, Unopened
from jaxmoo.data.sources.source import Source, open_source
from jaxmoo.data.split import Share
from jaxmoo.data.streaming import ExampleStream, Place
from jaxmoo.data.token_cache import Kept
from jaxmoo.data.token_table import TokenTable
from jaxmoo.data.tokenization.parallel import Tokenizing
from jaxmoo.data.tokenization.tokenize import Tokenized
from jaxmoo.errors import DataError
from jaxmoo.runtime.watching import watched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["LanguageReport", "TokenizedLanguage", "open_streams", "read_beginning", "read_whole"]

_MANY = 2000  # examples, from which on progress is shown


@dataclass(frozen=True)
class LanguageReport:
    """What became of one language's records.

    Attributes:
      language: its code.
      seen: whether it is trained on.
      records: examples in the source.
      skipped: records of the source that are malformed, or that the template cannot render.
      filtered: examples dropped for their length (``data.lengths``).
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
      by_source: of several sources, examples of `train` by the number of their source.
      spelled: special tokens that texts of both spell, by how often.
      tokens_min, tokens_median, tokens_p95, tokens_max: lengths of the rendered examples of both
        (and the dropped ones) before truncation.
    """

    language: str
    seen: bool
    records: int
    skipped: int
    filtered: int
    duplicates: int
    leaked: int
    train: int
    held_out: int
    reserve: int
    replies_in_train: int
    truncated: int
    dropped: int
    by_source: list[int]
    spelled: dict[str, int]
    tokens_min: int
    tokens_median: float
    tokens_p95: float
    tokens_max: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return asdict(self)


class TokenizedLanguage(NamedTuple):
    """A language's examples, divided and tokenised.

    Attributes:
      language: its code.
      parts: the examples to train on (``train``) and to evaluate (``held_out``).
      tokens: the same as tokens.
      counts: fields of the report.
    """

    language: str
    parts: dict[str, list[Example]]
    tokens: dict[str, TokenTable]
    counts: dict[str, int]

    def usable(self, use: str) -> TokenTable:
        """The examples for a use of which something can be learnt."""
        return self.tokens[use].chosen(self.tokens[use].learnt > 0)

    def kept(self, data: DataConfig) -> Kept:
        """Return what of it is used, and its report.

        Raises:
          DataError: nothing is left for a use.
        """
        seen, uses = self.language in data.seen, []
        if seen:
            uses.append("train")
        if data.held_out > 0 or not seen:
            uses.append("held_out")
        tables = {use: _usable(use, self, data) for use in uses}
        if seen:
            tables["train"] = self.in_shares(tables["train"], data.weights)
        return Kept(tables, _report(self, seen, len(data.each)).to_dict())

    def sources(self) -> list[int]:
        """The number of the source of every usable example to train on."""
        pairs = zip(self.parts["train"], self.tokens["train"].learnt.tolist(), strict=True)
        return [example.source for example, learnt in pairs if learnt]

    def in_shares(self, usable: TokenTable, weights: Sequence[float] | None) -> TokenTable:
        """Examples to train on, repeated so that sources have the shares of their weights."""
        if weights is None:
            return usable
        return usable.repeated(in_shares(range(len(usable)), self.sources(), weights))


def read_whole(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    source: Source | None,
    complaints: list[str],
    languages: Sequence[str],
    share: Share,
    cores: int,
    shown: bool,
) -> Iterator[TokenizedLanguage]:
    """Yield languages whose records are all read before any is divided.

    Args:
      data: the settings.
      tokenizer: a fast tokenizer with a chat template.
      source: where the records come from, if not from ``data.source``.
      complaints: takes what is wrong with each record left out.
      languages: the codes to read.
      share: as in :func:`~jaxmoo.data.division.divide`.
      cores: how many tokenise.
      shown: whether progress is shown where there is much to do.

    Raises:
      ConfigError, DataError: the data cannot be used as asked.
    """
    divided = divide(data, languages, complaints, source=source, share=share)
    number = sum(len(found.train) + len(found.held_out) for found in divided.values())
    with (
        Tokenizing(
            tokenizer, data.sequence_length, data.special_tokens, expected=number, cores=cores
        ) as tokenizing,
        watched(number, "tokenising", unit="example", shown=number >= _MANY and shown) as advance,
    ):
        for language, found in divided.items():
            # The limit leaves the rest unused, so that what is trained on does not depend on how
            # much is evaluated, unless data.train_unevaluated.
            parts = {"train": found.train, "held_out": found.held_out}
            total = found.records + found.skipped
            malformed = Malformed(
                f"language {language!r}", data.max_malformed, found.skipped, total
            )
            tokens = {}
            filtered = found.filtered
            for use, part in parts.items():
                good, table = tokenizing.tokenize(part, malformed, advance)
                fitting = [fits_tokens(length, data.lengths) for length in table.lengths.tolist()]
                parts[use] = list(itertools.compress(good, fitting))
                tokens[use] = table.chosen(np.array(fitting, bool))
                filtered += len(good) - len(parts[use])
            bad = len(malformed.complaints)
            complaints += malformed.complaints
            counts = {
                "records": found.records - bad,
                "skipped": found.skipped + bad,
                "filtered": filtered,
                "duplicates": found.duplicates,
                "leaked": found.leaked,
                "reserve": found.reserve,
            }
            yield TokenizedLanguage(language, parts, tokens, counts)


def open_streams(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    source: Source | None,
    say: Callable[[str], None],
    reads: Collection[str] | None = None,
) -> dict[str, ExampleStream]:
    """Return the streams of all languages.

    Args:
      data: the settings.
      tokenizer: a fast tokenizer with a chat template.
      source: where the records come from, if not from ``data.source``.
      say: called with lines about malformed records that are found later.
      reads: the languages that this process reads; others are opened only if they are read after
        all. By default all.

    Raises:
      ConfigError, DataError: the source cannot be opened.
    """
    source = open_source(data) if source is None else source
    opened = {
        language: source.open(language)
        if reads is None or language in reads
        else Unopened(functools.partial(source.open, language))
        for language in (*data.seen, *data.unseen)
    }
    return {
        language: ExampleStream(language, records, data, tokenizer, column=source.column, say=say)
        for language, records in opened.items()
    }


def read_beginning(
    stream: ExampleStream, data: DataConfig, complaints: list[str]
) -> TokenizedLanguage:
    """Read a stream up to where enough held-out examples were found.

    Args:
      stream: of a language.
      data: the settings.
      complaints: takes what is wrong with each record left out.

    Raises:
      DataError: the data cannot be used as asked, or has too few examples.
    """
    language = stream.language
    scan = _Scan(stream, data)
    train = scan.train if language in data.seen else []
    found = {"train": train, "held_out": scan.held_out}
    complaints += scan.complaints
    counts = {
        "records": scan.records,
        "skipped": len(scan.complaints),
        "filtered": scan.filtered,
        "duplicates": scan.duplicates,
        "leaked": 0,
        "reserve": scan.reserve + len(scan.train) - len(train),
    }
    return TokenizedLanguage(
        language,
        {use: [example for example, _ in part] for use, part in found.items()},
        {use: TokenTable.of(tokens for _, tokens in part) for use, part in found.items()},
        counts,
    )


class _Scan:
    """The beginning of a stream, up to where enough held-out examples were found."""

    def __init__(self, stream: ExampleStream, data: DataConfig) -> None:
        wanted, limit = data.max_held_out, data.max_scan
        assert wanted is not None  # `check_data` asks for it
        self.train: list[tuple[Example, Tokenized]] = []
        self.complaints: list[str] = []
        self.records = self.duplicates = self.filtered = 0
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
            self.filtered += piece.filtered
            self.duplicates += piece.duplicates + len(piece.held_out) - len(new)
            place = piece.behind
            if piece.ended:
                break
        self.held_out = list(found.values())[:wanted]
        self.reserve = len(found) - len(self.held_out)


def _usable(use: str, divided: TokenizedLanguage, data: DataConfig) -> TokenTable:
    """The examples for one use, or an error that says why there are none."""
    usable, part, language = divided.usable(use), divided.parts[use], divided.language
    if usable:
        return usable
    if part:
        raise DataError(
            f"Language {language!r} has no usable reply tokens: none of its {len(part)} "
            f"{use} examples has a reply that begins within {data.sequence_length} tokens. The "
            f"first reply is {part[0].reply[:60]!r}. Check the columns, or raise "
            "sequence_length if the model reads longer ones."
        )
    advice = "lower held_out" if use == "train" else "raise held_out"
    if use == "held_out" and data.held_out_source is not None:
        raise DataError(
            f"Language {language!r} has no held-out examples: data.held_out_source has none of it "
            f"that is not trained on, too ({divided.counts['leaked']} are)."
        )
    raise DataError(
        f"Language {language!r} has no {use} examples at held_out={data.held_out}: its other part "
        f"has {sum(map(len, divided.parts.values()))}. Give it more data, or {advice}."
    )


def _report(divided: TokenizedLanguage, seen: bool, num_sources: int) -> LanguageReport:
    """What became of a language's records."""
    parts, tokens = divided.parts, divided.tokens
    usable = {use: divided.usable(use) for use in parts}
    lengths = np.concatenate([table.lengths for table in tokens.values()])
    spelled = Counter[str]()
    for table in tokens.values():
        spelled.update(table.spelled())
    replies = {
        use: [
            normalise(example.reply)
            for example, learnt in zip(parts[use], tokens[use].learnt.tolist(), strict=True)
            if learnt
        ]
        for use in parts
    }
    trained_replies = set(replies["train"])
    by_source = Counter(divided.sources())
    return LanguageReport(
        language=divided.language,
        seen=seen,
        train=len(usable["train"]),
        held_out=len(usable["held_out"]),
        replies_in_train=sum(reply in trained_replies for reply in replies["held_out"]),
        truncated=sum(int(table.truncated.sum()) for table in usable.values()),
        dropped=len(lengths) - sum(map(len, usable.values())),
        by_source=[by_source[number] for number in range(num_sources)],
        spelled=dict(spelled),
        tokens_min=int(lengths.min()),
        tokens_median=float(np.median(lengths)),
        tokens_p95=float(np.percentile(lengths, 95)),
        tokens_max=int(lengths.max()),
        **divided.counts,
    )
