"""Causal attention by the best implementation that a kind of devices has.

Three implementations compute the same thing:

- ``xla``: plain products and a softmax, on any device and in any precision; its scores take
  memory that grows with the square of the sequence.
- ``cudnn``: cuDNN's flash attention on NVIDIA GPUs, in half precision.
- ``tpu``: JAX's splash attention kernel on TPUs.

Shape suffixes: B batch, S sequence, N query heads, G key/value heads, H head width.
"""

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

from jaxmoo.dtypes import at_least_float32
from jaxmoo.errors import ConfigError, did_you_mean
from jaxmoo.kernels.folded import folded
from jaxmoo.mesh import TENSOR
from jaxmoo.platforms import default_platform

__all__ = ["IMPLEMENTATIONS", "attend", "choose_attention"]

IMPLEMENTATIONS = ("xla", "cudnn", "tpu")


def choose_attention(name: str, *, head_dim: int, dtype: Any, platform: str | None = None) -> str:
    """Choose the implementation that a model uses on one kind of devices.

    Args:
      name: one of :data:`IMPLEMENTATIONS`, or "auto" for the fastest that can run there.
      head_dim: width of one head.
      dtype: dtype of the computation.
      platform: the kind, from :func:`jaxmoo.platforms.platform_of`; by default that of JAX's
        devices.

    Returns:
      One of :data:`IMPLEMENTATIONS`.

    Raises:
      ConfigError: there is no such implementation, or it cannot run there.

    Example:
      >>> choose_attention("auto", head_dim=64, dtype=jnp.float32, platform="cpu")
      'xla'
    """
    known = ("auto", *IMPLEMENTATIONS)
    if name not in known:
        raise ConfigError(
            f"attention must be one of {', '.join(known)}, got {name!r}.{did_you_mean(name, known)}"
        )
    if name == "xla":
        return name
    checks = {"cudnn": _cudnn_obstacle, "tpu": _tpu_obstacle}
    on = default_platform() if platform is None else platform

    def obstacle(name: str) -> str | None:
        return checks[name](head_dim, jnp.dtype(dtype), on)

    if name == "auto":
        return next((name for name in checks if obstacle(name) is None), "xla")
    found = obstacle(name)
    if found is not None:
        raise ConfigError(
            f"attention {name!r} cannot run here: {found}. Set attention to 'auto' for the best "
            "that can, or to 'xla', which always can."
        )
    return name


def attend(
    q_BSNH: jax.Array,
    k_BSGH: jax.Array,
    v_BSGH: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    implementation: str = "xla",
    platform: str | None = None,
) -> jax.Array:
    """Causal self-attention; N / G consecutive query heads share a key/value head.

    Args:
      q_BSNH: queries.
      k_BSGH: keys.
      v_BSGH: values.
      segment_ids: int32 [B, S]; tokens attend only within their own segment.
      window: number of tokens that a token attends to, itself included; None for all before it.
      implementation: one of :data:`IMPLEMENTATIONS`.
      platform: see :func:`choose_attention`. The TPU's kernel is interpreted on other kinds.

    Returns:
      [B, S, N, H] in the dtype of the queries.

    Raises:
      ConfigError: cuDNN is chosen and cannot compute this.

    Example:
      >>> q, kv = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 5, 2, 8))
      >>> attend(q, kv, kv, window=3).shape
      (2, 5, 4, 8)
    """
    if implementation == "xla":
        return _xla(q_BSNH, k_BSGH, v_BSGH, segment_ids, window)
    if implementation == "cudnn":
        # JAX knows the kernel's derivative, which keeps what it needs, its vmap, and how to divide
        # it over heads; but of a mask not the vmap.
        attention = functools.partial(
            _cudnn if segment_ids is None else _fused_cudnn, window=window
        )
        return _over_heads(attention, k_BSGH.shape[2])(q_BSNH, k_BSGH, v_BSGH, segment_ids)
    if segment_ids is None:
        segment_ids = jnp.zeros(q_BSNH.shape[:2], jnp.int32)
    on = default_platform() if platform is None else platform
    attention = _fused_tpu(q_BSNH.shape[1], window, on != "tpu")
    return attention(q_BSNH, k_BSGH, v_BSGH, segment_ids)


# --- XLA --------------------------------------------------------------------------------------


def _xla(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, window: int | None
) -> jax.Array:
    positions = jnp.arange(q.shape[1])
    # Compilers take masks out of the loop over layers and keep them throughout. What is added to
    # the scores, and bound to one layer's queries until it is, is then kept as [B, 1, S, S] at
    # most; a mask to select by, for the scores of every language and head.
    q, positions, segment_ids = jax.lax.optimization_barrier((q, positions, segment_ids))
    mask = _mask(positions, segment_ids, window)
    lowest = -0.7 * jnp.finfo(jnp.float32).max
    bias = jnp.where(mask, 0, lowest).astype(at_least_float32(q.dtype))
    return jax.nn.dot_product_attention(q, k, v, bias=bias, implementation="xla")


