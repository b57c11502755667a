"""Mesh axes, and how parameters, batches and per-language gradients lie on them.

Four axes: ``data`` (R replicas of everything), ``language`` (L groups of devices, K / L languages
in each), ``fsdp`` (F devices that share a group's examples) and ``tensor`` (M devices that share
every matrix product, as the compiler sees fit). Within a replica, parameters and optimiser state
are sharded over ``language`` and ``fsdp`` together, as fully sharded data parallelism would over
L x F devices, and over ``tensor`` along another axis. Nothing is replicated but arrays too small to
divide.

TPUs come in slices: chips that are wired to each other, while slices talk over the data centre's
network. Devices are put in the mesh such that neighbours in it are neighbours in the slice, and
that only ``data``, the outermost axis, goes from slice to slice.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo.blocks import path_string
from jaxmoo.errors import ConfigError
from jaxmoo.platforms import platform_of
from jaxmoo.slices import by_slice

__all__ = [
    "batch_sharding",
    "make_mesh",
    "mesh_shape",
    "objective_shardings",
    "parameter_shardings",
    "rows_sharding",
    "sharded_axis",
]

DATA, LANGUAGE, FSDP, TENSOR = "data", "language", "fsdp", "tensor"

# The axes over which the devices of a replica hold pieces of an array, the slowest first. What is
# summed over examples is then cut along its outermost axis: compilers for TPUs make a
# reduce-scatter of that without a copy, and of any other order an all-reduce of everything.
PIECES = FSDP, LANGUAGE


def mesh_shape(
    num_languages: int,
    num_devices: int,
    *,
    language: int | None = None,
    fsdp: int | None = None,
    data: int = 1,
    tensor: int = 1,
    slices: int = 1,
) -> tuple[int, int, int, int]:
    """Choose the sizes of the axes that are not given.

    Args:
      num_languages: K.
      num_devices: how many devices there are.
      language: L, groups of devices. By default the largest divisor of K that also divides the
        number of devices (by ``data`` and ``fsdp``, where these are given). An L that does not
        divide K leaves the last groups with places for languages that do not exist.
      fsdp: F, devices per group. By default all the rest.
      data: R, replicas.
      tensor: M, devices that share each matrix product.
      slices: among how many slices the devices are divided; each holds R / slices replicas.

    Returns:
      ``(R, L, F, M)``.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, L exceeds K, or a replica
        would lie in several slices.

    Example:
      >>> mesh_shape(4, 8)
      (1, 4, 2, 1)
      >>> mesh_shape(4, 8, data=2)
      (2, 4, 1, 1)
    """
    if data % slices:
        raise ConfigError(
            f"mesh.data ({data}) must be a multiple of the number of slices ({slices}): devices "
            "along language, fsdp and tensor exchange every gradient and must lie in one slice. "
            f"Set mesh.data={slices} for a replica in each."
        )
    fixed = data * tensor
    if language is None:
        language = math.gcd(num_languages, num_devices // (fixed * (fsdp or 1)))
    if fsdp is None:
        fsdp = num_devices // (fixed * language) if language else 0
    if fixed * language * fsdp != num_devices or not num_devices:
        raise ConfigError(
            f"mesh: data ({data}) x language ({language}) x fsdp ({fsdp}) x tensor ({tensor}) = "
            f"{fixed * language * fsdp}, but there are {num_devices} devices. Leave out language "
            "or fsdp to have it chosen."
        )
    if language > num_languages:
        raise ConfigError(
            f"mesh: language ({language}) must be at most the number of languages "
            f"({num_languages}). Use fsdp or data for the other devices."
        )
    return data, language, fsdp, tensor


def make_mesh(
    num_languages: int,
    *,
    language: int | None = None,
    fsdp: int | None = None,
    data: int | None = None,
    tensor: int = 1,
    slices: int | None = None,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Arrange devices as ``data`` x ``language`` x ``fsdp`` x ``tensor``.

    The order of TPUs in it follows from where they are in their slice, and is the same in every
    run. Other devices stay in the order in which they are given.

    Args:
      num_languages: K.
      language: L; see :func:`mesh_shape`.
      fsdp: F; see :func:`mesh_shape`.
      data: R; by default one replica in every slice.
      tensor: M; see :func:`mesh_shape`.
      slices: see :func:`jaxmoo.slices.by_slice`.
      devices: the devices, ``jax.devices()`` by default.

    Returns:
      A mesh with axes ``("data", "language", "fsdp", "tensor")``.

    Raises:
      ConfigError: as :func:`mesh_shape` and :func:`jaxmoo.slices.by_slice`.

    Example:
      >>> dict(make_mesh(8, devices=jax.devices()[:1]).shape)
      {'data': 1, 'language': 1, 'fsdp': 1, 'tensor': 1}
    """
    found = by_slice(jax.devices() if devices is None else devices, slices)
    shape = mesh_shape(
        num_languages,
        sum(map(len, found)),
        language=language,
        fsdp=fsdp,
        data=len(found) if data is None else data,
        tensor=tensor,
        slices=len(found),
    )
    inner = (shape[0] // len(found), *shape[1:])
    grid = np.concatenate([_arranged(some, inner) for some in found])
    return Mesh(grid, (DATA, LANGUAGE, FSDP, TENSOR), axis_types=(AxisType.Auto,) * 4)


def _arranged(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Arrange the devices of one slice such that neighbours along inner axes are wired."""
    if platform_of(devices) == "tpu" and all(hasattr(device, "coords") for device in devices):
        # What is no whole box of chips it refuses, in one way or another.
        with contextlib.suppress(AssertionError, NotImplementedError, ValueError):
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(shape)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of rows [N, ...] that belong to no language axis: spread over all devices."""
    return NamedSharding(mesh, P((DATA, LANGUAGE, FSDP, TENSOR)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch [K, B, ...]: languages over ``language``, examples over the rest."""
    return NamedSharding(mesh, P(LANGUAGE, (DATA, FSDP)))


def local_rows(mesh: Mesh, num_languages: int, batch_size: int) -> np.ndarray:
    """Return which rows of a batch the devices of this process hold: bool [K, B].

    Args:
      mesh: the devices.
      num_languages: K.
      batch_size: B, rows per language.

    Example:
      >>> local_rows(make_mesh(2, devices=jax.devices()[:1]), 2, 3).all()
      np.True_
    """
    rows = np.zeros((num_languages, batch_size), bool)
    held = batch_sharding(mesh).addressable_devices_indices_map(rows.shape)
    for index in held.values():
        rows[index] = True
    return rows


def sharded_axis(path: str, shape: Sequence[int], pieces: int) -> int | None:
    """Choose the axis along which devices hold pieces of one array.

    Args:
      path: the array's dotted path.
      shape: the array's shape, without an axis of stacked layers.
      pieces: number of pieces, L x F.

    Returns:
      The first axis that divides evenly; of a table of vectors (``embedding`` [V, D]) the last, so
      that every device has its share of any slice of the vocabulary. None when no axis divides.

    Example:
      >>> sharded_axis("mlp.up_proj.kernel", (6, 16), 4)
      1
    """
    axes = range(len(shape))
    if path.rsplit(".", 1)[-1] == "embedding":
        axes = axes[::-1]
    return next((a for a in axes if shape[a] and shape[a] % pieces == 0), None)


def parameter_shardings(mesh: Mesh, tree: Any, *, stacked: str | None = None) -> Any:
    """Shard every array along the axis that :func:`sharded_axis` chooses.

    Args:
      mesh: from :func:`make_mesh`.
      tree: pytree of anything with ``shape``.
      stacked: regular expression of the paths of arrays that stack layers along their first
        axis; that axis is scanned over and so is left whole.

    Returns:
      A pytree of NamedSharding; an array with no axis that divides is replicated.
    """
    return _shardings(mesh, tree, stacked, PIECES, leading=())


def objective_shardings(mesh: Mesh, tree: Any, *, stacked: str | None = None) -> Any:
    """Shardings of per-language gradients [K, ...] of the parameters in ``tree``.

    Each language group holds its own languages' gradients, spread over its devices.
    """
    return _shardings(mesh, tree, stacked, (FSDP,), leading=(LANGUAGE,))


def _shardings(
    mesh: Mesh, tree: Any, stacked: str | None, axes: tuple[str, ...], leading: tuple[str, ...]
) -> Any:
    # The same axis is chosen for parameters and their gradients: the whole mesh divides it.
    pieces = mesh.shape[LANGUAGE] * mesh.shape[FSDP]

    def one(path: Any, x: Any) -> NamedSharding:
        name = path_string(path)
        skip = int(stacked is not None and re.search(stacked, name) is not None)
        spec: list[Any] = [None] * len(x.shape)
        axis = sharded_axis(name, x.shape[skip:], pieces)
        if axis is not None:
            spec[axis + skip] = axes
        size = mesh.shape.get(TENSOR, 1)
        free = [a for a in range(skip, len(spec)) if spec[a] is None and x.shape[a] % size == 0]
        if size > 1 and len(x.shape) - skip > 1 and free:
            spec[free[-1]] = TENSOR
        return NamedSharding(mesh, P(*leading, *spec))

    return jax.tree_util.tree_map_with_path(one, tree)
