"""What JAX asks of computations on typed shardings.

On an explicit mesh, the default of ``jax.make_mesh``, arrays carry shardings in their types, and
every operation must say its own. What is computed here, products over gradients of any shape, is
left to the compiler, as on any other mesh, and the results are given types again.

Inside of ``jax.shard_map`` types say over which axes an array varies, and what a loop carries must
keep its type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

__all__ = ["automatic", "divided_by_compiler", "spec_of", "varying"]


def spec_of(x: Any) -> P:
    """Return an array's sharding over explicit axes, one entry per axis of the array."""
    return jax.typeof(x).sharding.spec


def divided_by_compiler() -> bool:
    """Whether the compiler divides what is traced here over an axis of the mesh.

    It cannot divide kernels: for TPUs it refuses, for GPUs it gathers what they read.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(kind != AxisType.Manual and size > 1 for kind, size in axes)


def automatic(function: Callable[..., Any], arguments: Sequence[Any], out_specs: Any) -> Any:
    """Call a function within which the compiler chooses shardings.

    Args:
      function: of arrays.
      arguments: pytrees of arrays.
      out_specs: how the results are sharded over explicit axes: specs, or a tree of them that
        begins like the results' tree.

    Returns:
      The results. Without explicit axes the function is called as it is.
    """
    types = [jax.typeof(x) for x in jax.tree.leaves(arguments)]
    meshes = [t.sharding.mesh for t in types if AxisType.Explicit in t.sharding.mesh.axis_types]
    if not meshes:
        return function(*arguments)
    mesh = meshes[0]
    names = zip(mesh.axis_names, mesh.axis_types, strict=True)
    out = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), out_specs, is_leaf=lambda x: isinstance(x, P)
    )
    inner = jax.sharding.auto_axes(
        function,
        axes=tuple(name for name, kind in names if kind == AxisType.Explicit),
        out_sharding=out,
    )
    # Compiled, because by itself an operation that makes an array would make it on one device.
    return jax.jit(inner)(*arguments)


def varying(tree: Any, *like: Any) -> Any:
    """Give arrays the type of varying over the axes of ``jax.shard_map`` that others vary over.

    Args:
      tree: arrays that a loop begins with.
      like: pytrees of arrays that the loop computes with.

    Returns:
      The same arrays. Outside of ``shard_map``, or where it does not check, nothing changes.
    """
    axes = frozenset().union(*map(_varies, jax.tree.leaves((tree, like))))

    def cast(x: Any) -> Any:
        missing = tuple(axes - _varies(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def _varies(x: Any) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
