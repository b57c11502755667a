"""Texts with a record's fields in them, filled in; `jaxmoo.config.field_text` has the syntax."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmoo.config.field_text import RANDOM, Field
from jaxmoo.data.example import listed
from jaxmoo.data.split import hash_fraction
from jaxmoo.errors import DataError, did_you_mean, shown

__all__ = ["fill"]


def fill(parts: Sequence[str | Field], values: Mapping[str, Any]) -> str:
    """Return a text with the fields of a record.

    Args:
      parts: from :func:`jaxmoo.config.field_text.parse_text`.
      values: the record.

    Returns:
      The text. Texts of the record are taken as they are, whole numbers in digits.

    Raises:
      DataError: the record has no such field, or nothing there that is one text.

    Example:
      >>> from jaxmoo.config.field_text import parse_text
      >>> record = {"question": "Where?", "answers": {"text": ["here", "there"]}}
      >>> fill(parse_text("{question} {answers.text[-1]}"), record)
      'Where? there'
      >>> fill(parse_text("{answers.text[join: or ]}"), record)
      'here or there'
    """
    return "".join(part if isinstance(part, str) else _value(part, values) for part in parts)


def _value(field: Field, record: Mapping[str, Any]) -> str:
    value: Any = record
    done = ""
    for step in field.path:
        value, done = _step(field, record, value, step, done)
    if field.separator is None:
        return _text(field, value)
    if not _is_list(value):
        raise DataError(f"{{{field.text}}}: expected a list to join, found {_found(value)}")
    return field.separator.join(_text(field, element) for element in value)


def _step(
    field: Field, record: Mapping[str, Any], value: Any, step: str | int, done: str
) -> tuple[Any, str]:
    """One step of a path: the value there, and how the way to it is written."""
    if step == RANDOM or isinstance(step, int):
        if not _is_list(value):
            raise DataError(f"{{{field.text}}}: expected a list in {done}, found {_found(value)}")
        if step == RANDOM:
            # By the record alone, so that neither the seed nor the order decides what is held out.
            drawn = hash_fraction(json.dumps([field.text, record], sort_keys=True, default=str))
            step = int(drawn * len(value))
        if not -len(value) <= int(step) < len(value):
            raise DataError(f"{{{field.text}}}: {done} has {len(value)} elements, not one [{step}]")
        return value[int(step)], f"{done}[{step}]"
    if not isinstance(value, Mapping):
        raise DataError(f"{{{field.text}}}: expected fields in {done}, found {_found(value)}")
    if step not in value:
        kind, of = ("field", f" of {done}") if done else ("column", "")
        raise DataError(
            f"no {kind} {step!r}{of} for {{{field.text}}}. {kind.capitalize()}s: "
            f"{listed(value) or 'none'}.{did_you_mean(str(step), map(str, value))}"
        )
    return value[step], f"{done}.{step}" if done else str(step)


def _text(field: Field, value: Any) -> str:
    whole = type(value) is int
    if field.form:
        if not (whole or type(value) is float):
            raise DataError(f"{{{field.text}}}: expected a number, found {_found(value)}")
        try:
            return format(value, field.form)
        except (ValueError, OverflowError) as error:
            raise DataError(f"{{{field.text}}}: {error}, found {_found(value)}") from None
    if isinstance(value, str):
        return value
    if whole:
        try:
            return str(value)
        except ValueError:  # Python's limit of digits
            raise DataError(f"{{{field.text}}}: a number of thousands of digits") from None
    hint = ""
    if _is_list(value):
        hint = (
            f": choose an element, {{{field.text}[0]}} or {{{field.text}[random]}}, or join them, "
            f"{{{field.text}[join]}}"
        )
    elif isinstance(value, Mapping):
        hint = f": name one of its fields, {listed(value) or 'none'}"
    elif type(value) is float:
        hint = f": say how it is written, {{{field.text}:.1f}}"
    raise DataError(f"{{{field.text}}}: expected text, found {_found(value)}{hint}")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _found(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {shown(value)}"
