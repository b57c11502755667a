"""Matrices in 4 or 8 bits per weight: quantised on the host, multiplied with on devices.

- ``nf4``: 64 neighbouring weights of a column, which read the same 64 inputs, share a scale, the
  largest of their absolute values in float32; each weight is one of 16 multiples of it, which are
  the quantiles of a normal distribution. 4.5 bits per weight. Dettmers et al., *QLoRA: Efficient
  Finetuning of Quantized LLMs*, `arXiv:2305.14314 <https://arxiv.org/abs/2305.14314>`_, without the
  second quantisation, that of the scales.
- ``int8``: a column shares a scale, and weights are integers from -127 to 127 of it. Dettmers et
  al., *LLM.int8()*, `arXiv:2208.07339 <https://arxiv.org/abs/2208.07339>`_, without the outliers.

Quantising takes only operations that are exact or correctly rounded, so that all machines have the
same codes of the same weights.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoo.errors import ConfigError
from jaxmoo.kernels.product import product
from jaxmoo.platforms import like_tpu

__all__ = [
    "BLOCK",
    "KINDS",
    "NF4",
    "dequantize",
    "matrix_shape",
    "quantize",
    "quantized_product",
    "quantized_spec",
]

KINDS = ("int8", "nf4")
BLOCK = 64  # weights that share a scale in nf4

# Appendix E of the paper on QLoRA.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_BETWEEN = (NF4[1:] + NF4[:-1]) / 2
_LARGEST = 127
_STRIP = 256  # columns that are quantised at a time


def quantized_spec(
    shape: tuple[int, ...], kind: str
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what `quantize` makes of a matrix, or of a stack of them.

    Args:
      shape: [..., in, out].
      kind: one of :data:`KINDS`.

    Returns:
      Codes [..., blocks, rows, out], uint8 that each hold two weights, or int8, and scales
      [..., blocks, out], float32.

    Raises:
      ConfigError: there is no such kind, or ``in`` is no multiple of the block's size.

    Example:
      >>> codes, scales = quantized_spec((128, 8), "nf4")
      >>> codes.shape, scales.shape
      ((2, 32, 8), (2, 8))
    """
    *stack, size_in, size_out = shape
    if kind not in KINDS:
        raise ConfigError(f"matrices are quantised as {' or '.join(KINDS)}, found {kind!r}.")
    if kind == "int8":
        blocks, rows, dtype = 1, size_in, jnp.int8
    else:
        if size_in % BLOCK:
            raise ConfigError(
                f"nf4 holds {BLOCK} neighbouring inputs of a matrix in one block, and {size_in} is "
                f"no multiple of {BLOCK}. Use int8."
            )
        blocks, rows, dtype = size_in // BLOCK, BLOCK // 2, jnp.uint8
    return (
        jax.ShapeDtypeStruct((*stack, blocks, rows, size_out), dtype),
        jax.ShapeDtypeStruct((*stack, blocks, size_out), jnp.float32),
    )


def matrix_shape(codes: Any) -> tuple[int, ...]:
    """Shape of the matrix, or the stack of them, that codes stand for.

    Args:
      codes: anything with a shape and dtype; see :func:`quantized_spec`.

    Example:
      >>> matrix_shape(quantized_spec((128, 8), "nf4")[0])
      (128, 8)
    """
    *stack, blocks, rows, size_out = codes.shape
    return (*stack, blocks * rows * (2 if codes.dtype == jnp.uint8 else 1), size_out)


