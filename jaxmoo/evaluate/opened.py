"""Models of any kind on a mesh's devices, to be scored or asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxmoo import mesh
from jaxmoo.convert.models import Opened, open_model
from jaxmoo.models import Decoder
from jaxmoo.models.paths import STACKED
from jaxmoo.platforms import platform_of

__all__ = ["open_on"]


def open_on(
    device_mesh: Mesh,
    model: Path,
    *,
    step: int | None,
    base: str | None,
    dtype: str,
    say: Callable[[str], None],
) -> tuple[Opened, Callable[[Any], Decoder]]:
    """Load a model onto a mesh.

    Args:
      device_mesh: the devices, over which its parameters are spread.
      model: its directory; see :func:`jaxmoo.convert.models.open_model`.
      step: likewise.
      base: likewise.
      dtype: dtype of the computation.
      say: called with lines for a person to read.

    Returns:
      The model, and ``parameters -> Decoder``, which computes in ``dtype`` on these devices.

    Raises:
      CheckpointError: it is damaged, of no kind, or has no such step.
    """
    opened = open_model(
        model,
        step=step,
        base=base,
        shardings=lambda state: mesh.parameter_shardings(device_mesh, state, stacked=STACKED),
        say=say,
    )
    graph = nnx.graphdef(
        Decoder.abstract(
            opened.model.config,
            segments=opened.model.segments,
            dtype=jnp.dtype(dtype),
            platform=platform_of(device_mesh.devices.flat),
        )
    )
    return opened, lambda parameters: nnx.merge(graph, parameters)
