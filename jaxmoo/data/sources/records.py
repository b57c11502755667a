"""Records: streams of them, what one holds by its columns, and those that are malformed."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxmoo.config.data_section import DataConfig
from jaxmoo.config.field_text import Field, by_language, parse_text
from jaxmoo.data.example import Example, checked_text, identifier, listed
from jaxmoo.data.sources.field_text import fill
from jaxmoo.errors import ConfigError, DataError, did_you_mean, shown

# Where a record was found, "data/en.jsonl:12" or "data/en.parquet: row 12", and the record, or what
# is wrong with it; None for what the source is known to have that is no record.
Record = tuple[str, Mapping[str, Any] | DataError | None]

# Where the next record is, as JSON holds it; None is the beginning.
Position = Any


class MissingLanguageError(DataError):
    """A source has no such language."""


# What a record's content may be.
_CONTENTS = (("messages",), ("prompt", "completion"), ("text",))


class RecordStream(Iterator[Record], Protocol):
    """Records in their order, of which one is in memory at a time, or a block of the file.

    Reading raises `DataError` where the data cannot be read on, `OSError` where the device or the
    network fails.
    """

    def position(self) -> Position:
        """Return where the next record is."""
        ...

    def seek(self, position: Position) -> None:
        """Go to where the next record was at another time, perhaps in another process."""
        ...


class SequenceStream(Iterator[Record]):
    """Records at hand, as a stream.

    Args:
      name: where they are from, for errors.
      rows: the records, or a `DataError` in the place of one.
      kind: what one is called, for errors.

    Example:
      >>> stream = SequenceStream("sums", [{"prompt": "1 + 1", "completion": "2"}])
      >>> next(stream)
      ('sums: row 1', {'prompt': '1 + 1', 'completion': '2'})
      >>> stream.position()
      1
    """

    def __init__(
        self, name: str, rows: Iterable[Mapping[str, Any] | DataError | None], kind: str = "row"
    ) -> None:
        if isinstance(rows, Iterator):
            raise ConfigError(
                f"{name}: expected records that can be gone through again, such as a list, found "
                f"{type(rows).__name__}, which can be read once."
            )
        self._name, self._all, self._kind = name, rows, kind
        self.seek(None)

    def __next__(self) -> Record:
        values = next(self._rows)
        self._number += 1
        return f"{self._name}: {self._kind} {self._number}", values

    def position(self) -> int:
        """Return how many records were read."""
        return self._number

    def seek(self, position: int | None) -> None:
        """Go to the record behind so many."""
        self._number = position or 0
        self._rows = itertools.islice(self._all, self._number, None)


class Unopened(Iterator[Record]):
    """A stream that is opened when something is first asked of it.

    Args:
      opened: opens it.
    """

    def __init__(self, opened: Callable[[], RecordStream]) -> None:
        self._stream = functools.cache(opened)

    def __next__(self) -> Record:
        return next(self._stream())

    def position(self) -> Position:
        """Return where the next record is."""
        return self._stream().position()

    def seek(self, position: Position) -> None:
        """Go to where the next record was."""
        self._stream().seek(position)


class Origin(NamedTuple):
    """What decides the records of a language, so that their tokens can be kept.

    Attributes:
      files: files, whose contents do.
      name: a text that changes with what else does.
    """

    files: tuple[Path, ...] = ()
    name: str = ""


class Malformed:
    """The malformed records of a part of a source.

    Args:
      part: what they are a part of, for the error.
      limit: the largest share of all records that may be malformed; at 0 the first is an error.
      before: malformed records found earlier, of a source that is read in pieces, or in another
        way.
      total: how many records there are, if it is known: then the first one too many is an error.

    Attributes:
      complaints: what is wrong with each, with file and line.

    Example:
      >>> malformed = Malformed("language 'en'", 0.1)
      >>> malformed.add(DataError("en.jsonl:7: expected text, found NoneType"))
      >>> malformed.check(good=99)
      >>> len(malformed.complaints)
      1
    """

    def __init__(self, part: str, limit: float, before: int = 0, total: int | None = None):
        self._part, self._limit, self._before = part, limit, before
        self._total = total
        self.complaints: list[str] = []

    def of_part(self) -> Malformed:
        """Return one for a part of the records, whose complaints are to be added here."""
        before = self._before + len(self.complaints)
        return Malformed(self._part, self._limit, before, self._total)

    def add(self, error: DataError) -> None:
        """Note a malformed record.

        Raises:
          DataError: this one, where none is allowed; or there are too many.
        """
        if not self._limit:
            raise error
        self.complaints.append(str(error))
        bad = self._before + len(self.complaints)
        if self._total is not None and bad > self._limit * self._total:
            self.check(self._total - bad)

    def check(self, good: int) -> None:
        """Compare their number with the limit, once all records, or a piece's, were read.

        Args:
          good: how many records are well formed, those of earlier pieces included.

        Raises:
          DataError: too many are not.
        """
        bad = self._before + len(self.complaints)
        if self.complaints and bad > self._limit * (bad + good):
            raise DataError(
                f"{self.complaints[0]}\nSo or otherwise malformed are {bad:,} of the "
                f"{bad + good:,} records of {self._part}; max_malformed allows a share of "
                f"{self._limit:g}."
            )


class Layout(NamedTuple):
    """What records of a source hold, and where.

    Attributes:
      columns: the columns that are named, by what they hold.
      texts: texts with columns in them, ``prompt``, ``completion`` and ``system``: their parts, or
        a mapping of them by language.
    """

    columns: Mapping[str, str] = {}
    texts: Mapping[str, Any] = {}

    def text(self, key: str, language: str) -> Sequence[str | Field] | None:
        """Return the parts of a language's text, or None.

        Raises:
          ConfigError: other languages have one.
        """
        found = by_language(self.texts.get(key), language)
        if found is None and key in self.texts:
            raise ConfigError(f"data.{key} has no text for {language}.")
        return found


def layout(data: DataConfig, choices: str | None = None) -> Layout:
    """Return what records hold by the settings.

    Args:
      data: the settings.
      choices: the column of texts that a reply is chosen from, for an evaluation.

    Raises:
      ConfigError: columns are of several kinds, or a text is not written as it should be.
    """
    every = dataclasses.asdict(data.columns) | {"choices": choices}
    named = {key: name for key, name in every.items() if name is not None}
    given = {key: getattr(data, key) for key in ("prompt", "completion", "system")}
    given = {key: text for key, text in given.items() if text is not None}
    kinds = [kind for kind in _CONTENTS if set(kind) & (set(named) | set(given))]
    if len(kinds) > 1:
        raise ConfigError(
            "Columns take either messages, or prompt and completion, or text, not both "
            f"{' and '.join(kinds[0])} and {' and '.join(kinds[1])}."
        )
    try:
        texts = {
            key: {code: parse_text(one) for code, one in text.items()}
            if isinstance(text, Mapping)
            else parse_text(text)
            for key, text in given.items()
        }
    except ValueError as error:
        raise ConfigError(f"data.prompt, completion or system: {error}.") from None
    return Layout(named, texts)


def to_example(record: Record, language: str, layout: Layout) -> Example:
    """Turn a record into an example.

    Args:
      record: where it was found, and its columns or what is wrong with it.
      language: the record's language.
      layout: where things are in it.

    Returns:
      The example.

    Raises:
      DataError: naming the place, when the record is malformed, or a column is missing or does not
        hold what it should.
    """
    place, values = record
    if isinstance(values, DataError):
        raise values
    if values is None:
        raise DataError(f"{place}: no record")
    columns = layout.columns

    def value(key: str) -> Any:
        parts = layout.text(key, language)
        if parts is None:
            advice = " Name the right ones in `columns`."
            return _column(values, columns.get(key, key), key, advice)
        text = fill(parts, values)
        if not text.strip() and key != "system":
            raise DataError(f"data.{key} gives no text: what it names is empty")
        return text

    try:
        group = _named("group", value("group")) if "group" in columns else None
        example = _example(language, value, values, layout, {"group": group, "place": place})
        if "system" in layout.texts:
            example = example.after_system(value("system"))
        if "choices" not in columns:
            return example
        return dataclasses.replace(example, choices=_choices(value("choices")))
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _example(
    language: str,
    value: Callable[[str], Any],
    values: Mapping[str, Any],
    layout: Layout,
    about: Mapping[str, Any],
) -> Example:
    named = set(layout.columns) | set(layout.texts)
    mapped = {"messages", "prompt", "completion", "text"} & named
    if "messages" in mapped or (not mapped and {"messages", "conversations"} & set(values)):
        usual = "messages" in mapped or "messages" in values
        messages = from_sharegpt(value("messages") if usual else values["conversations"])
        return Example.from_messages(language, messages, tools=_tools(values.get("tools")), **about)
    paired = {"prompt", "completion"} & set(values)
    if "text" in mapped or (not mapped and not paired and "text" in values):
        return Example.from_text(language, value("text"), **about)
    return Example.from_pair(language, value("prompt"), value("completion"), **about)


# What ShareGPT's files, and those like them, call who speaks.
_SHAREGPT = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"system": "system", "tool": "tool"},
}


def from_sharegpt(messages: Any) -> Any:
    """Return messages of ShareGPT's form, ``{from, value}``, as ``{role, content}``; others as is.

    Raises:
      DataError: who speaks has an unknown name.

    Example:
      >>> from_sharegpt([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])[1]
      {'role': 'assistant', 'content': 'Hello'}
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return messages
    return [_from_sharegpt(number, message) for number, message in enumerate(messages)]


