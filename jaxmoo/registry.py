"""Factories by name: what a configuration's words and options are turned into.

A factory enters by a decorator where it is defined, so its file is all there is to add. Names are
listed in the order in which the files are imported.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from jaxmoo.errors import ConfigError, did_you_mean

__all__ = ["Registry"]

Made = TypeVar("Made")
Factory = TypeVar("Factory", bound=Callable[..., Any])


class Registry(Generic[Made]):
    """Factories of one kind of object.

    Args:
      kind: what the factories make, for messages.
      made: its class.

    Example:
      >>> shouts = Registry("shout", bytes)
      >>> @shouts.register
      ... def loud(times: int = 1) -> bytes:
      ...     return b"hey" + b"!" * times
      >>> shouts.names, shouts.get("loud", times=3)
      (('loud',), b'hey!!!')
    """

    def __init__(self, kind: str, made: type[Made]) -> None:
        self._kind, self._made = kind, made
        self._factories: dict[str, Callable[..., Made]] = {}

    def register(self, factory: Factory) -> Factory:
        """Let a factory be found by its name, and give the same object for the same parameters.

        What was compiled for an object is found again by the object itself, so
        ``aggregate(cagrad(0.4), J)`` in a loop compiles once. Parameters that cannot be compared
        (lists, arrays, traced numbers) make a new object.

        Args:
          factory: the factory; its name is the one to be found by.

        Returns:
          The factory with a memory.
        """
        made = _remembering(factory)
        self._factories[factory.__name__] = made
        return made

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the factories."""
        return tuple(self._factories)

    def get(self, name: str | Made, **options: Any) -> Made:
        """Make an object by name, or pass one through.

        Args:
          name: one of :attr:`names`, or a ready-made object, which is returned as it is.
          **options: parameters of the factory.

        Returns:
          The object.

        Raises:
          ConfigError: if the name or an option is unknown, a required option is missing, or
            options are given for a ready-made object.
        """
        if isinstance(name, self._made):
            if options:
                raise ConfigError(
                    f"Options {sorted(options)} cannot change the ready-made {self._kind}: give "
                    "them to its factory."
                )
            return name
        if not isinstance(name, str) or name not in self._factories:
            raise ConfigError(
                f"Unknown {self._kind} {name!r}.{did_you_mean(str(name), self._factories)} Known: "
                f"{', '.join(self._factories)}."
            )
        factory = self._factories[name]
        signature = inspect.signature(factory)
        known = list(signature.parameters)
        for option in options:
            if option not in known:
                raise ConfigError(
                    f"Unknown option {option!r} of {self._kind} {name!r}."
                    f"{did_you_mean(option, known)} "
                    f"It takes {', '.join(known) if known else 'none'}."
                )
        try:
            signature.bind(**options)
        except TypeError as error:
            raise ConfigError(f"{self._kind.capitalize()} {name!r}: {error}.") from error
        return factory(**options)


def _remembering(factory: Factory) -> Factory:
    remembered = functools.lru_cache(maxsize=64, typed=True)(factory)

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        try:
            hash((args, tuple(kwargs.values())))
        except TypeError:
            return factory(*args, **kwargs)
        return remembered(*args, **kwargs)

    return make  # type: ignore[return-value]
