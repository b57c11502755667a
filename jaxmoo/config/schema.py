"""Typed settings: dataclasses that are checked and documented.

Nothing here knows what the settings mean. A *schema* is a frozen dataclass whose fields are made
by :func:`setting`, or are such dataclasses themselves (*sections*); a setting is named by its
dotted path, e.g. ``optimizer.learning_rate``. :mod:`jaxmoo.config.reading` reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import MISSING

from jaxmoo.config.yaml_text import flow
from jaxmoo.errors import ConfigError, did_you_mean, shown

__all__ = [
    "MISSING",
    "SHOWN",
    "Leaf",
    "Range",
    "check_values",
    "help_text",
    "join",
    "leaves",
    "markdown",
    "raise_problems",
    "sections",
    "setting",
    "values",
]


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval of finite numbers.

    Example:
      >>> 0 in Range(above=0, below=1), str(Range(above=0, below=1))
      (False, 'above 0 and below 1')
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            -math.inf < value < math.inf
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = (
            ("at least", self.least),
            ("above", self.above),
            ("at most", self.most),
            ("below", self.below),
        )
        return " and ".join(
            f"{word} {bound if isinstance(bound, int) else f'{bound:g}'}"
            for word, bound in bounds
            if bound is not None
        )


def setting(
    default: Any,
    doc: str,
    *,
    choices: Sequence[str] = (),
    within: Range | None = None,
    free: bool = False,
    expected: str = "",
) -> Any:
    """Declare one setting as a dataclass field.

    Args:
      default: its default; ``MISSING`` makes it mandatory.
      doc: what it means, for a reader of the documentation.
      choices: the valid values, where they are few and fixed.
      within: the valid numbers.
      free: whether an interrupted run may be resumed with another value.
      expected: the values it takes, in words, where its type is ``Any``.
    """
    metadata = {"doc": doc, "choices": tuple(choices), "within": within, "free": free}
    metadata["words"] = expected
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# --- The schema as a table -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One setting of a schema."""

    name: str
    type: Any
    default: Any
    doc: str
    choices: tuple[str, ...]
    within: Range | None
    free: bool
    words: str = ""

    @property
    def optional(self) -> bool:
        """Whether null is a value."""
        return self.type is Any or type(None) in typing.get_args(self.type)

    @property
    def base(self) -> Any:
        """The type without ``| None``."""
        kinds = [kind for kind in typing.get_args(self.type) if kind is not type(None)]
        return kinds[0] if self.optional and kinds else self.type

    @property
    def expected(self) -> str:
        """The values the setting takes, in words."""
        words = self.words or _WORDS[self.base]
        if self.choices:
            words = "one of " + ", ".join(self.choices)
        if self.within is not None:
            words += f", {self.within}"
        return words + (" or null" if self.optional else "")

    @property
    def summary(self) -> str:
        """The first clause of the documentation, without its markup."""
        # A sign inside backquotes ends nothing.
        clause = re.match(r"(?:`[^`]*`|[^`])*?(?=[.;:](?:\s|$))", self.doc)
        return (clause[0] if clause else self.doc).replace("`", "")

    @property
    def short_default(self) -> str:
        """The default as YAML, or ``required``."""
        return "required" if self.default == MISSING else flow(self.default)


# Every type that a setting may have.
_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    int | str: "an integer or text",
    list[str]: "a list such as [en, fr]",
    list[int]: "a list such as [1, 2]",
    list[float]: "a list such as [1e-4, 3e-4]",
    dict[str, int]: "a mapping to integers such as {en: 2}",
    dict[str, str]: "a mapping to text such as {en: eng_Latn}",
    dict[str, float]: "a mapping to numbers such as {en: 2}",
    dict[str, list[str]]: "a mapping to lists such as {mean: [resolve.aggregator=mean]}",
    dict[str, Any]: "a mapping such as {c: 0.5}",
    list[dict[str, Any]]: "a list such as [{source: a.jsonl, weight: 2}, {source: b.jsonl}]",
}


@functools.cache
def _fields(schema: type) -> dict[str, tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(schema)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(schema)}


@functools.cache
def sections(schema: type, prefix: str = "") -> dict[str, type]:
    """Return the dataclasses of a schema by their dotted names; its own is empty."""
    found: dict[str, type] = {prefix.rstrip("."): schema}
    for name, (_, kind) in _fields(schema).items():
        if dataclasses.is_dataclass(kind):
            found |= sections(kind, f"{prefix}{name}.")
    return found


