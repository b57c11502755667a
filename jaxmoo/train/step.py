"""One optimiser step: per-language gradients, resolved per block, applied."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo.blocks import path_string
from jaxmoo.train.config import Config, OptimizerConfig
from jaxmoo.train.gradients import GradientSource

__all__ = [
    "TrainState",
    "abstract_state",
    "initial_state",
    "learning_rate",
    "make_optimizer",
    "make_train_step",
    "mean_cosines",
]


class TrainState(NamedTuple):
    """What a step reads and replaces, and a checkpoint holds."""

    step: jax.Array  # int32 []
    params: Any  # trainable parameters
    resolver: Any  # of the conflict resolution, with the last step's diagnostics
    opt_state: Any


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step: linear warm-up, then decay to 0.

    Step 0 is the first update; the warm-up reaches the peak at step ``warmup_steps``.

    Example:
      >>> rate = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=2), 4)
      >>> [round(float(rate(t)), 2) for t in range(5)]
      [0.33, 0.67, 1.0, 0.5, 0.0]
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(steps - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[config.decay]
    if not warmup:
        return after
    # The first update already moves: a rate of exactly 0 would waste it.
    rising = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Clipping and AdamW, for the resolved gradient."""
    settings = config.optimizer
    clip = settings.clip_norm
    return optax.chain(
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        optax.adamw(
            learning_rate(settings, config.train.steps),
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            mask=_decayed,
        ),
    )


def abstract_state(
    gradients: GradientSource,
    optimizer: optax.GradientTransformation,
    params: Any,
    device_mesh: Mesh,
) -> TrainState:
    """Shapes and shardings of a training state.

    Args:
      gradients: from :func:`jaxmoo.train.gradients.make_gradients`.
      optimizer: from :func:`make_optimizer`.
      params: trainable parameters, or their shapes; they have shardings.
      device_mesh: the devices.

    Returns:
      A state of `jax.ShapeDtypeStruct`. What the optimiser keeps per parameter lies where the
      parameter lies, everything else on all devices.
    """
    everywhere = NamedSharding(device_mesh, P())

    def placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def replicated(tree: Any) -> Any:
        return jax.tree.map(lambda x: placed(x, everywhere), tree)

    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        params=jax.tree.map(lambda x: placed(x, x.sharding), params),
        resolver=replicated(jax.eval_shape(gradients.init, params)),
        opt_state=optax.tree.map_params(
            optimizer,
            lambda x, p: placed(x, p.sharding),
            jax.eval_shape(optimizer.init, params),
            params,
            transform_non_params=replicated,
        ),
    )


def initial_state(
    gradients: GradientSource,
    optimizer: optax.GradientTransformation,
    params: Any,
    device_mesh: Mesh,
) -> TrainState:
    """Make the state before the first step, laid out as :func:`abstract_state` says."""
    where = jax.tree.map(
        lambda x: x.sharding, abstract_state(gradients, optimizer, params, device_mesh)
    )
    return TrainState(
        step=jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=where.step)(),
        params=params,
        resolver=jax.jit(gradients.init, out_shardings=where.resolver)(params),
        opt_state=jax.jit(optimizer.init, out_shardings=where.opt_state)(params),
    )


def _decayed(params: Any) -> Any:
    """Weight decay is for matrices, not for norms and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: re.search(r"(kernel|embedding)$", path_string(path)) is not None, params
    )


def make_train_step(
    gradients: GradientSource, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Make the training step; see :func:`compiled_step`.

    Args:
      gradients: from :func:`jaxmoo.train.gradients.make_gradients`.
      optimizer: from :func:`make_optimizer`.

    Returns:
      A function ``(state, frozen, batch) -> (state, metrics)``. Batch arrays are [K, B, ...].
      Metrics, for K languages and B blocks: ``loss`` [K], ``grad_norm`` [], ``conflict`` [B],
      ``update_norm`` [B], ``mean_norm`` [B], ``weights`` [B, K], ``cosine`` [K, K], ``skipped``
      [K].
    """

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        losses, updates, resolver = gradients.compute(state.params, frozen, batch, state.resolver)
        updates, opt_state = optimizer.update(updates, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        resolved = gradients.diagnostics(resolver)
        metrics = {
            "loss": losses,
            "grad_norm": jnp.sqrt((resolved.update_norm**2).sum()),
            "conflict": resolved.conflict,
            "update_norm": resolved.update_norm,
            "mean_norm": resolved.mean_norm,
            "weights": resolved.weights,
            "cosine": mean_cosines(resolved.gram),
            "gram": resolved.gram,
            "skipped": resolved.skipped,
        }
        return TrainState(state.step + 1, params, resolver, opt_state), metrics

    return step


def compiled_step(
    gradients: GradientSource,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    device_mesh: Mesh,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Make the training step, compiled when it is first called.

    Args:
      gradients: from :func:`jaxmoo.train.gradients.make_gradients`.
      optimizer: from :func:`make_optimizer`.
      state: where the state lies, or its shapes; it stays there.
      device_mesh: the devices.

    Returns:
      The function of :func:`make_train_step`. The state it is given is consumed; every process
      can read the metrics.
    """
    where = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        make_train_step(gradients, optimizer),
        donate_argnums=0,
        out_shardings=(where, NamedSharding(device_mesh, P())),
    )


def mean_cosines(grams: jax.Array) -> jax.Array:
    """Cosine between objectives' gradients [K, K], averaged over blocks.

    Args:
      grams: Gram matrices [B, K, K]. An objective absent from a block has cosine 0 there.

    Example:
      >>> mean_cosines(jnp.array([[[4.0, 2.0], [2.0, 4.0]]])).tolist()
      [[1.0, 0.5], [0.5, 1.0]]
    """
    norms = jnp.sqrt(jnp.diagonal(grams, axis1=1, axis2=2))
    scale = norms[:, :, None] * norms[:, None, :]
    return jnp.where(scale > 0, grams / jnp.where(scale > 0, scale, 1), 0).mean(0)
