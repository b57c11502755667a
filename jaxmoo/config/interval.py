"""How often something happens: after so many steps, or after so much time."""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxmoo.errors import ConfigError, shown

__all__ = ["Interval", "parse_interval"]

_SECONDS = {"s": 1, "min": 60, "h": 3600}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h)")
_MOST = 10**9


class Interval(NamedTuple):
    """Steps or seconds between two times; neither where it never happens.

    Attributes:
      steps: their number, 0 if it does not go by steps.
      seconds: their number, None if it does not go by time.
    """

    steps: int = 0
    seconds: float | None = None


def parse_interval(value: int | str, what: str = "an interval") -> Interval:
    """Read an interval: a number of steps, or a time with its unit (``s``, ``min`` or ``h``).

    Args:
      value: what was given; 0 is never.
      what: what it is for, as an error begins.

    Raises:
      ConfigError: it is neither.

    Example:
      >>> parse_interval("10min"), parse_interval("1.5 h").seconds, parse_interval(8)
      (Interval(steps=0, seconds=600.0), 5400.0, Interval(steps=8, seconds=None))
    """
    text = str(value).strip()
    if re.fullmatch(r"[0-9]{1,9}", text) and not isinstance(value, bool):
        return Interval(steps=int(text))
    found = _TIME.fullmatch(text)
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if not 0 < seconds <= _MOST:
        raise ConfigError(
            f"{what} must be a number of steps such as 50, or a time such as 90s, 10min or 2h; "
            f"found {shown(value)}."
        )
    return Interval(seconds=seconds)
