"""The whole way from a source to tokenised training and held-out examples, with a report."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxmoo.config.data_section import DataConfig, check_data
from jaxmoo.data.division import divide
from jaxmoo.data.example import Example, normalise
from jaxmoo.data.lengths import fits_tokens
from jaxmoo.data.mixture import in_shares
from jaxmoo.data.sources.records import Malformed, Origin
from jaxmoo.data.sources.source import Source, open_source, origins_of
from jaxmoo.data.split import Share, alone
from jaxmoo.data.streaming import ExampleStream, Place
from jaxmoo.data.table import text_table
from jaxmoo.data.token_cache import CachePlace, Kept, TokenCache, cache_key, open_cache
from jaxmoo.data.token_table import TokenTable
from jaxmoo.data.tokenization.parallel import Tokenizing, available_cores
from jaxmoo.data.tokenization.tokenize import Tokenized
from jaxmoo.errors import ConfigError, DataError
from jaxmoo.runtime.peers import Peers, all_peers
from jaxmoo.runtime.watching import watched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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


@dataclass(frozen=True)
class Corpus:
    """Tokenised examples per language.

    Attributes:
      train: per seen language the examples to train on, or a stream of them.
      held_out: per seen and unseen language the examples to evaluate.
      report: per seen and unseen language what became of its records.
      complaints: what is wrong with each malformed record that was left out.
      special_tokens: what was made of texts that spell special tokens: ``text`` or ``tokens``.
      sources: where the examples come from.
      weights: shares of the sources in an epoch; None where every example occurs once.
    """

    train: Mapping[str, Sequence[Tokenized] | ExampleStream]
    held_out: Mapping[str, Sequence[Tokenized]]
    report: dict[str, LanguageReport]
    complaints: tuple[str, ...] = ()
    special_tokens: str = "text"
    sources: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None

    def at_hand(self) -> dict[str, Sequence[Tokenized]]:
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
        filtered = any(r.filtered for r in self.report.values())
        if filtered:
            header.insert(4, "filtered")
        rows = [
            [
                r.language if r.seen else f"{r.language} (unseen)",
                r.records,
                r.skipped,
                r.duplicates,
                *([r.filtered] if filtered else []),
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
        lines = [text_table(header, rows), *self._by_source(), *self._unused()]
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

    def _by_source(self) -> list[str]:
        """Lines about what several sources give to each language."""
        if len(self.sources) < 2:
            return []
        rows = [[r.language, *r.by_source] for r in self.report.values() if r.seen]
        weighed = ""
        if self.weights is not None:
            shares = [weight / sum(self.weights) for weight in self.weights]
            weighed = ", in an epoch repeated up to shares of " + " and ".join(
                f"{share:.1%}" for share in shares
            )
        return [
            f"Training examples by source{weighed}:",
            text_table(["language", *self.sources], rows),
        ]

    def _unused(self) -> list[str]:
        """A line about held-out examples that nothing uses."""
        unused = {r.language: r.reserve for r in self.report.values() if r.seen and r.reserve}
        if not unused:
            return []
        return [
            f"Held out but unused, being more than data.max_held_out: {sum(unused.values()):,} "
            f"examples ({', '.join(f'{code} {n:,}' for code, n in unused.items())}). "
            "data.train_unevaluated=true trains on them."
        ]


def load_corpus(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    source: Source | None = None,
    say: Callable[[str], None] = print,
    peers: Peers | None = None,
) -> Corpus:
    """Read, deduplicate, split and tokenise the examples of a run.

    Seen languages are split by a hash of their prompts (`split_examples`). In memory, every example
    of an unseen language may be evaluated; a held-out example that occurs, prompt and reply, among
    the training examples of any language is dropped, and so is one whose group is trained on.

    With ``data.streaming`` no more is read than the first ``data.max_held_out`` held-out examples
    need. An example is on the side on which it is in memory (but for prompts that several groups
    share, which cannot be linked). Unseen languages are divided, too, so that nothing is evaluated
    whose translation or copy is trained on elsewhere.

    What is tokenised in memory is kept in ``data.cache`` and read from there the next time. Where
    several processes see one such directory, each reads and tokenises some of the languages.

    Args:
      data: the settings.
      tokenizer: a fast tokenizer with a chat template.
      source: where the records come from, if not from ``data.source``.
      say: called with lines about progress, and malformed records of a stream that come later.
      peers: the processes that load the same corpus, all of them; by default those of the run.

    Returns:
      The tokenised examples and the report; of streams, about the records read so far.

    Raises:
      ConfigError: settings that contradict each other, or a source that cannot be streamed.
      DataError: the source cannot be used, or a language is left without examples.
      DownloadError: the built-in corpus could not be fetched.
    """
    if problems := check_data(data):
        raise ConfigError("\n".join(problems))
    _check_sizes(data, tokenizer)
    if not data.streaming:
        return _in_memory(data, tokenizer, source, say, all_peers() if peers is None else peers)
    train: dict[str, ExampleStream] = {}
    evaluated: dict[str, TokenTable] = {}
    report: dict[str, LanguageReport] = {}
    complaints: list[str] = []
    for one in _streamed(data, tokenizer, source, complaints, say):
        language = one.language
        part = _part(one, data)
        if one.stream is not None and language in data.seen:
            train[language] = one.stream
        if "held_out" in part.tables:
            evaluated[language] = part.tables["held_out"]
        report[language] = LanguageReport(**part.about)
    return _described(data, train, evaluated, report, complaints)


def _in_memory(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    source: Source | None,
    say: Callable[[str], None],
    peers: Peers,
) -> Corpus:
    """A corpus that is read whole, now, or from what was kept of it."""
    languages = [*data.seen, *data.unseen]
    cores = max(1, available_cores() // peers.here())
    complaints: list[str] = []

    def make(some: Sequence[str], share: Share) -> Iterator[_Divided]:
        complaints.clear()
        return _whole(data, tokenizer, source, complaints, some, share, cores, peers.number == 0)

    def make_all() -> dict[str, Kept]:
        return {one.language: _part(one, data) for one in make(languages, alone)}

    cache = _cache(data, tokenizer, source, languages, peers)
    if cache is None:
        parts = make_all()
        return _corpus(data, parts, complaints)
    parts, complaints[:], damage = cache.read()
    if damage:
        say(f"The tokenised data that was kept is damaged, and made anew: {damage}.")
    if not cache.everyone(bool(parts)):

        def work() -> None:
            for one in make(cache.mine, peers.union) if cache.mine else ():
                parts[one.language] = cache.keep(one.language, _part(one, data))

        try:
            peers.all_do(work)
        except BaseException:
            cache.abandon()
            raise
        parts |= cache.finish(complaints)
        complaints[:] = cache.complaints
        if cache.problem:
            say(f"Note: tokenised data cannot be kept: {cache.problem} (data.cache={data.cache}).")
            if len(parts) < len(languages):
                parts = make_all()
        elif cache.unsent:
            say(f"Note: tokenised data is not in {data.cache}: {cache.unsent}.")
    return _corpus(data, parts, complaints)


def _cache(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    source: Source | None,
    languages: Sequence[str],
    peers: Peers,
) -> TokenCache | None:
    """Where a corpus is kept; None where it is not, or a source may change unnoticed."""

    def look() -> tuple[CachePlace | None, dict[str, list[Origin]]]:
        origins = origins_of(data, languages, source)
        return None if origins is None else open_cache(data.cache), origins or {}

    place, origins = peers.all_do(look)
    everywhere = b"" not in peers.exchange(b"" if place is None else b"1")
    if place is None or not everywhere:
        return None
    key = cache_key(data, tokenizer, origins, peers)
    if len(set(peers.exchange(key.encode()))) > 1:  # a run of several will be told that they differ
        return None
    return TokenCache(place, key, languages, peers)


def _corpus(data: DataConfig, parts: Mapping[str, Kept], complaints: Sequence[str]) -> Corpus:
    tables = {code: parts[code].tables for code in (*data.seen, *data.unseen)}
    return _described(
        data,
        {code: tables[code]["train"] for code in data.seen},
        {code: some["held_out"] for code, some in tables.items() if "held_out" in some},
        {code: LanguageReport(**parts[code].about) for code in tables},
        complaints,
    )


def _described(
    data: DataConfig,
    train: Mapping[str, Sequence[Tokenized] | ExampleStream],
    held_out: Mapping[str, Sequence[Tokenized]],
    report: dict[str, LanguageReport],
    complaints: Sequence[str],
) -> Corpus:
    return Corpus(
        train,
        held_out,
        report,
        tuple(complaints),
        data.special_tokens,
        tuple(str(one.source) for one in data.each),
        None if data.weights is None else tuple(data.weights),
    )


def _part(divided: _Divided, data: DataConfig) -> Kept:
    """What of a language is used."""
    seen, uses = divided.language in data.seen, []
    if seen:
        uses.append("train")
    if data.held_out > 0 or not seen:
        uses.append("held_out")
    tables = {use: _usable(use, divided, data) for use in uses}
    if seen and divided.stream is None:
        tables["train"] = divided.in_shares(tables["train"], data.weights)
    return Kept(tables, _report(divided, seen, len(data.each)).to_dict())


class _Divided(NamedTuple):
    """A language's examples, divided and tokenised.

    Attributes:
      language: its code.
      parts: the examples to train on (``train``) and to evaluate (``held_out``).
      tokens: the same as tokens.
      counts: fields of the report.
      stream: what the training examples are the beginning of.
    """

    language: str
    parts: dict[str, list[Example]]
    tokens: dict[str, TokenTable]
    counts: dict[str, int]
    stream: ExampleStream | None = None

    def usable(self, use: str) -> TokenTable:
        """The examples for a use of which something can be learnt."""
        return self.tokens[use].chosen(self.tokens[use].learnt > 0)

    def sources(self) -> list[int]:
        """The number of the source of every usable example to train on."""
        pairs = zip(self.parts["train"], self.tokens["train"].learnt.tolist(), strict=True)
        return [example.source for example, learnt in pairs if learnt]

    def in_shares(self, usable: TokenTable, weights: Sequence[float] | None) -> TokenTable:
        """Examples to train on, repeated so that sources have the shares of their weights."""
        if weights is None:
            return usable
        return usable.repeated(in_shares(range(len(usable)), self.sources(), weights))


def _whole(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    source: Source | None,
    complaints: list[str],
    languages: Sequence[str],
    share: Share,
    cores: int,
    shown: bool,
) -> Iterator[_Divided]:
    """Languages whose records are all read before any is divided."""
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
            yield _Divided(language, parts, tokens, counts)


def _streamed(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    source: Source | None,
    complaints: list[str],
    say: Callable[[str], None],
) -> Iterator[_Divided]:
    """Languages that are read up to where enough held-out examples were found."""
    source = open_source(data) if source is None else source
    opened = {language: source.open(language) for language in (*data.seen, *data.unseen)}
    for language, records in opened.items():
        stream = ExampleStream(language, records, data, tokenizer, column=source.column, say=say)
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
        yield _Divided(
            language,
            {use: [example for example, _ in part] for use, part in found.items()},
            {use: TokenTable.of(tokens for _, tokens in part) for use, part in found.items()},
            counts,
            stream,
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
        stream.scanned(self.records + len(self.complaints))


def _check_sizes(data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise `ConfigError` for a length that the tokenizer's model does not take, or no size."""
    limit = getattr(tokenizer, "model_max_length", None)
    length = data.sequence_length
    if length < 2 or (limit is not None and length > limit):
        most = ""
        if limit is not None and limit <= 2**31:  # of a tokenizer without a limit it is 10^30
            most = f" and at most {limit}, the longest sequence of the tokenizer's model"
        raise ConfigError(f"sequence_length is {length}; expected at least 2{most}.")
    if data.max_held_out is not None and data.max_held_out < 1:
        raise ConfigError(f"max_held_out is a positive number or null, found {data.max_held_out}.")
    if data.shuffle_buffer < 1:
        raise ConfigError(f"shuffle_buffer is a positive number, found {data.shuffle_buffer}.")


def _usable(use: str, divided: _Divided, data: DataConfig) -> TokenTable:
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


def _report(divided: _Divided, seen: bool, num_sources: int) -> LanguageReport:
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
