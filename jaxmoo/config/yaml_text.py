"""YAML the way people read it.

YAML 1.1, which PyYAML reads, takes the bare words ``no``, ``on`` and ``off`` for truth values, so
that a list of languages loses Norwegian; takes ``1e-4`` for text; and lets a key that is given
twice win silently. Here only ``true`` and ``false`` are truth values, ``1e-4`` is a number, and
giving a key twice is an error.

A short text can stand for billions of values (anchors that repeat anchors), or for values nested so
deeply that reading them ends in the interpreter's own error. How many values there are, and how
deep, is therefore limited while they are read.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from jaxmoo.errors import shown

__all__ = ["Loader", "describe_error", "dump", "flow"]


_MOST_VALUES = 10_000
_DEEPEST = 32


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the rules above."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, stream: str):
        super().__init__(stream)
        self._depth = 0
        # Number of values that a node stands for, anchors written out; none while it is read.
        self._sizes: dict[yaml.Node | None, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Read a value and those within it; PyYAML calls this for every value."""
        event = self.peek_event()
        mark = event.start_mark
        if self._depth == _DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"values are nested more than {_DEEPEST} deep", problem_mark=mark
            )
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            if isinstance(node, yaml.MappingNode):
                inner = [part for pair in inner for part in pair]
            self._sizes[node] = 1 + sum(self._sizes[part] for part in inner)
        elif node not in self._sizes:
            raise yaml.MarkedYAMLError(
                problem=f"the anchor {event.anchor!r} contains itself", problem_mark=mark
            )
        if self._sizes[node] > _MOST_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"these are more than {_MOST_VALUES:,} values, anchors (&, *) written out",
                problem_mark=mark,
            )
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Make a value of a node; PyYAML calls this for every value."""
        try:
            return super().construct_object(node, deep)
        # What its own constructors raise for a number or date that is none, or too long.
        except (ValueError, KeyError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                problem=f"{shown(node.value)} cannot be read as {kind}",
                problem_mark=node.start_mark,
            ) from error

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge ``<<`` keys; PyYAML calls this for every mapping."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            mark = key.start_mark
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=mark)
            if key.value in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} is given twice, first in line {lines[key.value]}",
                    problem_mark=mark,
                )
            lines[key.value] = mark.line + 1
        super().flatten_mapping(node)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this or another YAML reader would take for something else."""


_FLOAT = re.compile(
    r"(?:[-+]?(?:\d[\d_]*\.\d*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d+(?:[eE][-+]?\d+)?)"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
for _tag, _pattern, _first in (
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), None),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?(?:0|[1-9][\d_]*)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"<<$"), ["<"]),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True)
)


def dump(value: Any) -> str:
    """Return YAML that reads back to ``value``: mappings in blocks, lists in one line.

    Example:
      >>> print(dump({"seen": ["en", "no"], "rate": 1e-5}), end="")
      seen: [en, 'no']
      rate: 1.0e-05
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=96)


def flow(value: Any, most: int | None = None) -> str:
    """Return a value as YAML in one line, with at most so many characters.

    Example:
      >>> flow({"c": 0.5}), flow(None), flow("12")
      ('{c: 0.5}', 'null', "'12'")
    """
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=10_000,
        default_flow_style=True,
    )
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if most is None or len(text) <= most else f"{text[:most]}..."


def describe_error(error: yaml.YAMLError) -> str:
    """Return where the text stopped being YAML, and why, in one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{where}{f'{context}, ' if context else ''}{problem}."
