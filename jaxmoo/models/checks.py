"""Values of a model's description, checked: their types and ranges, and what is not built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmoo.errors import ConfigError, shown

__all__ = ["LARGEST", "check_flag", "check_number", "check_size", "is_size", "refuse"]

LARGEST = 2**31 - 1  # rows and positions are numbered in 32 bits
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def is_size(value: Any) -> bool:
    """Whether a value is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_size(name: str, value: Any, most: int = LARGEST) -> int:
    """Return a value, unless it is no integer from 1 to ``most``.

    Raises:
      ConfigError: names the value.
    """
    if not is_size(value):
        raise ConfigError(f"model config: {name} must be a positive integer, got {shown(value)}")
    if value > most:
        raise ConfigError(f"model config: {name} must be at most {most}, got {shown(value)}")
    return value


def check_number(name: str, value: Any, least: float, *, above: bool = False) -> float:
    """Return a value, unless it is no number from ``least``, or above it, to float32's largest.

    Raises:
      ConfigError: names the value.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not least <= value <= _FLOAT32_MAX
        or (above and value == least)
    ):
        raise ConfigError(
            f"model config: {name} must be a finite number {'above' if above else 'of at least'} "
            f"{least:g}, got {shown(value)}"
        )
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """Return a value, unless it is neither true nor false.

    Raises:
      ConfigError: names the value.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"model config: {name} must be true or false, got {shown(value)}")
    return value


def refuse(config: Mapping[str, Any], **only: Any) -> None:
    """Raise unless each setting, where present, has the one value that is implemented.

    A null is false.

    Raises:
      ConfigError: names the setting.
    """
    for key, supported in only.items():
        found = config.get(key, supported)
        if found != supported and not (supported is False and found is None):
            raise ConfigError(
                f"{config.get('model_type')} with {key}={shown(found)} is not supported "
                f"(only {supported!r})"
            )
