"""Parameters in Orbax checkpoints, straight to and from where they lie on the devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from jaxmoo import mesh
from jaxmoo.errors import CheckpointError
from jaxmoo.files.digests import note_own_digests
from jaxmoo.models.paths import STACKED, named_leaves

__all__ = ["restore_params", "save_params", "spread"]


def spread(state: nnx.State) -> Any:
    """Spread parameters over all devices."""
    everything = mesh.make_mesh(1)
    return mesh.parameter_shardings(everything, state, stacked=STACKED)


def _nested(state: nnx.State) -> dict[str, Any]:
    """A state as nested dicts, which is how it is stored."""
    tree: dict[str, Any] = {}
    for path, leaf in named_leaves(state):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def _checkpointer(params: nnx.State) -> ocp.Checkpointer:
    """Orbax, told to hold no more in the host's memory at a time than the largest array needs."""
    most = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)) // 10**9 + 1
    handler = ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=most,
        restore_concurrent_gb=most,
        save_device_host_concurrent_gb=most,
    )
    return ocp.Checkpointer(handler)


def save_params(path: Path, params: nnx.State, out: Path) -> None:
    """Write parameters as they lie on the devices; ``out`` is where they will be found."""
    try:
        with _checkpointer(params) as checkpointer:
            checkpointer.save(path.absolute(), _nested(params))
        if jax.process_count() > 1:
            note_own_digests(path)
    except OSError:
        raise
    # The library wraps what the system says, such as that the disk is full, in errors of its own.
    except Exception as error:
        raise CheckpointError(
            f"{out} could not be written: {error}. Nothing was left behind. Check that the disk "
            "has room and the path can be written to."
        ) from error


def restore_params(
    path: Path,
    like: nnx.State,
    *,
    within: str | None = None,
    shardings: Callable[[nnx.State], Any] = spread,
) -> nnx.State:
    """Read parameters, or those under one name of a larger checkpoint, straight into place."""
    like = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        like,
        shardings(like),
    )
    # A run stores the state itself, with NNX's own keys; ours are nested dicts.
    item: Any = _nested(like) if within is None else {within: like}
    arguments = ocp.checkpoint_utils.construct_restore_args(item)
    with _checkpointer(like) as checkpointer:
        found = checkpointer.restore(
            path.absolute(),
            args=ocp.args.PyTreeRestore(
                item=item, restore_args=arguments, partial_restore=within is not None
            ),
        )
    if within is not None:
        return found[within]
    leaves = []
    for keys, _ in named_leaves(like):
        node = found
        for key in keys:
            node = node[key]
        leaves.append(node)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
