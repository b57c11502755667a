"""Factories by name: what a configuration's words and options are turned into.

A factory enters by a decorator where it is defined, so its file is all there is to add. Names are
listed in the order in which the files are imported.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from jaxmoo.errors import ConfigError, did_you_mean

__all__ = ["Registry", "check_options", "imported", "is_path"]

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
        self._imported: dict[Any, Any] = {}

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
          name: one of :attr:`names`; or ``"package.module:object"``, where another factory or a
            ready-made object is imported from; or a ready-made object, which is returned as it is.
          **options: parameters of the factory.

        Returns:
          The object.

        Raises:
          ConfigError: if the name or an option is unknown, a required option is missing,
            options are given for a ready-made object, or what is imported is not there or of
            another kind.
        """
        if isinstance(name, str) and is_path(name):
            found = imported(name, self._kind)
            if not isinstance(found, self._made):
                return self._made_by(found, name, options)
            return self.get(found, **options)
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
                f"{', '.join(self._factories)}; or give package.module:object for your own."
            )
        return self._make(self._factories[name], name, options)

    def _made_by(self, factory: Any, path: str, options: dict[str, Any]) -> Made:
        """What an imported factory makes, the same object for the same options."""
        wanted = f"expected {_a(self._kind)}, or a function that returns one"
        if not callable(factory):
            raise ConfigError(f"{path}: {wanted}; found {type(factory).__name__}.")
        if factory not in self._imported:
            self._imported[factory] = _remembering(factory)
        found = self._make(self._imported[factory], path, options)
        if not isinstance(found, self._made):
            raise ConfigError(f"{path}: {wanted}; it returned {type(found).__name__}.")
        return found

    def _make(self, factory: Callable[..., Made], name: str, options: dict[str, Any]) -> Made:
        check_options(factory, self._kind, name, options)
        return factory(**options)


def check_options(
    factory: Callable[..., Any], kind: str, name: str, options: Mapping[str, Any]
) -> None:
    """Raise unless a factory takes these options.

    Args:
      factory: a function or a class.
      kind: what it makes, for messages.
      name: its name.
      options: what it is to be called with, by parameter.

    Raises:
      ConfigError: an option is unknown, or a required one is missing.

    Example:
      >>> check_options(lambda size=1: "a" * size, "text", "letters", {"size": 3})
    """
    try:
        signature = inspect.signature(factory)
    except ValueError:  # of some that are written in C nobody knows
        return
    known = list(signature.parameters)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for option in options:
        if option not in known and not takes_any:
            raise ConfigError(
                f"Unknown option {option!r} of {kind} {name!r}.{did_you_mean(option, known)} "
                f"It takes {', '.join(known) if known else 'none'}."
            )
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ConfigError(f"{kind.capitalize()} {name!r}: {error}.") from error


def is_path(name: str) -> bool:
    """Whether a name says where something is imported from.

    Example:
      >>> is_path("package.module:object"), is_path("cagrad")
      (True, False)
    """
    return bool(re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", name))


def imported(path: str, kind: str) -> Any:
    """Import an object of the user's, from an installed package or from the working directory.

    Args:
      path: ``"package.module:object"``.
      kind: what it should be, for messages.

    Returns:
      The object.

    Raises:
      ConfigError: the module is not found or cannot be imported, or it has no such object.

    Example:
      >>> imported("math:tau", "number") > 6
      True
      >>> imported("math:tao", "number")
      Traceback (most recent call last):
      jaxmoo.errors.ConfigError: Number 'math:tao': math has no 'tao'. Did you mean 'tau'?
    """
    module, _, name = path.partition(":")
    what = f"{kind.capitalize()} {path!r}"
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a command of an installed package does not look there
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{what}: there is no module {error.name!r}, neither installed nor in "
                f"{os.getcwd()}. Install its package, or add its folder to PYTHONPATH."
            ) from error
        raise ConfigError(f"{what}: {module} needs {error.name}: {error}.") from error
    except Exception as error:
        raise ConfigError(
            f"{what}: importing {module} failed: {type(error).__name__}: {error}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{what}: {module} has no {name!r}.{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    return found


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


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