def quantize(kernel: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a matrix, on the cores of the host.

    Args:
      kernel: [in, out] of any floating type; fastest as the transpose of an array [out, in].
      kind: one of :data:`KINDS`.

    Returns:
      Codes and scales; see :func:`quantized_spec`. Numbers that are not finite make scales that
      are not.

    Raises:
      ConfigError: as :func:`quantized_spec`.

    Example:
      >>> codes, scales = quantize(np.linspace(-2, 1, 64)[:, None], "nf4")
      >>> scales.item(), dequantize(codes, scales).min().tolist()
      (2.0, -2.0)
    """
    codes, scales = (np.empty(x.shape, x.dtype) for x in quantized_spec(kernel.shape, kind))
    one = _to_int8 if kind == "int8" else _to_nf4

    def strip(start: int) -> None:
        columns = slice(start, start + _STRIP)
        with np.errstate(invalid="ignore"):
            found = one(kernel[:, columns].astype(np.float32))
        codes[..., columns], scales[..., columns] = found

    starts = range(0, kernel.shape[1], _STRIP)
    with ThreadPoolExecutor() as pool:
        list(pool.map(strip, starts))
    return codes, scales


def _to_int8(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = np.abs(kernel).max(0) * np.float32(1 / _LARGEST)
    codes = np.rint(kernel / np.where(scales > 0, scales, 1))
    return codes.astype(np.int8)[None], scales[None]


def _to_nf4(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    blocks = kernel.reshape(-1, BLOCK, kernel.shape[1])
    scales = np.abs(blocks).max(1)
    codes = np.zeros_like(blocks, np.uint8)
    for between in _BETWEEN:
        codes += blocks > between * scales[:, None]
    half = BLOCK // 2
    return codes[:, :half] | codes[:, half:] << 4, scales


def dequantize(codes: Any, scales: Any, platform: str = "cpu") -> jax.Array:
    """Return the matrix that codes and scales stand for, in float32.

    Args:
      codes: [..., blocks, rows, out]; see :func:`quantized_spec`.
      scales: [..., blocks, out].
      platform: the kind of devices, which decides how, not what.

    Returns:
      [..., in, out].
    """
    codes = jnp.asarray(codes)
    if codes.dtype == jnp.uint8:
        values = _normal_floats(jnp.concatenate([codes & 15, codes >> 4], -2), platform)
    else:
        values = codes.astype(jnp.float32)
    blocks = values * jnp.asarray(scales)[..., None, :]
    *stack, count, rows, size_out = blocks.shape
    return blocks.reshape(*stack, count * rows, size_out)


def _normal_floats(codes: jax.Array, platform: str) -> jax.Array:
    """Look numbers from 0 to 15 up."""
    if not like_tpu(platform):
        # Of scalars: an array would be closed over, and taken for something to be differentiated.
        table = jnp.concatenate([jnp.full(1, level) for level in NF4])
        return table.at[codes].get(mode="promise_in_bounds")
    # Where lookups are slow, every bit halves the table.
    values: list[Any] = list(NF4)
    for bit in range(4):
        high = (codes >> bit & 1).astype(bool)
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(high, second, first) for first, second in pairs]
    return values[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def quantized_product(
    x: jax.Array, codes: jax.Array, scales: jax.Array, platform: str, of: jax.Array | None = None
) -> jax.Array:
    """Multiply the last axis of activations by a quantised matrix, which gets no gradient.

    The matrix exists only during the product, forward and again backward, whatever is kept of the
    call that it is part of.

    Args:
      x: [..., in]; of a stack of matrices, rows in bins, [N, R, in].
      codes: [blocks, rows, out], or a stack of them; see :func:`quantized_spec`.
      scales: [blocks, out], or a stack of them.
      platform: the kind of devices; see :func:`jaxmoo.kernels.product.product`.
      of: int [N], the matrix of the stack that each bin is for; None: there is one matrix.

    Returns:
      [..., out], as `product` makes it of the matrix in the dtype of ``x``.
    """
    return _times(x, codes, scales, platform, of)


def _times(x: jax.Array, codes: jax.Array, scales: jax.Array, platform: str, of: Any) -> jax.Array:
    if of is None:
        return product(x, dequantize(codes, scales, platform).astype(x.dtype), platform)
    kernels = dequantize(codes[of], scales[of], platform).astype(x.dtype)
    return jnp.einsum("nri,nio->nro", x, kernels)


def _forward(x: jax.Array, codes: jax.Array, scales: jax.Array, platform: str, of: Any) -> Any:
    return _times(x, codes, scales, platform, of), (codes, scales, of)


def _backward(platform: str, quantized: Any, ct: jax.Array) -> tuple[Any, ...]:
    codes, scales, of = quantized
    x = jnp.zeros((*ct.shape[:-1], matrix_shape(codes)[-2]), ct.dtype)  # the product is linear
    _, times = jax.vjp(lambda x: _times(x, codes, scales, platform, of), x)
    return *times(ct), None, None, None


quantized_product.defvjp(_forward, _backward)
