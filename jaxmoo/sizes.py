"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import re

from jaxmoo.errors import ConfigError

__all__ = ["format_size", "parse_size"]

_PREFIXES = ("", "k", "M", "G", "T")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kKMGT]?)(i?)B)?")


def parse_size(text: int | str, *, what: str = "a size", needs_unit: bool = False) -> int:
    """Read a number of bytes.

    Args:
      text: a number with a unit, such as ``25MiB`` (powers of 1024) or ``5 GB`` (powers of 1000),
        without a unit it counts bytes.
      what: what the size is for, to begin an error message with.
      needs_unit: refuse a number without a unit.

    Raises:
      ConfigError: it is no positive size.

    Example:
      >>> parse_size("80GB"), parse_size("1.5 GiB"), parse_size(1024)
      (80000000000, 1610612736, 1024)
    """
    found = _SIZE.fullmatch(str(text).strip())
    size, prefix = 0, None
    if found is not None:
        number, prefix, binary = found.groups()
        power = _PREFIXES.index((prefix or "").replace("K", "k"))
        size = int(float(number) * (1024 if binary else 1000) ** power)
    if size < 1 or (needs_unit and prefix is None):
        raise ConfigError(
            f"{what}: expected a positive size such as 80GB or 25MiB, found {text!r}."
        )
    return size


def format_size(count: float) -> str:
    """Return a number of bytes as a short text, in powers of 1000.

    Example:
      >>> format_size(25_800_000_000), format_size(448)
      ('25.80 GB', '448 B')
    """
    power = 0
    while abs(count) >= 1000 and power + 1 < len(_PREFIXES):
        count, power = count / 1000, power + 1
    return f"{count:,.2f} {_PREFIXES[power]}B" if power else f"{count:,.0f} B"
