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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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

__all__ = ["IMPLEMENTATIONS", "Windows", "attend", "attend_where", "choose_attention"]

IMPLEMENTATIONS = ("xla", "cudnn", "tpu")


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


def choose_attention(
    name: str,
    *,
    head_dim: int,
    dtype: Any,
    platform: str | None = None,
    soft_cap: float | None = None,
) -> str:
    """Choose the implementation that a model uses on one kind of devices.

    Args:
      name: one of :data:`IMPLEMENTATIONS`, or "auto" for the fastest that can run there.
      head_dim: width of one head.
      dtype: dtype of the computation.
      platform: the kind, from :func:`jaxmoo.platforms.platform_of`; by default that of JAX's
        devices.
      soft_cap: see :func:`attend`.

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
        if name == "cudnn" and soft_cap is not None:
            return "it has no soft-capped scores (attn_logit_softcapping)"
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
    window: Window = None,
    scale: float | None = None,
    soft_cap: float | None = None,
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
      scale: what scores are multiplied by; None: 1 / sqrt(H).
      soft_cap: c: scores then become c tanh(score / c); None: they stay.
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
        return _xla(q_BSNH, k_BSGH, v_BSGH, segment_ids, window, scale, soft_cap)
    if implementation == "cudnn":
        if soft_cap is not None:
            raise ConfigError("cuDNN has no attention with soft-capped scores")
        if isinstance(window, Windows):
            kernels = [functools.partial(_cudnn, window=w, scale=scale) for w in window.sizes]
            attention = _fused(functools.partial(_by_kind, kernels))
            segment_ids = _with_kind(segment_ids, window.which, q_BSNH)
        else:
            # JAX knows the kernel's derivative, which keeps what it needs, its vmap, and how to
            # divide it over heads; but of a mask not the vmap.
            attention = functools.partial(
                _cudnn if segment_ids is None else _fused_cudnn, window=window, scale=scale
            )
        return _over_heads(attention, k_BSGH.shape[2])(q_BSNH, k_BSGH, v_BSGH, segment_ids)
    if segment_ids is None:
        segment_ids = jnp.zeros(q_BSNH.shape[:2], jnp.int32)
    on = default_platform() if platform is None else platform
    sizes = window.sizes if isinstance(window, Windows) else (window,)
    if isinstance(window, Windows):
        segment_ids = _with_kind(segment_ids, window.which, q_BSNH)
    attention = _fused_tpu(q_BSNH.shape[1], sizes, scale, soft_cap, on != "tpu")
    return attention(q_BSNH, k_BSGH, v_BSGH, segment_ids)


def attend_where(
    q_BSNH: jax.Array,
    k_BTGH: jax.Array,
    v_BTGH: jax.Array,
    mask_BST: jax.Array,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attention to tokens that a mask says, by plain products and a softmax.

    Args:
      q_BSNH: queries.
      k_BTGH: keys.
      v_BTGH: values.
      mask_BST: which token attends to which.
      scale: see :func:`attend`.
      soft_cap: see :func:`attend`.

    Returns:
      [B, S, N, H] in the dtype of the queries.

    Example:
      >>> q, kv = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 6, 2, 8))
      >>> attend_where(q, kv, kv, jnp.ones((2, 5, 6), bool)).shape
      (2, 5, 4, 8)
    """
    mask = mask_BST[:, None]
    if soft_cap is None:
        return jax.nn.dot_product_attention(
            q_BSNH, k_BTGH, v_BTGH, mask=mask, scale=scale, implementation="xla"
        )
    return _capped(q_BSNH, k_BTGH, v_BTGH, _bias(mask, q_BSNH.dtype), scale, soft_cap)


# --- XLA --------------------------------------------------------------------------------------


def _xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    window: Window,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    positions = jnp.arange(q.shape[1])
    # Compilers take masks out of the loop over layers and keep them throughout. What is added to
    # the scores, and bound to one layer's queries until it is, is then kept as [B, 1, S, S] at
    # most; a mask to select by, for the scores of every language and head.
    q, positions, segment_ids = jax.lax.optimization_barrier((q, positions, segment_ids))
    size = window.size if isinstance(window, Windows) else window
    bias = _bias(_mask(positions, segment_ids, size), q.dtype)
    if soft_cap is not None:
        return _capped(q, k, v, bias, scale, soft_cap)
    return jax.nn.dot_product_attention(q, k, v, bias=bias, scale=scale, implementation="xla")


def _bias(mask: jax.Array, dtype: Any) -> jax.Array:
    """What is added to scores, [.., 1, S, T]."""
    lowest = -0.7 * jnp.finfo(jnp.float32).max
    return jnp.where(mask, 0, lowest).astype(at_least_float32(dtype))


def _capped(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, scale: float | None, cap: float
) -> jax.Array:
    """Attention with scores that go towards a bound, which JAX's own function does not have."""
    rows, length, heads, width = q.shape
    grouped = q.reshape(rows, length, k.shape[2], -1, width)
    scores = jnp.einsum(
        "bsgrh,btgh->bgrst", grouped, k, preferred_element_type=at_least_float32(q.dtype)
    )
    scores = cap * jnp.tanh(scores * (width**-0.5 if scale is None else scale) / cap)
    weights = jax.nn.softmax(scores + bias[:, :, None], axis=-1).astype(v.dtype)
    return jnp.einsum("bgrst,btgh->bsgrh", weights, v).reshape(rows, length, heads, width)


def _mask(
    positions: jax.Array, segment_ids: jax.Array | None, window: int | jax.Array | None
) -> jax.Array:
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


def _with_kind(segment_ids: jax.Array | None, which: jax.Array, q: jax.Array) -> jax.Array:
    """Segments [B, S], or none [B, 0], and in a last column the number of the layer's kind.

    So every row of a batch says it, however batches are folded and divided.
    """
    number = jnp.broadcast_to(which, (q.shape[0], 1)).astype(jnp.int32)
    return number if segment_ids is None else jnp.concatenate([segment_ids, number], 1)


def _by_kind(
    kernels: Sequence[Callable[..., jax.Array]],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    with_kind: jax.Array,
) -> jax.Array:
    """The kernel of the layer's kind."""
    segment_ids = with_kind[:, :-1] if with_kind.shape[1] > 1 else None
    return jax.lax.switch(with_kind[0, -1], kernels, q, k, v, segment_ids)


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


def _fused_cudnn(*arrays: jax.Array, window: int | None, scale: float | None) -> jax.Array:
    return _fused(functools.partial(_cudnn, window=window, scale=scale))(*arrays)


def _cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    window: int | None,
    scale: float | None = None,
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
            scale=scale,
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
def _fused_tpu(
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
        return _by_kind(kernels, q, k, v, segment_ids)

    return _fused(kernel, wrap)


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
