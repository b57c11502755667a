"""Checks of the numbers and choices given to a factory.

A number may be traced: schedules change it inside a compiled step (``optax.inject_hyperparams``).
Its range is then the caller's business; only concrete numbers are checked.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from jaxmoo.errors import ConfigError, did_you_mean

_Factory = TypeVar("_Factory", bound=Callable[..., Any])


def reusable(factory: _Factory) -> _Factory:
    """Let a factory return the same object for the same parameters.

    What was compiled for an aggregator is found again by the object itself, so
    ``aggregate(cagrad(0.4), J)`` in a loop compiles once. Parameters that cannot be compared
    (lists, arrays, traced numbers) make a new object.

    Args:
      factory: the factory.

    Returns:
      The factory with a memory.
    """
    remembered = functools.lru_cache(maxsize=64, typed=True)(factory)

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        try:
            hash((args, tuple(kwargs.values())))
        except TypeError:
            return factory(*args, **kwargs)
        return remembered(*args, **kwargs)

    return make  # type: ignore[return-value]


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
    bounds = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    kind = "an integer" if whole else "a number"
    if isinstance(value, jax.core.Tracer) and not whole:
        return
    scalar = not isinstance(value, bool | str | jax.core.Tracer) and np.ndim(value) == 0
    if scalar:
        try:
            number = float(value)
        except (TypeError, ValueError):
            scalar = False
    if scalar and whole:
        scalar = number == round(number) and not isinstance(value, float)
    inside = scalar and low <= number <= high
    if not inside or (open_low and number == low) or (open_high and number == high):
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


def build(
    kind: str, factories: Mapping[str, Callable[..., Any]], name: Any, options: Mapping[str, Any]
) -> Any:
    """Call the factory of a name, or say what is wrong with the name or the options.

    Args:
      kind: what the factories make, for the messages.
      factories: factories by name.
      name: the name asked for.
      options: the factory's arguments.

    Returns:
      What the factory makes.

    Raises:
      ConfigError: if the name or an option is unknown, or a required option is missing.
    """
    if not isinstance(name, str) or name not in factories:
        raise ConfigError(
            f"Unknown {kind} {name!r}.{did_you_mean(str(name), factories)} Known: "
            f"{', '.join(factories)}."
        )
    signature = inspect.signature(factories[name])
    known = list(signature.parameters)
    for option in options:
        if option not in known:
            raise ConfigError(
                f"Unknown option {option!r} of {kind} {name!r}.{did_you_mean(option, known)} "
                f"It takes {', '.join(known) if known else 'none'}."
            )
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ConfigError(f"{kind.capitalize()} {name!r}: {error}.") from error
    return factories[name](**options)
