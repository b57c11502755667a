"""What runs of one process have in common, made once and used again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from jaxmoo.config import Config, to_yaml
from jaxmoo.config.data_section import SamplingConfig

__all__ = ["Kept", "corpus_key", "program_key", "weights_key"]

T = TypeVar("T")


class Kept:
    """Parts of runs, each made when it is first asked for.

    Data that is tokenised, weights that are read and programs that are compiled for one run serve
    the next as well, as long as what they depend on is the same.

    Example:
      >>> kept, made = Kept(), []
      >>> for key in ("a", "a", "b"):
      ...     _ = kept.part("data", key, lambda key=key: made.append(key))
      >>> made
      ['a', 'b']
    """

    def __init__(self) -> None:
        self._parts: dict[str, dict[Hashable, Any]] = {}

    def part(self, kind: str, key: Hashable, make: Callable[[], T], *, most: int = 1) -> T:
        """Return a part, made now unless it has been before.

        Args:
          kind: what it is, such as ``weights``.
          key: what it depends on.
          make: makes it.
          most: how many of a kind are kept; the oldest goes when there would be more.
        """
        parts = self._parts.setdefault(kind, {})
        if key not in parts:
            while len(parts) >= most:
                del parts[next(iter(parts))]
            parts[key] = make()
        return parts[key]


def corpus_key(config: Config) -> str:
    """Return what decides a run's tokenised examples."""
    data = dataclasses.replace(
        config.data, batch_size=1, packing=False, languages_per_step=None, sampling=SamplingConfig()
    )
    return repr((config.model.source, data))


def weights_key(config: Config) -> str:
    """Return what decides the decoder that a run begins with, and which part of it is trained."""
    return repr((config.model, config.lora, config.mesh))


def program_key(config: Config) -> str:
    """Return what decides a run's compiled step: all settings but seed and learning rate."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1.0)
    return to_yaml(dataclasses.replace(config, seed=0, output="", optimizer=optimizer))
