"""What a record of a source holds, by its columns: an example, and its language."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jaxmoo.data.example import Example, checked_text, identifier, listed
from jaxmoo.data.files import Record, parse_json
from jaxmoo.errors import ConfigError, DataError, did_you_mean, shown

# What a record's content may be.
CONTENTS = (("messages",), ("prompt", "completion"), ("text",))
COLUMN_KEYS = ("prompt", "completion", "messages", "text", "group", "choices")


def check_columns(columns: Mapping[str, str | None] | None) -> dict[str, str]:
    """Return the columns that are named.

    Raises:
      ConfigError: a key is unknown, or they are of several kinds.
    """
    columns = {key: name for key, name in (columns or {}).items() if name is not None}
    for key in columns:
        if key not in COLUMN_KEYS:
            raise ConfigError(
                f"Unknown key {key!r} in columns; expected {', '.join(COLUMN_KEYS)}."
                f"{did_you_mean(key, COLUMN_KEYS)}"
            )
    kinds = [kind for kind in CONTENTS if set(kind) & set(columns)]
    if len(kinds) > 1:
        raise ConfigError(
            "Columns take either messages, or prompt and completion, or text, not both "
            f"{' and '.join(kinds[0])} and {' and '.join(kinds[1])}."
        )
    return columns


def to_example(record: Record, language: str, columns: Mapping[str, str]) -> Example:
    """Turn a record into an example.

    Args:
      record: where it was found, and its columns or what is wrong with it.
      language: the record's language.
      columns: as in `read_examples`.

    Returns:
      The example.

    Raises:
      DataError: naming the place, when the record is malformed, or a column is missing or does not
        hold what it should.
    """
    place, values = record
    if isinstance(values, DataError):
        raise values

    def column(key: str) -> Any:
        advice = " Name the right ones in `columns`."
        return _column(values, columns.get(key, key), key, advice)

    mapped = {"messages", "prompt", "completion", "text"} & set(columns)
    try:
        group = _named("group", column("group")) if "group" in columns else None
        example = _example(language, column, values, mapped, {"group": group, "place": place})
        if "choices" not in columns:
            return example
        return dataclasses.replace(example, choices=_choices(column("choices")))
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _example(
    language: str,
    column: Callable[[str], Any],
    values: Mapping[str, Any],
    mapped: Collection[str],
    about: Mapping[str, Any],
) -> Example:
    if "messages" in mapped or (not mapped and "messages" in values):
        tools = _tools(values.get("tools"))
        return Example.from_messages(language, column("messages"), tools=tools, **about)
    paired = {"prompt", "completion"} & set(values)
    if "text" in mapped or (not mapped and not paired and "text" in values):
        return Example.from_text(language, column("text"), **about)
    return Example.from_pair(language, column("prompt"), column("completion"), **about)


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
        language = _named("language", _column(values, column, "language"))
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    if language is None:
        raise DataError(f"{place}: no language in column {column!r}")
    return language
