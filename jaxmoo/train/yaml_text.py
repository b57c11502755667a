"""YAML the way people read it.

YAML 1.1, which PyYAML reads, takes the bare words ``no``, ``on`` and ``off`` for truth values, so
that a list of languages loses Norwegian; takes ``1e-4`` for text; and lets a key that is given
twice win silently. Here only ``true`` and ``false`` are truth values, ``1e-4`` is a number, and
giving a key twice is an error.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

__all__ = ["Loader", "describe_error", "dump", "flow"]


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the rules above."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

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


def flow(value: Any) -> str:
    """Return a value as YAML in one line.

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
    return text.removesuffix("\n").removesuffix("\n...")


def describe_error(error: yaml.YAMLError) -> str:
    """Return where the text stopped being YAML, and why, in one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{where}{f'{context}, ' if context else ''}{problem}."
