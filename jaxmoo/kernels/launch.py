"""A whole solve as one kernel on a GPU.

A solver is a loop of small steps on K x K matrices, until the data say that it is done. XLA makes
every step of it kernels of its own, some thirty a round, and the host waits after every round. The
arithmetic is nothing: a few thousand operations. So on a GPU a solver is traced, as it stands,
inside of one kernel, with a program for every problem; programs of one call run side by side.

What kernels lack (factorisations, products of small matrices, single entries) is written a second
time in :mod:`~jaxmoo.kernels.linear`, in elementary operations, and chosen while a kernel is
traced. Elsewhere nothing changes, and the solvers as XLA compiles them are the kernels' oracle.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxmoo.kernels.linear import elementary, in_kernel

__all__ = ["in_one_launch", "solving_on"]

_PLATFORMS = ("gpu", "interpret")
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def solving_on(platform: str | None) -> Iterator[None]:
    """Say for which devices solvers are traced.

    Args:
      platform: "gpu" makes every solve that is traced one kernel, "interpret" does what that kernel
        does on any device; anything else leaves solvers to XLA.
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
        if platform not in _PLATFORMS or arrays[0].dtype != jnp.float32:
            return solver(*arrays, **static)
        k = arrays[0].shape[-1]
        fill = pl.next_power_of_2(k) - k

        def padded(x: jax.Array) -> jax.Array:
            nothing = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
            return lax.pad(x, jnp.asarray(nothing, x.dtype), [(0, fill, 0)] * x.ndim)[None]

        given = tuple(x is not None for x in arrays)
        settings = tuple(sorted(static.items()))
        found = _many(solver, settings, given, platform == "interpret")(
            *(padded(jnp.asarray(x)) for x in arrays if x is not None)
        )
        return jax.tree.map(lambda x: x[(0, *(slice(k),) * (x.ndim - 1))], found)

    return call


@functools.cache
def _many(
    solver: Callable[..., Any],
    settings: tuple[tuple[str, Any], ...],
    given: tuple[bool, ...],
    interpret: bool,
) -> Any:
    """A function of [B, ...] arrays that solves B problems in one kernel."""

    def solve(*arrays: jax.Array) -> Any:
        each = iter(arrays)
        with elementary():
            return solver(*(next(each) if there else None for there in given), **dict(settings))

    @custom_vmap
    def many(*arrays: jax.Array) -> Any:
        one = jax.eval_shape(solve, *(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in arrays))
        blocks, count = arrays[0].shape[0], len(arrays)

        def kernel(*refs: Any) -> None:
            found = jax.tree.leaves(solve(*(ref[0] for ref in refs[:count])))
            for ref, x in zip(refs[count:], found, strict=True):
                ref[0] = x.astype(jnp.float32)

        def spec(shape: tuple[int, ...]) -> pl.BlockSpec:
            return pl.BlockSpec((1, *shape), lambda b: (b, *(0,) * len(shape)))

        options: dict[str, Any] = {"interpret": True}
        if not interpret:
            k = arrays[0].shape[-1]
            warps = max(1, min(16, k * k // 256))  # eight numbers a thread
            options = {"compiler_params": triton.CompilerParams(num_warps=warps, num_stages=1)}
        found = pl.pallas_call(
            kernel,
            grid=(blocks,),
            in_specs=[spec(x.shape[1:]) for x in arrays],
            out_specs=jax.tree.map(lambda x: spec(x.shape), one),
            out_shape=jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((blocks, *x.shape), jnp.float32), one
            ),
            **options,
        )(*arrays)
        return jax.tree.map(lambda x, like: x > 0 if like.dtype == bool else x, found, one)

    @many.def_vmap
    def _(size: int, batched: Any, *arrays: jax.Array) -> Any:
        def fold(x: jax.Array, is_batched: bool) -> jax.Array:
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        found = many(*map(fold, arrays, batched))
        found = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), found)
        return found, jax.tree.map(lambda _: True, found)

    return many
