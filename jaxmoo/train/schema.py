"""Typed settings: dataclasses that are read from YAML and overrides, checked and documented.

Nothing here knows what the settings mean. A *schema* is a frozen dataclass whose fields are made
by :func:`setting`, or are such dataclasses themselves (*sections*); a setting is named by its
dotted path, e.g. ``optimizer.learning_rate``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jaxmoo.errors import ConfigError, did_you_mean, shown
from jaxmoo.train.yaml_text import Loader, describe_error, flow

__all__ = [
    "MISSING",
    "Range",
    "check_values",
    "help_text",
    "leaves",
    "load",
    "markdown",
    "raise_problems",
    "setting",
    "values",
]

T = TypeVar("T")


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
) -> Any:
    """Declare one setting as a dataclass field.

    Args:
      default: its default; ``MISSING`` makes it mandatory.
      doc: what it means, for a reader of the documentation.
      choices: the valid values, where they are few and fixed.
      within: the valid numbers.
      free: whether an interrupted run may be resumed with another value.
    """
    metadata = {"doc": doc, "choices": tuple(choices), "within": within, "free": free}
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

    @property
    def optional(self) -> bool:
        """Whether null is a value."""
        return type(None) in typing.get_args(self.type)

    @property
    def base(self) -> Any:
        """The type without ``| None``."""
        kinds = [kind for kind in typing.get_args(self.type) if kind is not type(None)]
        return kinds[0] if self.optional else self.type

    @property
    def expected(self) -> str:
        """The values the setting takes, in words."""
        words = _WORDS[self.base]
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
    list[str]: "a list such as [en, fr]",
    list[int]: "a list such as [1, 2]",
    list[float]: "a list such as [1e-4, 3e-4]",
    dict[str, str]: "a mapping to text such as {en: eng_Latn}",
    dict[str, float]: "a mapping to numbers such as {en: 2}",
    dict[str, list[str]]: "a mapping to lists such as {mean: [resolve.aggregator=mean]}",
    dict[str, Any]: "a mapping such as {c: 0.5}",
}


@functools.cache
def _fields(schema: type) -> dict[str, tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(schema)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(schema)}


@functools.cache
def _sections(schema: type, prefix: str = "") -> dict[str, type]:
    found: dict[str, type] = {prefix.rstrip("."): schema}
    for name, (_, kind) in _fields(schema).items():
        if dataclasses.is_dataclass(kind):
            found |= _sections(kind, f"{prefix}{name}.")
    return found


@functools.cache
def leaves(schema: type) -> dict[str, Leaf]:
    """Return every setting of a schema by its dotted name, in the order of declaration."""
    found = {}
    for section, cls in _sections(schema).items():
        for name, (field, kind) in _fields(cls).items():
            if dataclasses.is_dataclass(kind):
                continue
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            full = _join(section, name)
            found[full] = Leaf(full, kind, default, **field.metadata)
    return found


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def values(config: Any) -> dict[str, Any]:
    """Return the value of every setting by its dotted name."""

    def get(name: str) -> Any:
        return functools.reduce(getattr, name.split("."), config)

    return {name: get(name) for name in leaves(type(config))}


# --- Reading ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Given:
    """A value someone gave a setting, and where."""

    value: Any
    where: str


def load(schema: type[T], path: str | Path, overrides: Iterable[str] = ()) -> T:
    """Read settings from a YAML file and overrides.

    Args:
      schema: the root dataclass.
      path: the YAML file.
      overrides: texts ``section.key=value``, applied in order after the file.

    Returns:
      An instance of the schema with every value of the declared type.

    Raises:
      ConfigError: the file is missing or not YAML; a setting is unknown, missing, of the wrong
        type or outside its range or choices. The message lists all of them.
    """
    path = Path(path)
    text = _read(path)
    try:
        return _build(schema, text, overrides)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


_MOST_REFERENCES = 30


def _build(schema: type[T], text: str, overrides: Iterable[str]) -> T:
    problems: list[str] = []
    given: dict[str, _Given] = {}
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _collect(schema, loader, node, "", "", given, problems)
    except yaml.YAMLError as error:
        raise ConfigError(describe_error(error)) from error
    for override in overrides:
        _override(schema, str(override), given, problems)
    # Each may stand for a text with several more of them.
    if sum(str(entry.value).count("${") for entry in given.values()) > _MOST_REFERENCES:
        raise ConfigError(f"there are more than {_MOST_REFERENCES} references ${{...}}.")
    tree = OmegaConf.structured(schema)
    for section in _sections(schema):
        OmegaConf.set_readonly(OmegaConf.select(tree, section) if section else tree, False)
    for name, entry in given.items():
        try:
            OmegaConf.update(tree, name, entry.value, merge=False)
        except (OmegaConfBaseException, TypeError, ValueError, OverflowError) as error:
            problems.append(_wrong_type(leaves(schema)[name], entry, error))
    problems += [
        f"{leaf.name} is missing ({leaf.summary})."
        for leaf in leaves(schema).values()
        if leaf.default == MISSING and (leaf.name not in given or given[leaf.name].value == MISSING)
    ]
    raise_problems(problems)
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        key = error.full_key or "a setting"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}.") from error
    wheres = {name: entry.where for name, entry in given.items()}
    raise_problems([f"{wheres.get(name, '')}{text}" for name, text in check_values(config)])
    return config


def check_values(config: Any) -> list[tuple[str, str]]:
    """Return (setting, problem) for every value outside its declared range or choices."""
    problems = []
    for name, value in values(config).items():
        leaf = leaves(type(config))[name]
        if value is None and leaf.optional:
            continue
        if value == MISSING:
            problems.append((name, f"{name} is missing ({leaf.summary})."))
        elif (
            (leaf.choices and value not in leaf.choices)
            or (leaf.within is not None and value not in leaf.within)
            or value == ""
        ):
            hint = did_you_mean(value, leaf.choices)
            found = flow(value, _SHOWN)
            problems.append((name, f"{name} must be {leaf.expected}, found {found}.{hint}"))
        elif (fault := _beyond(value, leaf.within)) is not None:
            problems.append((name, f"{name} {fault}."))
    return problems


_SHOWN = 200  # characters of a value in an error
_LARGEST_INTEGER = 2**31 - 1  # arrays are indexed, and steps counted, in 32 bits
_LARGEST_FLOAT = 3.4e38  # in float32


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
            return f"is {shown(value, _SHOWN)}, beyond the largest integer, {_LARGEST_INTEGER}"
    elif isinstance(value, float) and _LARGEST_FLOAT < abs(value) < math.inf:
        return f"is {value:g}, beyond the largest number, {_LARGEST_FLOAT:g}"
    return None


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a character, or a byte of the command line that is no text
        return False
    return True


_MOST_BYTES = 2**20


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError(f"{path} is no config file: it is larger than {_MOST_BYTES:,} bytes.")
        return content.decode("utf-8")
    except FileNotFoundError as error:
        there = sorted({*path.parent.glob("*.y*ml"), *Path("configs").glob("*.y*ml")})
        names = [str(p) for p in there]
        hint = did_you_mean(str(path), names)
        listing = f" There are: {', '.join(names)}." if names else ""
        raise ConfigError(f"There is no config file {path}.{hint}{listing}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a directory; expected a YAML file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason}).") from error
    except (OSError, ValueError) as error:  # a null character in the path
        raise ConfigError(f"{path!r} cannot be read: {error}.") from error


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one :class:`ConfigError` with all problems, if there are any."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problems:{lines}")


def _collect(
    schema: type,
    loader: Loader,
    node: yaml.Node,
    section: str,
    origin: str,
    given: dict[str, _Given],
    problems: list[str],
) -> None:
    """Gather the values under one section; ``origin`` overrides the line as their place."""
    where = origin or f"line {node.start_mark.line + 1}: "
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
        return
    if not isinstance(node, yaml.MappingNode):
        found = loader.construct_object(node, deep=True)
        what = f"{section} must be a section of settings" if section else "expected settings"
        problems.append(f"{where}{what} (key: value), found {flow(found, _SHOWN)}.")
        return
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        name = _join(section, key_node.value)
        where = origin or f"line {key_node.start_mark.line + 1}: "
        if name in _sections(schema):
            _collect(schema, loader, value_node, name, origin, given, problems)
        elif name in leaves(schema):
            given[name] = _Given(loader.construct_object(value_node, deep=True), where)
        else:
            problems.append(where + _unknown(schema, name))


def _override(schema: type, text: str, given: dict[str, _Given], problems: list[str]) -> None:
    where = f"override {shown(text, _SHOWN)}: "
    name, equals, raw = text.partition("=")
    name, raw = name.strip(), raw.strip()
    if not equals:
        problems.append(f"{where}expected section.key=value.")
        return
    owner = next((n for n in _prefixes(name) if n in leaves(schema)), None)
    leaf = leaves(schema).get(owner or "")
    is_mapping = leaf is not None and typing.get_origin(leaf.base) is dict
    if leaf is not None and owner != name and not is_mapping:
        problems.append(f"{where}{owner} is set as a whole: it takes {leaf.expected}.")
        return
    if leaf is None and name not in _sections(schema):
        problems.append(where + _unknown(schema, name))
        return
    # Text is taken as it is unless quoted: regular expressions are full of YAML's own signs.
    is_text = leaf is not None and leaf.base is str
    literal = is_text and not re.fullmatch(r"|null|~|'.*'|\".*\"", raw)
    try:
        loader = Loader(raw)
        node = None if literal else loader.get_single_node()
        if leaf is None:
            if node is not None:
                _collect(schema, loader, node, name, where, given, problems)
            return
        value = raw if literal else node and loader.construct_object(node, deep=True)
    except yaml.YAMLError as error:
        problems.append(f"{where}the value is not YAML: {describe_error(error)}")
        return
    if owner != name:  # one entry of a mapping, e.g. resolve.options.c
        before = given[leaf.name].value if leaf.name in given else leaf.default
        value = {**(before if isinstance(before, Mapping) else {}), name[len(owner) + 1 :]: value}
    given[leaf.name] = _Given(value, where)


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts) + 1))


def _unknown(schema: type, name: str) -> str:
    """Explain an unknown name by the nearest one: in its section, or else anywhere."""
    section, _, key = name.rpartition(".")
    while section not in _sections(schema):  # the first unknown part is the one to explain
        section, _, key = section.rpartition(".")
    siblings = list(_fields(_sections(schema)[section]))
    near = difflib.get_close_matches(key, siblings, n=1)
    elsewhere = {leaf.rpartition(".")[2]: leaf for leaf in leaves(schema)}
    if not near:
        near = [elsewhere[k] for k in difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.7)]
    hint = f" Did you mean '{near[0]}'?" if near else ""
    place = f"{section} has" if section else "There are"
    return f"{_join(section, key)} is not a setting.{hint} {place} the keys {', '.join(siblings)}."


def _wrong_type(leaf: Leaf, entry: _Given, error: Exception) -> str:
    if "${" in str(entry.value):
        return f"{entry.where}{leaf.name}: {str(error).splitlines()[0]}."
    return f"{entry.where}{leaf.name} must be {leaf.expected}, found {flow(entry.value, _SHOWN)}."


# --- Describing ------------------------------------------------------------------------------


def markdown(schema: type) -> str:
    """Return a page that documents every setting, one table per section."""
    parts = []
    for section, cls in _sections(schema).items():
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
