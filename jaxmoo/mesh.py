"""Mesh axes, and how parameters, batches and per-language gradients lie on them.

Two axes: ``language`` (L groups of devices, K / L languages in each) and ``fsdp`` (F devices that
share a group's examples). Parameters and optimiser state are sharded over both axes together, as
fully sharded data parallelism would over L x F devices. Nothing is replicated but arrays too
small to divide.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo.blocks import path_string
from jaxmoo.errors import ConfigError

__all__ = [
    "batch_sharding",
    "make_mesh",
    "mesh_shape",
    "objective_shardings",
    "parameter_shardings",
    "rows_sharding",
]

LANGUAGE, FSDP = "language", "fsdp"


def mesh_shape(
    num_languages: int, num_devices: int, *, language: int | None = None, fsdp: int | None = None
) -> tuple[int, int]:
    """Choose the sizes of the two axes that are not given.

    Args:
      num_languages: K.
      num_devices: how many devices there are.
      language: L, groups of devices; must divide K. By default the largest divisor of K that
        also divides the number of devices (by ``fsdp``, where that is given).
      fsdp: F, devices per group. By default all the rest.

    Returns:
      ``(L, F)``.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or L does not divide K.

    Example:
      >>> mesh_shape(4, 8)
      (4, 2)
    """
    if language is None:
        language = math.gcd(num_languages, num_devices // (fsdp or 1))
    if fsdp is None:
        fsdp = num_devices // language
    if language * fsdp != num_devices:
        raise ConfigError(
            f"mesh: language ({language}) x fsdp ({fsdp}) = {language * fsdp}, but there are "
            f"{num_devices} devices. Leave one of the two out to have it chosen."
        )
    if num_languages % language:
        divisors = [str(d) for d in range(1, num_languages + 1) if num_languages % d == 0]
        raise ConfigError(
            f"mesh: language ({language}) must divide the number of languages ({num_languages}). "
            f"Choose one of {', '.join(divisors)}, and fsdp for the other devices."
        )
    return language, fsdp


def make_mesh(
    num_languages: int,
    *,
    language: int | None = None,
    fsdp: int | None = None,
    devices: list[Any] | None = None,
) -> Mesh:
    """Arrange devices as ``language`` x ``fsdp``.

    Args:
      num_languages: K.
      language: L; see :func:`mesh_shape`.
      fsdp: F; see :func:`mesh_shape`.
      devices: the devices, ``jax.devices()`` by default.

    Returns:
      A mesh with axes ``("language", "fsdp")``.

    Raises:
      ConfigError: as :func:`mesh_shape`.

    Example:
      >>> dict(make_mesh(8, devices=jax.devices()[:1]).shape)
      {'language': 1, 'fsdp': 1}
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(num_languages, len(devices), language=language, fsdp=fsdp)
    grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, (LANGUAGE, FSDP), axis_types=(AxisType.Auto, AxisType.Auto))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of rows [N, ...] that belong to no language axis: spread over all devices."""
    return NamedSharding(mesh, P((LANGUAGE, FSDP)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch [K, B, ...]: languages over ``language``, examples over ``fsdp``."""
    return NamedSharding(mesh, P(LANGUAGE, FSDP))


def parameter_shardings(mesh: Mesh, tree: Any, *, stacked: str | None = None) -> Any:
    """Shard every array along its first axis that the mesh divides.

    Args:
      mesh: from :func:`make_mesh`.
      tree: pytree of anything with ``shape``.
      stacked: regular expression of the paths of arrays that stack layers along their first
        axis; that axis is scanned over and so is left whole.

    Returns:
      A pytree of NamedSharding; an array with no axis that divides is replicated.
    """
    return _shardings(mesh, tree, stacked, (LANGUAGE, FSDP), leading=())


def objective_shardings(mesh: Mesh, tree: Any, *, stacked: str | None = None) -> Any:
    """Shardings of per-language gradients [K, ...] of the parameters in ``tree``.

    Each language group holds its own languages' gradients, spread over its devices.
    """
    return _shardings(mesh, tree, stacked, (FSDP,), leading=(LANGUAGE,))


def _shardings(
    mesh: Mesh, tree: Any, stacked: str | None, axes: tuple[str, ...], leading: tuple[str, ...]
) -> Any:
    def one(path: Any, x: Any) -> NamedSharding:
        scanned = stacked is not None and re.search(stacked, path_string(path)) is not None
        spec: list[Any] = [None] * len(x.shape)
        # The same axis is chosen for parameters and their gradients: the whole mesh divides it.
        candidates = [a for a in range(int(scanned), len(spec)) if x.shape[a] % mesh.size == 0]
        if candidates:
            spec[candidates[0]] = axes
        return NamedSharding(mesh, P(*leading, *spec))

    return jax.tree_util.tree_map_with_path(one, tree)
