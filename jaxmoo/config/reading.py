"""Settings of a schema, read from a YAML file and overrides."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import pickle
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jaxmoo.config.schema import (
    MISSING,
    SHOWN,
    Leaf,
    check_values,
    join,
    leaves,
    raise_problems,
    sections,
)
from jaxmoo.config.yaml_text import Loader, describe_error, flow
from jaxmoo.errors import ConfigError, did_you_mean, shown
from jaxmoo.files.bundled import config_names, find_config

__all__ = ["load"]

T = TypeVar("T")

_MOST_BYTES = 2**20
_MOST_REFERENCES = 30


@dataclasses.dataclass(frozen=True)
class _Given:
    """A value someone gave a setting, and where."""

    value: Any
    where: str


def load(schema: type[T], path: str | Path, overrides: Iterable[str] = ()) -> T:
    """Read settings from a YAML file and overrides.

    Args:
      schema: the root dataclass.
      path: the YAML file, or the name of an example config.
      overrides: texts ``section.key=value``, applied in order after the file.

    Returns:
      An instance of the schema with every value of the declared type.

    Raises:
      ConfigError: the file is missing or not YAML; a setting is unknown, missing, of the wrong
        type or outside its range or choices. The message lists all of them.
    """
    path = find_config(path)
    text = _read(path)
    try:
        return _build(schema, text, overrides)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


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
    tree = pickle.loads(_defaults(schema))
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
        config = typing.cast(T, OmegaConf.to_object(tree))
    except OmegaConfBaseException as error:
        key = error.full_key or "a setting"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}.") from error
    wheres = {name: entry.where for name, entry in given.items()}
    raise_problems([f"{wheres.get(name, '')}{text}" for name, text in check_values(config)])
    return config


@functools.cache  # a copy takes a small part of the time, and a study reads hundreds of configs
def _defaults(schema: type) -> bytes:
    """The settings before any is given, pickled: a copy of them may be changed."""
    tree = OmegaConf.structured(schema)
    for section in sections(schema):
        OmegaConf.set_readonly(OmegaConf.select(tree, section) if section else tree, False)
    return pickle.dumps(tree)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError(f"{path} is no config file: it is larger than {_MOST_BYTES:,} bytes.")
        return content.decode("utf-8")
    except FileNotFoundError as error:
        there = sorted({*path.parent.glob("*.y*ml"), *Path("configs").glob("*.y*ml")})
        names = [*map(str, there), *config_names()]
        hint = did_you_mean(str(path), names)
        listing = f" There are: {', '.join(names)}." if names else ""
        raise ConfigError(f"There is no config file {path}.{hint}{listing}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a directory; expected a YAML file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason}).") from error
    except (OSError, ValueError) as error:  # a null character in the path
        raise ConfigError(f"{path!r} cannot be read: {error}.") from error


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
        problems.append(f"{where}{what} (key: value), found {flow(found, SHOWN)}.")
        return
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        name = join(section, key_node.value)
        where = origin or f"line {key_node.start_mark.line + 1}: "
        if name in sections(schema):
            _collect(schema, loader, value_node, name, origin, given, problems)
        elif name in leaves(schema):
            given[name] = _Given(loader.construct_object(value_node, deep=True), where)
        else:
            problems.append(where + _unknown(schema, name))


def _override(schema: type, text: str, given: dict[str, _Given], problems: list[str]) -> None:
    where = f"override {shown(text, SHOWN)}: "
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
    if leaf is None and name not in sections(schema):
        problems.append(where + _unknown(schema, name))
        return
    # Text is taken as it is unless quoted: regular expressions are full of YAML's own signs.
    is_text = leaf is not None and leaf.base in (str, Any)
    other = r"|null|~|'.*'|\".*\""
    if leaf is not None and leaf.base is Any:  # a text, or a mapping: {question} is the former
        other += r"|\{\s*[\w-]+\s*:\s.*\}"
    literal = is_text and not re.fullmatch(other, raw, re.DOTALL)
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
    if owner is not None and owner != name:  # one entry of a mapping, e.g. resolve.options.c
        before = given[leaf.name].value if leaf.name in given else leaf.default
        value = {**(before if isinstance(before, Mapping) else {}), name[len(owner) + 1 :]: value}
    given[leaf.name] = _Given(value, where)


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts) + 1))


def _unknown(schema: type, name: str) -> str:
    """Explain an unknown name by the nearest one: in its section, or else anywhere."""
    section, _, key = name.rpartition(".")
    while section not in sections(schema):  # the first unknown part is the one to explain
        section, _, key = section.rpartition(".")
    siblings = [field.name for field in dataclasses.fields(sections(schema)[section])]
    near = difflib.get_close_matches(key, siblings, n=1)
    elsewhere = {leaf.rpartition(".")[2]: leaf for leaf in leaves(schema)}
    if not near:
        near = [elsewhere[k] for k in difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.7)]
    hint = f" Did you mean '{near[0]}'?" if near else ""
    place = f"{section} has" if section else "There are"
    return f"{join(section, key)} is not a setting.{hint} {place} the keys {', '.join(siblings)}."


def _wrong_type(leaf: Leaf, entry: _Given, error: Exception) -> str:
    if "${" in str(entry.value):
        return f"{entry.where}{leaf.name}: {str(error).splitlines()[0]}."
    return f"{entry.where}{leaf.name} must be {leaf.expected}, found {flow(entry.value, SHOWN)}."
