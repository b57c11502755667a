"""How far back a token attends, which layers of one program may differ in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Window", "Windows", "by_kind", "size_of", "with_kind"]


class Windows(NamedTuple):
    """The window of a layer that is one of several kinds: which is known when it runs.

    Attributes:
      sizes: the kinds' windows; None for none.
      which: int32 scalar, the layer's kind.
    """

    sizes: tuple[int | None, ...]
    which: jax.Array

    @property
    def size(self) -> jax.Array:
        """The layer's window; the largest integer for none."""
        return jnp.asarray([_NONE if size is None else size for size in self.sizes])[self.which]


Window = int | Windows | None
_NONE = 2**31 - 1


def size_of(window: Window) -> int | jax.Array | None:
    """Number of tokens that a token attends to; None for all before it."""
    return window.size if isinstance(window, Windows) else window


def with_kind(segment_ids: jax.Array | None, which: jax.Array, q: jax.Array) -> jax.Array:
    """Segments [B, S], or none [B, 0], and in a last column the number of the layer's kind.

    So every row of a batch says it, however batches are folded and divided.
    """
    number = jnp.broadcast_to(which, (q.shape[0], 1)).astype(jnp.int32)
    return number if segment_ids is None else jnp.concatenate([segment_ids, number], 1)


def by_kind(
    kernels: Sequence[Callable[..., jax.Array]],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    with_kind: jax.Array,
) -> jax.Array:
    """The kernel of the layer's kind."""
    segment_ids = with_kind[:, :-1] if with_kind.shape[1] > 1 else None
    return jax.lax.switch(with_kind[0, -1], kernels, q, k, v, segment_ids)
