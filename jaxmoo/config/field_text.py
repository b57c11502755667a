"""Texts with a record's fields in them, as ``data.prompt`` has them: their syntax.

That of Python's format strings: ``{question}`` is a column, ``{answers.text[0]}`` an element of a
list within it, ``{{`` and ``}}`` are braces. What stands between braces is a path and no program.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["RANDOM", "Field", "by_language", "check_texts", "parse_text"]

RANDOM = "[random]"  # as a step of a path; no name has a bracket in it

_PATH = re.compile(r"[^.\[\]]+(?:\.[^.\[\]]+|\[[^\[\]]*\])*")
_STEP = re.compile(r"(?:^|\.)([^.\[\]]+)|\[([^\[\]]*)\]")
_FORM = re.compile(r"(?:,?(?:\.\d{1,2})?[dfge]|,)?")


class Field(NamedTuple):
    """A field of a record within a text.

    Attributes:
      text: as it is written, ``answers.text[0]``.
      path: from the record to the value: names, numbers of elements, and `RANDOM` for one element
        drawn by a hash of the record.
      separator: what joins the elements of a list; None where the value is no list.
      form: how a number is written, as Python's format specification has it.
    """

    text: str
    path: tuple[str | int, ...]
    separator: str | None = None
    form: str = ""


def parse_text(text: str) -> list[str | Field]:
    """Cut a text into what stays as it is and fields.

    Args:
      text: such as ``"{context}\\n\\n{question}"``.

    Returns:
      Texts and fields, in their order.

    Raises:
      ValueError: says what is wrong.

    Example:
      >>> parse_text("Q: {question}")
      ['Q: ', Field(text='question', path=('question',), separator=None, form='')]
      >>> parse_text("{answers.text[0]} {{or}} {options[join:, ]}")[0].path
      ('answers', 'text', 0)
    """
    parts: list[str | Field] = []
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{error}; a brace that is text is written twice") from None
    for literal, path, form, conversion in pieces:
        if literal:
            parts.append(literal)
        if path is not None:
            parts.append(_field(path, form or "", conversion))
    return parts


def _field(path: str, form: str, conversion: str | None) -> Field:
    written = f"{{{path}}}"
    if not _PATH.fullmatch(path):
        raise ValueError(
            f"{written} names no field: expected a column, as {{question}}, or what is within one, "
            "as {answers.text[0]}"
        )
    if conversion or not _FORM.fullmatch(form):
        raise ValueError(
            f"{written}: only numbers may have a format, of digits behind the point, as "
            "{score:.2f}, or of thousands, as {count:,}"
        )
    steps: list[str | int] = []
    separator = None
    for match in _STEP.finditer(path):
        name, element = match.groups()
        if separator is not None:
            raise ValueError(f"{written}: nothing may follow a list that is joined")
        if name is not None:
            steps.append(name)
        elif re.fullmatch(r"-?\d+", element):
            steps.append(int(element))
        elif element == "random":
            steps.append(RANDOM)
        elif element == "join" or element.startswith("join:"):
            separator = element[len("join:") :] if ":" in element else "\n"
        else:
            raise ValueError(
                f"{written}: expected the number of an element, from 0, random, join or "
                f"join:SEPARATOR in brackets, found [{element}]"
            )
    return Field(path, tuple(steps), separator, form)


def by_language(value: Any, language: str) -> Any:
    """Return what a language has of a setting: one for all, or one for each; None of none."""
    return value.get(language) if isinstance(value, Mapping) else value


def check_texts(name: str, value: Any, languages: Sequence[str]) -> list[str]:
    """Return what is wrong with a setting that is a text, or texts by language.

    Example:
      >>> check_texts("data.prompt", {"en": "{question}"}, ["en", "fr"])
      ['data.prompt has no text for fr: give one to every language, or a single one.']
    """
    if value is None:
        return []
    if isinstance(value, Mapping):
        bad = [code for code, text in value.items() if not isinstance(text, str) or not text]
        if bad:
            return [
                f"{name}.{bad[0]} must be text. (A text that begins with a brace needs quotes in "
                "YAML.)"
            ]
        missing = [code for code in languages if code not in value]
        if missing:
            return [
                f"{name} has no text for {', '.join(missing)}: give one to every language, or a "
                "single one."
            ]
        texts = value
    elif isinstance(value, str) and value:
        texts = {"": value}
    else:
        return [f"{name} must be text, or texts by language, found {value!r}."]
    problems = []
    for code, text in texts.items():
        try:
            parse_text(text)
        except ValueError as error:
            problems.append(f"{name}{code and '.' + code}: {error}.")
    return problems