def _mask(positions: jax.Array, segment_ids: jax.Array | None, window: int | None) -> jax.Array:
    """Which token [.., 1, S, 1] sees which [.., 1, 1, S]; bool [1 or B, 1, S, S]."""
    distance = positions[:, None] - positions[None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if segment_ids is None:
        return mask[None, None]
    return mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])


# --- Fused kernels ----------------------------------------------------------------------------


def _fused(
    kernel: Callable[..., jax.Array],
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> Callable[..., jax.Array]:
    """Make a kernel safe under vmap, where kernels know only one batch axis, and for gradients.

    ``kernel`` takes ``(*tables, q, k, v, segment_ids)``; ``wrap`` is applied to functions of these,
    and supplies the tables. The axis that vmap adds (languages) is folded into the batch, forward
    and backward. The backward pass keeps the kernel's inputs, and computes what else the kernel
    needs again.
    """

    def vjp(*args: Any) -> Any:
        *tables, q, k, v, segment_ids = args
        return jax.vjp(lambda *qkv: kernel(*tables, *qkv, segment_ids), q, k, v)

    def forward(*args: Any) -> jax.Array:
        # The same call as in `gradients`: where a layer is recomputed, the compiler merges them.
        return vjp(*args)[0]

    def gradients(*args: Any) -> Any:
        *primals, g = args
        return vjp(*primals)[1](g)

    whole, whole_forward, whole_gradients = (
        folded(wrap(function)) for function in (kernel, forward, gradients)
    )
    attention = jax.custom_vjp(whole)
    attention.defvjp(
        lambda *inputs: (whole_forward(*inputs), inputs),
        lambda inputs, g: (*whole_gradients(*inputs, g), None),
    )
    return attention


# --- cuDNN ------------------------------------------------------------------------------------


def _cudnn_obstacle(head_dim: int, dtype: np.dtype, platform: str) -> str | None:
    """Why cuDNN cannot run on a kind of devices; None if it can."""
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, and the devices are of the kind {platform!r}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, and the model's dtype is {dtype}"
    example = jax.ShapeDtypeStruct((1, 128, 1, head_dim), dtype)
    try:
        jax.eval_shape(lambda q: _cudnn(q, q, q, None, window=None), example)
    except ConfigError as error:
        return str(error)
    return None


def _over_heads(attention: Callable[..., jax.Array], num_heads: int) -> Callable[..., jax.Array]:
    """Let every device of a mesh's tensor axis compute its heads, within the engine.

    There the other axes are divided by hand, and JAX's own division of the kernel does not work.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = TENSOR in mesh.axis_names and TENSOR not in mesh.manual_axes
    if not mesh.manual_axes or not left or mesh.shape[TENSOR] == 1:
        return attention
    if num_heads % mesh.shape[TENSOR]:
        raise ConfigError(
            f"{num_heads} key/value heads cannot be divided over mesh.tensor={mesh.shape[TENSOR]} "
            "by cuDNN's attention. Set mesh.tensor to a divisor, or attention to 'xla'."
        )
    heads = P(None, None, TENSOR)
    return jax.shard_map(
        attention,
        in_specs=(heads, heads, heads, P()),
        out_specs=heads,
        axis_names={TENSOR},
        check_vma=False,
    )


def _fused_cudnn(*arrays: jax.Array, window: int | None) -> jax.Array:
    return _fused(functools.partial(_cudnn, window=window))(*arrays)


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, *, window: int | None
) -> jax.Array:
    mask = None
    if segment_ids is not None:
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    try:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    # What JAX raises where cuDNN is missing, or lacks the case.
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"cuDNN has no attention for {q.dtype} heads of width {q.shape[-1]} and rows of "
            f"{q.shape[1]} tokens{'' if mask is None else ', packed'}: {error}"
        ) from error


# --- TPU --------------------------------------------------------------------------------------

_LANES = 128  # width of a TPU's vector registers: sequences and heads are multiples of it


def _tpu_obstacle(head_dim: int, dtype: np.dtype, platform: str) -> str | None:
    """Why the TPU kernel cannot run on a kind of devices; None if it can."""
    if platform != "tpu":
        return f"it needs a TPU, and the devices are of the kind {platform!r}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"it computes in bfloat16 or float32, and the model's dtype is {dtype}"
    return None


@functools.cache
def _fused_tpu(length: int, window: int | None, interpret: bool) -> Callable[..., jax.Array]:
    # What the kernel skips stands in tables, the same for all heads: constants, also where they
    # are first needed in the midst of a trace. custom_partitioning wants them as arguments.
    with jax.ensure_compile_time_eval():
        tables, tree = jax.tree.flatten(_splash_kernel(length, window, interpret))

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        divided = _divided(function, len(tables))
        return lambda *args: divided(*tables, *args)

    def kernel(*args: Any) -> jax.Array:
        *tables, q, k, v, segment_ids = args
        return _splash(jax.tree.unflatten(tree, tables), q, k, v, segment_ids)

    return _fused(kernel, wrap)


def _splash_kernel(length: int, window: int | None, interpret: bool) -> Any:
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
        interpret=interpret,
    )


def _splash(
    kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array
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
    scaled = (q * width**-0.5).astype(q.dtype)
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
