"""Several sources in one run, and a source of their own for held-out examples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from jaxmoo.errors import ConfigError, did_you_mean

__all__ = ["SOURCE_KEYS", "check_entry", "with_entry"]

D = TypeVar("D")

# What a source of several may have of its own, and what a value has to be.
SOURCE_KEYS: Mapping[str, str] = {
    "source": "text",
    "options": "options",
    "weight": "number",
    "columns": "mapping",
    "prompt": "texts",
    "completion": "texts",
    "system": "texts",
    "codes": "mapping",
    "language_column": "text",
    "subset": "text",
    "split": "text",
}


def check_entry(name: str, entry: Mapping[str, Any], columns: list[str]) -> list[str]:
    """Return what is wrong with the settings of one source.

    Args:
      name: what they are called, ``data.sources[0]``.
      entry: the settings.
      columns: the keys that ``columns`` may have.

    Example:
      >>> check_entry("data.sources[0]", {"sorce": "a.jsonl"}, [])
      ["data.sources[0].sorce is not a setting. Did you mean 'source'? A source has the keys \
source, options, weight, columns, prompt, completion, system, codes, language_column, subset, \
split."]
    """
    problems = []
    for key, value in entry.items():
        if key not in SOURCE_KEYS:
            problems.append(
                f"{name}.{key} is not a setting.{did_you_mean(key, SOURCE_KEYS)} A source has the "
                f"keys {', '.join(SOURCE_KEYS)}."
            )
        elif value is not None and not _fits(value, SOURCE_KEYS[key]):
            problems.append(f"{name}.{key} must be {_WORDS[SOURCE_KEYS[key]]}, found {value!r}.")
        elif key == "columns":
            problems += [
                f"{name}.columns takes {', '.join(columns)}, found {one!r}."
                f"{did_you_mean(one, columns)}"
                for one in value or ()
                if one not in columns
            ]
    return problems


_WORDS = {
    "text": "text",
    "texts": "text, or a mapping of texts by language",
    "mapping": "a mapping to text",
    "number": "a number above 0",
    "options": "a mapping",
}


def _fits(value: Any, kind: str) -> bool:
    if kind == "number":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and 0 < value < math.inf
    if kind == "options":
        return isinstance(value, Mapping)
    if isinstance(value, str) and value:
        return kind in ("text", "texts")
    texts = isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values())
    return texts and kind in ("texts", "mapping")


def with_entry(data: D, entry: Mapping[str, Any], columns: type) -> D:
    """Return settings of data whose only source is one of several.

    Raises:
      ConfigError: `entry` is none; :func:`check_entry` says what is wrong with it.
    """
    if problems := check_entry("source", entry, [f.name for f in dataclasses.fields(columns)]):
        raise ConfigError("\n".join(problems))
    own = {key: value for key, value in entry.items() if key != "weight" and value is not None}
    if "columns" in own:
        own["columns"] = columns(**own["columns"])
    one: Any = data
    return dataclasses.replace(one, sources=[], held_out_source=None, **own)