@functools.cache
def leaves(schema: type) -> dict[str, Leaf]:
    """Return every setting of a schema by its dotted name, in the order of declaration."""
    found = {}
    for section, cls in sections(schema).items():
        for name, (field, kind) in _fields(cls).items():
            if dataclasses.is_dataclass(kind):
                continue
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            full = join(section, name)
            found[full] = Leaf(full, kind, default, **field.metadata)
    return found


def join(section: str, name: str) -> str:
    """Return the dotted name of what a section calls by a name."""
    return f"{section}.{name}" if section else name


def values(config: Any) -> dict[str, Any]:
    """Return the value of every setting by its dotted name."""

    def get(name: str) -> Any:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        return value

    return {name: get(name) for name in leaves(type(config))}


# --- Checking --------------------------------------------------------------------------------


SHOWN = 200  # characters of a value in an error
_LARGEST_INTEGER = 2**31 - 1  # arrays are indexed, and steps counted, in 32 bits
_LARGEST_FLOAT = 3.4e38  # in float32


def check_values(config: Any) -> list[tuple[str, str]]:
    """Return (setting, problem) for every value outside its declared range or choices."""
    problems: list[tuple[str, str]] = []
    found = values(config)
    nulls = {name for name, value in found.items() if value is None}
    for name, value in found.items():
        leaf = leaves(type(config))[name]
        if name in nulls and leaf.optional:
            continue
        if value == MISSING:
            problems.append((name, f"{name} is missing ({leaf.summary})."))
        elif (
            (leaf.choices and value not in leaf.choices)
            or (leaf.within is not None and value not in leaf.within)
            or value == ""
        ):
            hint = did_you_mean(value, leaf.choices)
            shown_value = flow(value, SHOWN)
            problems.append((name, f"{name} must be {leaf.expected}, found {shown_value}.{hint}"))
        elif (fault := _beyond(value, leaf.within)) is not None:
            problems.append((name, f"{name} {fault}."))
    return problems


def _beyond(value: Any, within: Range | None = None) -> str | None:
    """What a value holds that no run could use, whatever the setting; None if nothing."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return next((fault for part in value if (fault := _beyond(part)) is not None), None)
    if isinstance(value, str):
        if "\0" in value or not _encodes(value):
            return "holds a character that no file can hold"
    elif isinstance(value, int) and not isinstance(value, bool):
        limited = within is not None and within.most is not None
        if abs(value) > _LARGEST_INTEGER and not limited:
            return f"is {shown(value, SHOWN)}, beyond the largest integer, {_LARGEST_INTEGER}"
    elif isinstance(value, float) and _LARGEST_FLOAT < abs(value) < math.inf:
        return f"is {value:g}, beyond the largest number, {_LARGEST_FLOAT:g}"
    return None


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a character, or a byte of the command line that is no text
        return False
    return True


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one :class:`ConfigError` with all problems, if there are any."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problems:{lines}")


# --- Describing ------------------------------------------------------------------------------


def markdown(schema: type) -> str:
    """Return a page that documents every setting, one table per section."""
    parts = []
    for section, cls in sections(schema).items():
        rows = [leaf for leaf in leaves(schema).values() if leaf.name.rpartition(".")[0] == section]
        title = f"## `{section}`\n\n" if section else ""
        parts.append(f"{title}{inspect.cleandoc(cls.__doc__ or '')}\n")
        parts.append("| setting | values | default | meaning | on resume |\n|---|---|---|---|---|")
        for leaf in rows:
            cells = (
                f"`{leaf.name}`",
                leaf.expected,
                "required" if leaf.default == MISSING else f"`{leaf.short_default}`",
                leaf.doc,
                "may change" if leaf.free else "must stay",
            )
            parts.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def help_text(schema: type, width: int = 96) -> str:
    """Return the settings as a list for a terminal: name, default, first sentence."""
    column = 36
    lines = []
    for leaf in leaves(schema).values():
        head = f"  {leaf.name}={leaf.short_default}"
        if len(head) > column - 2:
            lines.append(head)
            head = ""
        lines += textwrap.wrap(
            leaf.summary,
            width,
            initial_indent=head.ljust(column),
            subsequent_indent=" " * column,
        )
    return "\n".join(lines)
