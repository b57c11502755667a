"""One optimiser step: per-language gradients, resolved per block, applied."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxmoo import aggregators, mesh
from jaxmoo.aggregators import track_gradients
from jaxmoo.blocks import path_string
from jaxmoo.gradients import stacked_value_and_grad
from jaxmoo.train.config import Config, OptimizerConfig
from jaxmoo.transform import ResolveConflictsState, resolve_conflicts

__all__ = ["TrainState", "learning_rate", "make_optimizer", "make_train_step", "mean_cosines"]


class TrainState(NamedTuple):
    """What a step reads and replaces, and a checkpoint holds."""

    step: jax.Array  # int32 []
    params: Any  # trainable parameters
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


def make_optimizer(config: Config, *, stacked: str) -> optax.GradientTransformationExtraArgs:
    """Conflict resolution, clipping and AdamW, in this order.

    Args:
      config: the run's settings.
      stacked: which parameters stack layers; see :func:`jaxmoo.blocks.partition`.
    """
    settings, resolution = config.optimizer, config.resolve
    seen = config.data.seen
    preference = resolution.preference
    resolver = resolve_conflicts(
        aggregators.get(resolution.aggregator, **resolution.options),
        resolution.blocks,
        stacked=stacked,
        num_objectives=len(seen),
        preference=None if preference is None else [preference.get(code, 1.0) for code in seen],
        match_norm=resolution.match_norm,
        seed=config.seed,
    )
    clip = settings.clip_norm
    return optax.chain(
        # MoCo resolves running estimates of the languages' gradients.
        track_gradients(len(seen)) if resolution.aggregator == "moco" else optax.identity(),
        resolver,
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


def _decayed(params: Any) -> Any:
    """Weight decay is for matrices, not for norms and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: re.search(r"(kernel|embedding)$", path_string(path)) is not None, params
    )


def make_train_step(
    loss_fn: Callable[[Any, Any, Any], jax.Array],
    optimizer: optax.GradientTransformationExtraArgs,
    device_mesh: Mesh,
    params: Any,
    *,
    stacked: str,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Make the compiled training step.

    Args:
      loss_fn: ``loss_fn(trainable, frozen, batch of one language) -> scalar``.
      optimizer: from :func:`make_optimizer`.
      device_mesh: from :func:`jaxmoo.mesh.make_mesh`.
      params: the trainable parameters, or their shapes.
      stacked: which parameters stack layers.

    Returns:
      A function ``(state, frozen, batch) -> (state, metrics)``. The state is donated. Batch
      arrays are [K, B, ...]. Metrics, for K languages and B blocks: ``loss`` [K], ``active`` [K],
      ``grad_norm`` [], ``conflict`` [B], ``update_norm`` [B], ``mean_norm`` [B], ``weights``
      [B, K], ``cosine`` [K, K].
    """
    per_language = mesh.objective_shardings(device_mesh, params, stacked=stacked)
    per_parameter = mesh.parameter_shardings(device_mesh, params, stacked=stacked)

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        value_and_grad = stacked_value_and_grad(lambda p, one: loss_fn(p, frozen, one))
        losses, gradients = value_and_grad(state.params, batch)
        gradients = jax.lax.with_sharding_constraint(gradients, per_language)
        active = jnp.isfinite(losses) & batch["loss_mask"][..., 1:].any((1, 2))
        updates, opt_state = optimizer.update(
            gradients, state.opt_state, state.params, active=active
        )
        updates = jax.lax.with_sharding_constraint(updates, per_parameter)
        params = optax.apply_updates(state.params, updates)
        (resolved,) = (link for link in opt_state if isinstance(link, ResolveConflictsState))
        metrics = {
            "loss": losses,
            "active": active,
            "grad_norm": jnp.sqrt((resolved.update_norm**2).sum()),
            "conflict": resolved.conflict,
            "update_norm": resolved.update_norm,
            "mean_norm": resolved.mean_norm,
            "weights": resolved.weights,
            "cosine": mean_cosines(resolved.gram),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0)


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
