"""JAX's splash attention kernel, on TPUs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo.models.attention.fused import fused
from jaxmoo.models.attention.windows import Window, Windows, by_kind, with_kind

__all__ = ["attend", "obstacle"]

_LANES = 128  # width of a TPU's vector registers: sequences and heads are multiples of it


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    window: Window,
    scale: float | None = None,
    soft_cap: float | None = None,
    *,
    interpret: bool,
) -> jax.Array:
    """See :func:`jaxmoo.models.attention.attend`; interpreted, the kernel runs anywhere."""
    if segment_ids is None:
        segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
    sizes = window.sizes if isinstance(window, Windows) else (window,)
    if isinstance(window, Windows):
        segment_ids = with_kind(segment_ids, window.which, q)
    attention = _fused_splash(q.shape[1], sizes, scale, soft_cap, interpret)
    return attention(q, k, v, segment_ids)


def obstacle(head_dim: int, dtype: np.dtype, platform: str) -> str | None:
    """Why the TPU kernel cannot run on a kind of devices; None if it can."""
    if platform != "tpu":
        return f"it needs a TPU, and the devices are of the kind {platform!r}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"it computes in bfloat16 or float32, and the model's dtype is {dtype}"
    return None


@functools.cache
def _fused_splash(
    length: int,
    windows: tuple[int | None, ...],
    scale: float | None,
    soft_cap: float | None,
    interpret: bool,
) -> Callable[..., jax.Array]:
    # What the kernels skip stands in tables, the same for all heads: constants, also where they
    # are first needed in the midst of a trace. custom_partitioning wants them as arguments.
    with jax.ensure_compile_time_eval():
        tables, tree = jax.tree.flatten(
            [_splash_kernel(length, window, soft_cap, interpret) for window in windows]
        )

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        divided = _divided(function, len(tables))
        return lambda *args: divided(*tables, *args)

    def kernel(*args: Any) -> jax.Array:
        *tables, q, k, v, segment_ids = args
        kernels = [
            functools.partial(_splash, one, scale=scale) for one in jax.tree.unflatten(tree, tables)
        ]
        if len(kernels) == 1:
            return kernels[0](q, k, v, segment_ids)
        return by_kind(kernels, q, k, v, segment_ids)

    return fused(kernel, wrap)


def _splash_kernel(length: int, window: int | None, soft_cap: float | None, interpret: bool) -> Any:
    """JAX's kernel for rows of this many tokens, rounded up."""
    # Its import takes time, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length += -length % _LANES
    size = max(n for n in (4 * _LANES, 2 * _LANES, _LANES) if length % n == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": size for name in names}
    if window is None:
        mask = splash.CausalMask((length, length))
    else:
        mask = splash.LocalMask((length, length), window_size=(window - 1, 0), offset=0)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask]),
        block_sizes=splash.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )


def _splash(
    kernel: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    scale: float | None = None,
) -> jax.Array:
    """Call the kernel; it takes one row, heads first, and scores that are scaled already."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, length, _, width = q.shape
    pad = -length % _LANES

    def prepared(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, -width % _LANES))).swapaxes(1, 2)

    def row(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        return kernel(q, k, v, segment_ids=splash.SegmentIds(segment_ids, segment_ids))

    # Tokens that fill up a row come last, so that none of the others sees them.
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
    scaled = (q * (width**-0.5 if scale is None else scale)).astype(q.dtype)
    out = jax.vmap(row)(prepared(scaled), prepared(k), prepared(v), segment_ids)
    return out.swapaxes(1, 2)[:, :length, :, :width]


def _divided(function: Callable[..., Any], num_tables: int) -> Callable[..., Any]:
    """Let every device compute its rows of the batch; compilers cannot divide a kernel."""

    def partition(mesh: Any, arguments: Any, results: Any) -> Any:
        rows = NamedSharding(mesh, P(*arguments[num_tables].sharding.spec[:1]))
        tables = (NamedSharding(mesh, P()),) * num_tables
        placed = tables + (rows,) * (len(arguments) - num_tables)
        return mesh, function, jax.tree.map(lambda _: rows, results), placed

    def rule(mesh: Any, arguments: Any, results: Any) -> str:
        # One name for the axis of the batch, and one of its own for every other axis.
        names = (f"x{i}" for i in itertools.count())
        sides: tuple[list[str], list[str]] = ([], [])
        for side, types in zip(sides, (arguments, results), strict=True):
            for x in types:
                axes = [next(names) for _ in x.shape]
                if side is sides[1] or len(side) >= num_tables:
                    axes[0] = "b"
                side.append(" ".join(axes))
        return " -> ".join(map(", ".join, sides))

    divided = custom_partitioning(function)
    divided.def_partition(partition=partition, sharding_rule=rule)
    return divided
