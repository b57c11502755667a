"""Loss weightings by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxmoo.aggregators.parameters import build
from jaxmoo.errors import ConfigError
from jaxmoo.weighting.base import Weighting
from jaxmoo.weighting.dwa import dwa
from jaxmoo.weighting.famo import famo
from jaxmoo.weighting.learned import imtl_l, uw
from jaxmoo.weighting.static import static, temperature

_FACTORIES: dict[str, Callable[..., Weighting]] = {
    factory.__name__: factory for factory in (static, temperature, famo, uw, dwa, imtl_l)
}


def names() -> tuple[str, ...]:
    """Names of all weightings.

    Returns:
      The names :func:`get` takes.

    Example:
      >>> "famo" in names()
      True
    """
    return tuple(_FACTORIES)


def get(name: str | Weighting, **options: Any) -> Weighting:
    """A weighting by name.

    Args:
      name: one of :func:`names`, or a weighting, which is returned as it is.
      **options: parameters of its factory.

    Returns:
      The weighting.

    Raises:
      ConfigError: if the name or an option is unknown, or an option is out of range.

    Example:
      >>> get("fano")
      Traceback (most recent call last):
      jaxmoo.errors.ConfigError: Unknown weighting 'fano'. Did you mean 'famo'? ...
    """
    if isinstance(name, Weighting):
        if options:
            raise ConfigError(
                f"Options {sorted(options)} cannot change a ready-made weighting: give them to "
                "its factory."
            )
        return name
    return build("weighting", _FACTORIES, name, options)
