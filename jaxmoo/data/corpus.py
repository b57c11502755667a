"""The whole way from a source to tokenised training and held-out examples, with a report."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxmoo.config.data_section import DataConfig, check_data
from jaxmoo.data.language import (
    LanguageReport,
    TokenizedLanguage,
    open_streams,
    read_beginning,
    read_whole,
)
from jaxmoo.data.readers import Readers
from jaxmoo.data.sources.records import Origin
from jaxmoo.data.sources.source import Source, origins_of
from jaxmoo.data.split import Share, alone
from jaxmoo.data.streaming import ExampleStream, Place
from jaxmoo.data.table import text_table
from jaxmoo.data.token_cache import CachePlace, Kept, TokenCache, cache_key, open_cache
from jaxmoo.data.tokenization.tokenize import Tokenized
from jaxmoo.errors import ConfigError
from jaxmoo.runtime.cores import available_cores
from jaxmoo.runtime.peers import Peers, all_peers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Corpus", "LanguageReport", "load_corpus"]


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
      readers: which process reads which stream; None where each reads all that is asked for.
    """

    train: Mapping[str, Sequence[Tokenized] | ExampleStream]
    held_out: Mapping[str, Sequence[Tokenized]]
    report: dict[str, LanguageReport]
    complaints: tuple[str, ...] = ()
    special_tokens: str = "text"
    sources: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    readers: Readers | None = None

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
    reads: Collection[str] | None = None,
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
      reads: the languages of whose rows this process makes some. Then streams are divided among
        the processes: each reads these alone. By default each reads all.

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
    peers = all_peers() if peers is None else peers
    if not data.streaming:
        return _in_memory(data, tokenizer, source, say, peers)
    return _streamed(data, tokenizer, source, say, peers, reads)


def _streamed(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    source: Source | None,
    say: Callable[[str], None],
    peers: Peers,
    reads: Collection[str] | None,
) -> Corpus:
    """A corpus that is read while training goes on."""
    readers = None
    # Drawn languages are others in every step, and to know where they are takes reading them.
    if reads is not None and peers.count > 1 and not data.samples:
        readers = Readers([*data.seen, *data.unseen], reads, peers)
    read_here = None if readers is None else {*readers.mine, *readers.first}
    complaints: list[str] = []

    def opened() -> dict[str, ExampleStream]:
        return open_streams(data, tokenizer, source, say, read_here)

    streams = opened() if readers is None else readers.all_do(opened)

    def read(language: str, complaints: list[str]) -> Kept:
        return read_beginning(streams[language], data, complaints).kept(data)

    if readers is None:
        parts = {language: read(language, complaints) for language in streams}
    else:
        parts, complaints = readers.beginnings(read)
    for language, part in parts.items():
        streams[language].scanned(part.about["records"] + part.about["skipped"])
    return dataclasses.replace(_corpus(data, parts, complaints, streams), readers=readers)


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

    def make(some: Sequence[str], share: Share) -> Iterator[TokenizedLanguage]:
        complaints.clear()
        shown = peers.number == 0
        return read_whole(data, tokenizer, source, complaints, some, share, cores, shown)

    def make_all() -> dict[str, Kept]:
        return {one.language: one.kept(data) for one in make(languages, alone)}

    cache = _cache(data, tokenizer, source, languages, peers)
    if cache is None:
        return _corpus(data, make_all(), complaints)
    parts, complaints[:], damage = cache.read()
    if damage:
        say(f"The tokenised data that was kept is damaged, and made anew: {damage}.")
    if not cache.everyone(bool(parts)):

        def work() -> None:
            for one in make(cache.mine, peers.union) if cache.mine else ():
                parts[one.language] = cache.keep(one.language, one.kept(data))

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


def _corpus(
    data: DataConfig,
    parts: Mapping[str, Kept],
    complaints: Sequence[str],
    streams: Mapping[str, ExampleStream] | None = None,
) -> Corpus:
    tables = {code: parts[code].tables for code in (*data.seen, *data.unseen)}
    return Corpus(
        {code: streams[code] if streams else tables[code]["train"] for code in data.seen},
        {code: some["held_out"] for code, some in tables.items() if "held_out" in some},
        {code: LanguageReport(**parts[code].about) for code in tables},
        tuple(complaints),
        data.special_tokens,
        tuple(str(one.source) for one in data.each),
        None if data.weights is None else tuple(data.weights),
    )


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