def _from_sharegpt(number: int, message: Any) -> Any:
    if not isinstance(message, Mapping) or "role" in message or "from" not in message:
        return message
    who = message["from"]
    role = _SHAREGPT.get(who) if isinstance(who, str) else None
    if role is None:
        raise DataError(
            f"message {number}: expected `from` to be one of {', '.join(_SHAREGPT)}, found "
            f"{shown(who)}"
        )
    rest = {key: part for key, part in message.items() if key not in ("from", "value")}
    spoken = {"content": message["value"]} if "value" in message else {}
    return {"role": role, **spoken, **rest}


def _column(values: Mapping[str, Any], name: str, what: str, advice: str = "") -> Any:
    if name not in values:
        raise DataError(
            f"no column {name!r} for the {what}. Columns: {listed(values) or 'none'}."
            f"{did_you_mean(name, values)}{advice}"
        )
    return values[name]


def _tools(value: Any) -> Sequence[Mapping[str, Any]]:
    """The tools of a conversation: a list of mappings, or one as JSON, as Parquet often has it."""
    if isinstance(value, str) and value.strip():
        value = parse_json(value)
    if not value:
        return ()
    if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(f"tools: expected a list of objects, found {shown(value)}")
    return value


def _choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"expected a list of choices, found {type(value).__name__}")
    return tuple(map(checked_text, value))


