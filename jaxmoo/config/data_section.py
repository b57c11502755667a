"""The settings of the data; a section of :mod:`jaxmoo.config.training`."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field, with a factory for lists and mappings.

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Collection, Mapping
from typing import Any

from jaxmoo.config.field_text import check_texts
from jaxmoo.config.schema import MISSING, Range, setting
from jaxmoo.config.several_sources import check_entry, with_entry
from jaxmoo.errors import ConfigError, did_you_mean
from jaxmoo.registry import check_options, imported, is_path

__all__ = [
    "ColumnsConfig",
    "DataConfig",
    "LengthsConfig",
    "SamplingConfig",
    "check_data",
    "check_shares",
    "is_date",
]

_AT_LEAST_1 = Range(least=1)
_POSITIVE = Range(above=0)
_FRACTION = Range(least=0, below=1)
_TEXTS = "text, or texts by language such as {en: '{question}', fr: '{question}'}"


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """Columns with names other than `messages`, `prompt` and `completion`, or `text`."""

    messages: str | None = setting(
        None, "Column with the conversation, a list of `{role, content}`."
    )
    prompt: str | None = setting(None, "Column with what the user says.")
    completion: str | None = setting(None, "Column with the reply that is learnt.")
    text: str | None = setting(None, "Column with plain text, all of which is learnt.")
    group: str | None = setting(
        None,
        "Column that names what belongs together, such as translations of one text: a group is "
        "held out as a whole.",
    )


@dataclasses.dataclass(frozen=True)
class LengthsConfig:
    """Examples that are too short or too long to be used, for training and evaluation."""

    min_characters: int | None = setting(
        None, "Least characters of an example, prompt and reply together.", within=_AT_LEAST_1
    )
    max_characters: int | None = setting(
        None, "Most characters of an example, prompt and reply together.", within=_AT_LEAST_1
    )
    min_tokens: int | None = setting(
        None, "Least tokens of an example as the chat template renders it.", within=_AT_LEAST_1
    )
    max_tokens: int | None = setting(
        None,
        "Most tokens of an example as the chat template renders it; what is longer than "
        "`data.sequence_length` only is truncated.",
        within=_AT_LEAST_1,
    )


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How often a language takes part, where `data.languages_per_step` is less than all."""

    temperature: float | None = setting(
        None,
        "Shares in proportion to the number of examples to the power of 1 / temperature: 1 follows "
        "the data, higher is more even. null, without weights, is even.",
        within=_POSITIVE,
    )
    weights: dict[str, float] | None = setting(
        None, "Shares by language, such as `{ja: 2}`; a language not named has 1."
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The examples of every language."""

    source: str | None = setting(
        None,
        "Where the examples come from: `chatterbot` (built in), a file pattern such as "
        "`data/{language}.jsonl` (also .json, .parquet, .csv, and those of text as .gz or .zst), a "
        "directory of such files, the id of a data set on a Hugging Face hub, or "
        "`package.module:object`, one of your own: a function or class of `options`, or a source. "
        "Either this or `data.sources` must be given.",
    )
    options: dict[str, Any] = setting({}, "Options of a source of your own, such as `{seed: 7}`.")
    sources: list[dict[str, Any]] = setting(
        [],
        "Several sources instead of one: mappings with `source` and, where they differ from those "
        "below, `options`, `columns`, `prompt`, `completion`, `system`, `codes`, "
        "`language_column`, `subset`, `split`. `weight`, of all of them or of none, is a source's "
        "share of a language's training examples; without, every example counts alike.",
    )
    held_out_source: Any = setting(
        None,
        "Where held-out examples come from, if not from the training data: as `data.source`, or a "
        "mapping as in `data.sources`, such as `{split: validation}`. Then `data.held_out` has no "
        "effect.",
        expected="text, or a mapping such as {split: validation}",
    )
    seen: list[str] = setting(
        MISSING, "Languages to train on, by their code in the data. Each gives one gradient."
    )
    unseen: list[str] = setting(
        [], "Languages that are only evaluated, before and after, to see what transfers."
    )
    batch_size: int = setting(
        4, "Rows per language and step; a row is one example unless packed.", within=_AT_LEAST_1
    )
    sequence_length: int = setting(
        512, "Tokens per row; longer examples are truncated.", within=Range(least=2)
    )
    packing: bool = setting(
        False,
        "Fill every row with as many whole examples of its language as fit, which do not see each "
        "other; otherwise a row is one example, padded.",
    )
    languages_per_step: int | None = setting(
        None,
        "Seen languages that take part in a step, drawn anew for each; null takes all.",
        within=_AT_LEAST_1,
    )
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    chat_template: str | None = setting(
        None, "File with a chat template (Jinja) to use instead of the tokenizer's."
    )
    date: str | None = setting(
        None,
        "Date seen by a chat template that reads the clock (`strftime_now`), such as "
        "2026-07-26. null is the day on which the run begins, which the run's own `config.yaml` "
        "records.",
    )
    max_malformed: float = setting(
        0.0,
        "Largest share of a language's records that may be malformed; they are left out, counted "
        "and reported. At 0 the first one is an error.",
        within=_FRACTION,
    )
    special_tokens: str = setting(
        "text",
        "What becomes of text in the data that spells a special token, such as `<|im_end|>`: "
        "`text` learns it as the text it is, `tokens` makes a token of it, which may end a turn.",
        choices=("text", "tokens"),
    )
    streaming: bool = setting(
        False,
        "Read records while training goes on, in pieces of `shuffle_buffer`, instead of reading, "
        "splitting and tokenising all of them before the first step. For data that memory does not "
        "hold: .jsonl, .csv, .parquet and hub data sets. How many examples there are is then not "
        "known: `max_held_out` is needed, and duplicates are found within a piece only.",
    )
    shuffle_buffer: int = setting(
        1000,
        "Streaming: records of a language that are read, shuffled (and packed) together.",
        within=_AT_LEAST_1,
    )
    max_scan: int = setting(
        100_000,
        "Streaming: the most records that are read at the beginning to find a language's "
        "`max_held_out` examples.",
        within=_AT_LEAST_1,
    )
    held_out: float = setting(
        0.1,
        "Share of a seen language's examples that is kept from training, for evaluation.",
        within=Range(above=0, below=1),
    )
    max_held_out: int | None = setting(
        None, "Most examples evaluated per language; null evaluates all.", within=_AT_LEAST_1
    )
    train_unevaluated: bool = setting(
        False,
        "Train on the held-out examples beyond `data.max_held_out`, which are used for nothing "
        "otherwise, but for those that share a prompt, group or reply with one that is evaluated.",
    )
    disjoint_replies: bool = setting(
        False,
        "Hold out every example that shares its reply with a held-out one. Right where prompts "
        "paraphrase one another, wrong where replies are labels.",
    )
    codes: dict[str, str] = setting(
        {}, "The data's own names for languages, where they differ, such as `{pt: por_Latn}`."
    )
    language_column: str | None = setting(
        None, "Column that names the language, where one table holds them all."
    )
    subset: str | None = setting(
        None,
        "Subset (configuration) of a hub data set; `{language}` stands for the language. null "
        "takes the one named after the language, unless a column or split tells languages apart.",
    )
    split: str = setting("train", "Split of a hub data set; `{language}` stands for the language.")
    columns: ColumnsConfig = dataclasses.field(default_factory=ColumnsConfig)
    prompt: Any = setting(
        None,
        "Text of a prompt with columns in it, such as `'{context}\\n\\n{question}'`, instead of a "
        "column.",
        expected=_TEXTS,
    )
    completion: Any = setting(
        None, "Text of a reply with columns in it, such as `'{answers.text[0]}'`.", expected=_TEXTS
    )
    system: Any = setting(
        None,
        "Text of a system message before every conversation that has none, with or without columns "
        "in it.",
        expected=_TEXTS,
    )
    lengths: LengthsConfig = dataclasses.field(default_factory=LengthsConfig)

    cache: str = setting(
        "auto",
        "Directory in which tokenised data is kept, so that the next start, or the other processes "
        "of a run, need only read it: `auto` is `tokens` in the user's cache directory "
        "(`$JAXMOO_CACHE`), `none` keeps nothing. One in a bucket serves all machines: each copies "
        "what it needs to `auto`. Streams are not kept.",
        free=True,
    )

    @property
    def each(self) -> list[DataConfig]:
        """Settings of every source by itself."""
        return [with_entry(self, entry, ColumnsConfig) for entry in self.sources] or [self]

    @property
    def own_held_out(self) -> DataConfig | None:
        """Settings of the source of held-out examples, where they have one."""
        entry = self.held_out_source
        if entry is None:
            return None
        return with_entry(
            self, {"source": entry} if isinstance(entry, str) else entry, ColumnsConfig
        )

    @property
    def weights(self) -> list[float] | None:
        """Weights of the sources; None without any."""
        found = [entry["weight"] for entry in self.sources if entry.get("weight") is not None]
        return found or None

    @property
    def named(self) -> str:
        """The source, or all of them, for people."""
        return ", ".join(str(one.source) for one in self.each)

    @property
    def samples(self) -> bool:
        """Whether a step has some of the seen languages only."""
        return self.languages_per_step is not None and self.languages_per_step < len(self.seen)

    @property
    def step_languages(self) -> int:
        """Number of languages of a step."""
        return self.languages_per_step or len(self.seen)


def is_date(text: str) -> bool:
    """Whether a text is a date as settings have it.

    Example:
      >>> is_date("2026-07-26"), is_date("26.7.2026"), is_date("20260726")
      (True, False, False)
    """
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


# Languages name files, metrics and plots.
_CODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def check_data(data: DataConfig) -> list[str]:
    """Return what the settings of the data contradict each other in."""
    problems = _check_sources(data) + _check_lengths(data.lengths)
    if not data.seen:
        problems.append("data.seen is empty: name at least one language to train on.")
    for name, codes in (("seen", data.seen), ("unseen", data.unseen)):
        twice = sorted({code for code in codes if codes.count(code) > 1})
        if twice:
            problems.append(f"data.{name} names {', '.join(twice)} more than once.")
        odd = [code for code in codes if not _CODE.fullmatch(code)]
        if odd:
            problems.append(
                f"data.{name}: expected language codes of letters, digits, - and _, found "
                f"{', '.join(map(repr, odd))}."
            )
    both = sorted(set(data.seen) & set(data.unseen))
    if both:
        problems.append(
            f"{', '.join(both)} in both data.seen and data.unseen: a language is one or the other."
        )
    if data.date is not None and not is_date(data.date):
        problems.append(f"data.date is {data.date!r}, expected a date such as 2026-07-26.")
    return problems + _check_streaming(data) + _check_sampling(data)


def _check_sources(data: DataConfig) -> list[str]:
    if not data.sources:
        if data.source is None:
            return ["data.source is missing (Where the examples come from)."]
    elif data.source is not None:
        return ["data takes either source or sources, not both."]
    columns = [field.name for field in dataclasses.fields(ColumnsConfig)]
    entries = {f"data.sources[{number}]": entry for number, entry in enumerate(data.sources)}
    problems = [f"{name} names no source." for name in entries if not entries[name].get("source")]
    if isinstance(data.held_out_source, dict):
        entries["data.held_out_source"] = data.held_out_source
    elif isinstance(data.held_out_source, str):
        entries["data.held_out_source"] = {"source": data.held_out_source}
    elif data.held_out_source is not None:
        problems.append(
            f"data.held_out_source must be text or a mapping, found {data.held_out_source!r}."
        )
    for name, entry in entries.items():
        problems += check_entry(name, entry, columns)
    if problems:
        return problems
    if data.weights is not None and len(data.weights) != len(data.sources):
        problems.append(
            f"data.sources: {len(data.weights)} of {len(data.sources)} sources have a weight: give "
            "one to all of them, or to none."
        )
    names = list(entries) if data.sources else ["data", *entries]
    every, own = data.each, data.own_held_out
    if own is not None:
        every.append(own)
        if own.source is None:
            problems.append(
                "data.held_out_source names no source, and of data.sources there are several."
            )
    for name, one in zip(names, every, strict=True):
        problems += _check_shape(name, one) + _check_own(name, one)
        if entries.get(name, {}).get("options") and not is_path(str(one.source)):
            problems.append(_no_options(f"{name}.options", str(one.source)))
    if data.options and not any(is_path(str(one.source)) for one in every):
        problems.append(_no_options("data.options", data.named))
    return problems


def _no_options(name: str, source: str) -> str:
    return f"{name} are those of a source of your own, package.module:object; {source} takes none."


def _check_own(name: str, data: DataConfig) -> list[str]:
    """What is wrong with what one source is imported from, if it is, before it is made."""
    path = str(data.source)
    if not is_path(path):
        return []
    try:
        found = imported(path, "data source")
        if callable(found):
            check_options(found, "data source", path, data.options)
        elif data.options:
            return [f"{name}.options cannot change the ready-made data source {path!r}."]
    except ConfigError as error:
        return [f"{name}.source: {error}"]
    return []


def _check_shape(name: str, data: DataConfig) -> list[str]:
    """What contradicts each other in how one source's records become examples."""
    columns, problems = data.columns, []
    kinds = [columns.messages, columns.prompt or columns.completion, columns.text]
    if sum(kind is not None for kind in kinds) > 1:
        problems.append(
            f"{name}.columns takes either messages or prompt and completion or text: name columns "
            "of one kind only."
        )
    for key in ("prompt", "completion"):
        if getattr(data, key) is not None and getattr(columns, key) is not None:
            problems.append(f"{name} takes either {key} or columns.{key}, not both.")
    if (data.prompt or data.completion) is not None and (columns.messages or columns.text):
        problems.append(
            f"{name}.prompt and {name}.completion make a prompt and its reply: remove "
            f"{name}.columns.messages and {name}.columns.text."
        )
    # One of several sources may lack languages; whether it does is known when it is read.
    languages = [] if name.startswith("data.sources") else [*data.seen, *data.unseen]
    for key in ("prompt", "completion", "system"):
        problems += check_texts(f"{name}.{key}", getattr(data, key), languages)
    return problems


def _check_lengths(lengths: LengthsConfig) -> list[str]:
    problems = []
    for unit in ("characters", "tokens"):
        least, most = (getattr(lengths, f"{end}_{unit}") for end in ("min", "max"))
        if least is not None and most is not None and least > most:
            problems.append(f"data.lengths.min_{unit} is {least}, more than max_{unit}, {most}.")
    return problems


def _check_streaming(data: DataConfig) -> list[str]:
    if not data.streaming:
        return []
    wrong = {
        "data.max_held_out must be set": data.max_held_out is None,
        "data.disjoint_replies must be false": data.disjoint_replies,
        "data.train_unevaluated must be false": data.train_unevaluated,
        "data.sampling.temperature must be null (give weights)": data.sampling.temperature
        is not None,
    }
    problems = [
        f"data.streaming: {text}, for nobody knows all the examples of a stream."
        for text, found in wrong.items()
        if found
    ]
    if data.sources or data.held_out_source is not None:
        problems.append(
            "data.streaming reads one source, and holds out examples of its own: set data.source, "
            "and no data.sources and data.held_out_source, or set data.streaming=false."
        )
    return problems


def check_shares(name: str, shares: Mapping[str, float], seen: Collection[str]) -> list[str]:
    """Return what is wrong with a setting that gives seen languages a number above 0."""
    problems = []
    for code, share in shares.items():
        if code not in seen:
            problems.append(
                f"{name} names {code!r}, which is not in data.seen.{did_you_mean(code, seen)}"
            )
        if share not in _POSITIVE:
            problems.append(f"{name}.{code} must be above 0, found {share}.")
    return problems


def _check_sampling(data: DataConfig) -> list[str]:
    k, num, problems = data.languages_per_step, len(data.seen), []
    if k is not None and k > num:
        problems.append(f"data.languages_per_step is {k}, but data.seen has {num} languages.")
    sampling = data.sampling
    if sampling.temperature is not None and sampling.weights is not None:
        problems.append("data.sampling takes either temperature or weights, not both.")
    problems += check_shares("data.sampling.weights", sampling.weights or {}, data.seen)
    if not data.samples and sampling != SamplingConfig():
        problems.append(
            "data.sampling has no effect when every language takes part in every step; set "
            "data.languages_per_step below the number of languages."
        )
    return problems
