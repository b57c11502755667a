"""JSON files as they are found after something went wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any


def damages(
    good: bytes, chance: random.Random, replaced: Callable[[], Any], count: int = 100
) -> Iterator[bytes]:
    """Yield damaged contents: in turn with a flipped bit, cut short, and with other values.

    Args:
      good: what was written.
      chance: decides where.
      replaced: returns what else a file may hold, for JSON to write.
      count: how many.
    """
    for number in range(count):
        content = bytearray(good)
        if number % 3 == 0:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        elif number % 3 == 1:
            del content[chance.randrange(len(content)) :]
        else:
            content = json.dumps(replaced()).encode()
        yield bytes(content)
