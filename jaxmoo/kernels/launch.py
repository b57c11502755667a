"""A whole solve as one kernel, on GPUs and TPUs.

A solver is a loop of small steps on K x K matrices, until the data say that it is done. XLA makes
every step of it kernels of its own, some thirty a round; on a GPU the host also waits after every
round. The arithmetic is nothing: a few thousand operations. So a solver is traced, as it stands,
inside of one kernel, with a program for every problem. On a GPU the programs of one call run side
by side, on a TPU one after the other.

What kernels lack (factorisations, products of small matrices, single entries) is written a second
time in :mod:`~jaxmoo.kernels.linear`, in elementary operations, and chosen while a kernel is
traced. Elsewhere nothing changes, and the solvers as XLA compiles them are the kernels' oracle.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxmoo.kernels.folded import folded
from jaxmoo.kernels.linear import elementary, in_kernel
from jaxmoo.platforms import interpreted, like_gpu, like_tpu
from jaxmoo.sharding import divided_by_compiler

__all__ = ["in_one_launch", "solving_on"]

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def solving_on(platform: str | None) -> Iterator[None]:
    """Say for which devices solvers are traced.

    Args:
      platform: see :mod:`jaxmoo.platforms`. Of GPUs and TPUs it makes every solve that is traced
        one kernel; anything else leaves solvers to XLA.
    """
    token = _platform.set(platform)
    try:
        with jax.named_scope("solve"):
            yield
    finally:
        _platform.reset(token)


def in_one_launch(solver: Callable[..., Any]) -> Callable[..., Any]:
    """Make a solver of one block's problem a single kernel where kernels are asked for.

    Args:
      solver: a function of arrays of shape [K, K] (the first), [K] and [], of float32, bool or
        int32, or None, and of keyword arguments that are no arrays, to a pytree of such arrays. An
        objective that is all zero, False and -1 must change nothing for the others: K is filled up
        to a power of two.

    Returns:
      The same function. Mapped over blocks, by ``vmap``, all of them are one kernel.
    """

    @functools.wraps(solver)
    def call(*arrays: Any, **static: Any) -> Any:
        platform = _platform.get()
        if in_kernel():  # part of a larger kernel, which lacks constants without a type
            zero = jnp.zeros((), arrays[0].dtype)
            typed = (x + zero if isinstance(x, float) else x for x in arrays)
            return solver(*typed, **static)
        wanted = like_gpu(platform) or (like_tpu(platform) and not divided_by_compiler())
        if platform is None or not wanted or arrays[0].dtype != jnp.float32:
            return solver(*arrays, **static)
        k = arrays[0].shape[-1]
        fill = pl.next_power_of_2(k) - k

        def padded(x: jax.Array) -> jax.Array:
            nothing = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
            return lax.pad(x, jnp.asarray(nothing, x.dtype), [(0, fill, 0)] * x.ndim)[None]

        there = tuple(x is not None for x in arrays)
        settings = tuple(sorted(static.items()))
        found = _many(solver, settings, there, platform)(
            *(padded(jnp.asarray(x)) for x in arrays if x is not None)
        )
        return jax.tree.map(lambda x: x[(0, *(slice(k),) * (x.ndim - 1))], found)

    return call


@functools.cache
def _many(
    solver: Callable[..., Any],
    settings: tuple[tuple[str, Any], ...],
    there: tuple[bool, ...],
    platform: str,
) -> Any:
    """A function of [B, ...] arrays that solves B problems in one kernel."""

    def solve(*arrays: jax.Array) -> Any:
        each = iter(arrays)
        with elementary(platform):
            return solver(*(next(each) if one else None for one in there), **dict(settings))

    @folded
    def many(*arrays: jax.Array) -> Any:
        given = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in arrays]
        results, tree = jax.tree.flatten(jax.eval_shape(solve, *given))
        blocks = arrays[0].shape[0]

        def kernel(*refs: Any) -> None:
            found = solve(*map(_read, refs[: len(given)], given))
            for ref, x in zip(refs[len(given) :], jax.tree.leaves(found), strict=True):
                ref[0] = jnp.broadcast_to(x.astype(jnp.float32), ref.shape[1:])

        def specs(some: Sequence[jax.ShapeDtypeStruct]) -> list[pl.BlockSpec]:
            return [pl.BlockSpec((1, *_tile(x.shape)), lambda b: (b, 0, 0)) for x in some]

        found = pl.pallas_call(
            kernel,
            grid=(blocks,),
            in_specs=specs(given),
            out_specs=specs(results),
            out_shape=[
                jax.ShapeDtypeStruct((blocks, *_tile(x.shape)), jnp.float32) for x in results
            ],
            **_options(platform, arrays[0].shape[-1]),
        )(*(_numbers(x, platform).reshape(blocks, *_tile(x.shape[1:])) for x in arrays))
        shaped = [x.reshape(blocks, *like.shape) for x, like in zip(found, results, strict=True)]
        shaped = [
            x > 0 if like.dtype == bool else x for x, like in zip(shaped, results, strict=True)
        ]
        return jax.tree.unflatten(tree, shaped)

    return many


def _tile(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A matrix's, vector's or number's shape with two axes: a TPU takes the last two whole."""
    return (1,) * (2 - len(shape)) + shape


def _read(ref: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """One problem's matrix, vector or number."""
    x = ref[0] if like.ndim == 2 else ref[0, 0]
    if like.ndim == 0:
        x = jnp.max(x)  # registers of TPUs hold vectors only
    if like.dtype == x.dtype:
        return x
    return x > 0 if like.dtype == bool else x.astype(like.dtype)


def _numbers(x: jax.Array, platform: str) -> jax.Array:
    """Flags and integers as float32, except on GPUs, where that is a launch of its own."""
    return x if like_gpu(platform) else x.astype(jnp.float32)


def _options(platform: str, k: int) -> dict[str, Any]:
    """What each back end is told besides the kernel's body."""
    if interpreted(platform):
        return {"interpret": True}
    if like_tpu(platform):
        return {}
    warps = max(1, min(16, k * k // 256))  # eight numbers a thread
    return {"compiler_params": triton.CompilerParams(num_warps=warps, num_stages=1)}
