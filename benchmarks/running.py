"""Run the trainer's compiled step on random weights and tokens, and time it."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoo.blocks import path_string
from jaxmoo.engine.cost import memory
from jaxmoo.train.planning import AbstractStep
from jaxmoo.train.step import TrainState


class Took(NamedTuple):
    """What a step took, in seconds."""

    wall: float
    cpu: float  # of all cores together: what other processes do at the same time hardly changes it


@dataclasses.dataclass(eq=False)
class Program:
    """A compiled step, and the state of its resolver from one run to the next.

    Attributes:
      step: what it was compiled from.
      compiled: the program.
      seconds: how long that took, tracing and what was compiled beside it included.
      resolver: the resolver's state; None before the first run.
    """

    step: AbstractStep
    compiled: Any
    seconds: float
    resolver: Any = None

    @property
    def peak(self) -> int:
        """Bytes on a device at the worst moment, by the compiler's account."""
        return memory(self.compiled)["peak"]

    def run(self, weights: Weights, batch: dict[str, Any]) -> tuple[Weights, jax.Array, Took]:
        """Run one step; the weights are consumed.

        Args:
          weights: what it begins with.
          batch: what the step is given.

        Returns:
          ``(weights, losses [K], what it took)``.
        """
        shapes, _, batch_shapes = self.step.arguments
        if self.resolver is None:
            self.resolver = self.step.gradients.init(weights.params)
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=weights.params,
            resolver=self.resolver,
            opt_state=weights.opt_state,
        )
        state, batch = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), (state, batch), (shapes, batch_shapes)
        )
        jax.block_until_ready((state, batch))
        begun = Took(time.perf_counter(), time.process_time())
        state, metrics = self.compiled(state, weights.frozen, batch)
        jax.block_until_ready((state, metrics))
        took = Took(time.perf_counter() - begun.wall, time.process_time() - begun.cpu)
        self.resolver = state.resolver
        weights = weights._replace(params=state.params, opt_state=state.opt_state)
        return weights, metrics["loss"], took


class Weights(NamedTuple):
    """What steps of all kinds share, and hand on to each other."""

    params: Any
    opt_state: Any
    frozen: Any


def compile_steps(steps: Sequence[AbstractStep]) -> list[Program]:
    """Compile steps side by side on the host's cores."""
    begun = time.perf_counter()
    lowered = [step.function.lower(*step.arguments) for step in steps]

    def finish(one: Any) -> tuple[Any, float]:
        return one.compile(), time.perf_counter() - begun

    with ThreadPoolExecutor() as pool:
        done = list(pool.map(finish, lowered))
    return [Program(step, *each) for step, each in zip(steps, done, strict=True)]


def random_weights(step: AbstractStep) -> Weights:
    """Draw random parameters, laid out as a step takes them, and an empty optimiser."""
    state, frozen, _ = step.arguments

    def draw(path: Any, x: Any) -> jax.Array:
        name = path_string(path)
        if name.endswith("scale"):
            return jnp.ones(x.shape, x.dtype)
        return jax.random.normal(jax.random.key(zlib.crc32(name.encode())), x.shape, x.dtype) * 0.02

    def make() -> tuple[Any, Any]:
        return jax.tree_util.tree_map_with_path(draw, (state.params, frozen))

    where = jax.tree.map(lambda x: x.sharding, (state.params, frozen))
    params, frozen = jax.jit(make, out_shardings=where)()
    return Weights(params, empty_optimizer(step), frozen)


def empty_optimizer(step: AbstractStep) -> Any:
    """AdamW's state before the first step: zeros."""
    state = step.arguments[0]
    where = jax.tree.map(lambda x: x.sharding, state.opt_state)

    def make() -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.opt_state)

    return jax.jit(make, out_shardings=where)()


def random_batch(step: AbstractStep, number: int) -> dict[str, Any]:
    """Draw tokens; where rows are packed, four texts of about the same length share one."""
    spec = step.arguments[2]
    shape = spec["tokens"].shape
    batch = batch_of(np.random.default_rng(number).integers(0, 100, shape, np.int32))
    if "segment_ids" in spec:
        place = np.arange(shape[-1])
        text = place * 4 // shape[-1]
        starts = np.flatnonzero(np.diff(text, prepend=-1))
        batch["segment_ids"] = np.broadcast_to(text + 1, shape).astype(np.int32)
        batch["positions"] = np.broadcast_to(place - starts[text], shape).astype(np.int32)
    return batch


def batch_of(tokens: np.ndarray) -> dict[str, Any]:
    """A batch in which every token but a row's first is a target."""
    return {"tokens": tokens, "loss_mask": np.ones(tokens.shape, bool)}


def device_peak() -> int | None:
    """Most bytes that a device has held so far in this process, where it can tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def choose_platform(name: str, devices: int = 1) -> None:
    """Compute on a platform, or fail; call before the first array is made.

    Args:
      name: cpu, gpu or tpu.
      devices: number of virtual devices where it is cpu.
    """
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(name, name))
    if name == "cpu":
        jax.config.update("jax_num_cpu_devices", devices)
