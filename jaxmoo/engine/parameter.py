"""What a loss function gets in place of each parameter array."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NoReturn

import jax
import numpy as np

from jaxmoo.errors import ConfigError

__all__ = ["Parameter"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter as a device holds it; only a block's function sees the array itself.

    It is a pytree, so that stacks of layers can be scanned over or indexed like arrays.

    Attributes:
      value: this device's piece.
      accumulator: zeros [K, piece] whose cotangent is the objectives' gradients, for a deferred
        parameter; else None.
      layer: number of the layer in its stack, or None.
      leaf: number of the array among all of them.
      path: its path, for messages.
      whole: shape of the whole array, or of one layer of an array that stacks layers.
    """

    value: Any
    accumulator: Any
    layer: Any
    leaf: int = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})
    whole: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array, which this device may hold a piece of."""
        return (*np.shape(self.layer), *self.whole)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the array."""
        return self.value.dtype

    def _outside(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(
            f"Parameter {self.path!r} is used outside of a block. Every call that reads parameters "
            "must be one: write jaxmoo.block(function)(params, ...) where the loss has "
            "function(params, ...)."
        )

    __jax_array__ = __array__ = __getitem__ = __call__ = _outside
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _outside
    __matmul__ = __rmatmul__ = __truediv__ = __rtruediv__ = __pow__ = __neg__ = _outside

    def __getattr__(self, name: str) -> Any:
        if name in ("T", "mT", "at", "astype", "reshape", "sum"):
            self._outside()
        raise AttributeError(name)
