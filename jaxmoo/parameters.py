"""Checks of the numbers and choices given to a factory.

A number may be traced: schedules change it inside a compiled step (``optax.inject_hyperparams``).
Its range is then the caller's business; only concrete numbers are checked.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
from jax.core import Tracer

from jaxmoo.errors import ConfigError, did_you_mean


def check_number(
    method: str,
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    whole: bool = False,
) -> None:
    """Refuse a concrete parameter outside its range.

    Args:
      method: the method's name, for the message.
      name: the parameter's name, for the message.
      value: what was given; a traced scalar passes.
      low: smallest allowed value.
      high: largest allowed value.
      open_low: whether ``low`` itself is excluded.
      open_high: whether ``high`` itself is excluded.
      whole: whether it must be an integer known at compile time.

    Raises:
      ConfigError: if it is not a scalar number in range.
    """
    if isinstance(value, Tracer) and not whole:
        return
    number = math.nan  # outside of any range
    if not isinstance(value, bool | str | Tracer) and np.ndim(value) == 0:
        with contextlib.suppress(TypeError, ValueError):
            number = float(value)
    if whole and (isinstance(value, float) or not number.is_integer()):
        number = math.nan
    inside = low <= number <= high
    if not inside or (open_low and number == low) or (open_high and number == high):
        bounds = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        kind = "an integer" if whole else "a number"
        raise ConfigError(f"{method}: expected {name} to be {kind} in {bounds}, found {value!r}.")


def check_choice(method: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices.

    Args:
      method: the method's name, for the message.
      name: the parameter's name, for the message.
      value: what was given.
      choices: what is allowed.

    Raises:
      ConfigError: if it is another.
    """
    if value not in choices:
        raise ConfigError(
            f"{method}: expected {name} to be one of {', '.join(map(repr, choices))}, found "
            f"{value!r}.{did_you_mean(value, choices)}"
        )