def _named(what: str, value: Any) -> str | None:
    try:
        return identifier(value)
    except DataError as error:
        raise DataError(f"{what}: {error}") from None


def language_of(record: Record, column: str) -> str:
    """Return what a record's column of the language holds.

    Raises:
      DataError: the record is malformed, or has no such column or no language there.
    """
    place, values = record
    if isinstance(values, DataError):
        raise values
    try:
        language = _named("language", _column(values or {}, column, "language"))
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    if language is None:
        raise DataError(f"{place}: no language in column {column!r}")
    return language


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
      DataError: it is none, whose cause says where, or nothing that Python holds.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"invalid JSON ({error.msg} at column {error.colno})") from error
    except ValueError:  # Python's limit of whole numbers
        raise DataError("a number of thousands of digits") from None
    except RecursionError:
        raise DataError("lists or objects nested too deep") from None


class Taken(NamedTuple):
    """What consecutive records hold.

    Attributes:
      examples: in their order, duplicates included.
      passed: records read in all, those of other languages and malformed ones included.
      known: how many were known to be none.
      ended: whether there are no more.
    """

    examples: list[Example]
    passed: int
    known: int
    ended: bool


def take_examples(
    records: Iterator[Record],
    language: str,
    layout: Layout,
    malformed: Malformed,
    *,
    size: int | None = None,
    most: int | None = None,
    belongs: Callable[[Record], bool] = lambda record: True,
) -> Taken:
    """Read examples of a language.

    Args:
      records: where they are taken from.
      language: their language.
      layout: where things are in them.
      malformed: notes what is wrong with each that is left out.
      size: examples to read at most.
      most: records to read at most.
      belongs: whether a record is of the language.

    Raises:
      DataError: a record is malformed and none may be, or the source cannot be read.
    """
    examples: list[Example] = []
    passed = known = 0
    while len(examples) != size and passed != most:
        record = next(records, None)
        if record is None:
            return Taken(examples, passed, known, True)
        passed += 1
        try:
            if record[1] is None:
                known += 1
            elif belongs(record):
                examples.append(to_example(record, language, layout))
        except DataError as error:
            malformed.add(error)
    return Taken(examples, passed, known, False)
