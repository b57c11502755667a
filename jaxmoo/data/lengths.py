"""Which examples have a length that is asked for."""

from __future__ import annotations

from jaxmoo.config.data_section import LengthsConfig
from jaxmoo.data.example import Example

__all__ = ["fits", "fits_tokens"]


def fits(example: Example, lengths: LengthsConfig) -> bool:
    """Whether an example has as many characters as asked.

    Example:
      >>> fits(Example.from_pair("en", "Hi", "Hello"), LengthsConfig(max_characters=6))
      False
    """
    return _within(example.characters, lengths.min_characters, lengths.max_characters)


def fits_tokens(length: int, lengths: LengthsConfig) -> bool:
    """Whether an example has as many tokens as asked.

    Args:
      length: its tokens before it is truncated.
      lengths: the settings.
    """
    return _within(length, lengths.min_tokens, lengths.max_tokens)


def _within(length: int, least: int | None, most: int | None) -> bool:
    return (least is None or length >= least) and (most is None or length <= most)
