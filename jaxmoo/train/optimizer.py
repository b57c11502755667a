"""The optimiser that a run applies to the resolved gradient, and its schedule."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from jaxmoo.blocks import path_string
from jaxmoo.config import Config, OptimizerConfig

__all__ = ["learning_rate", "make_optimizer"]


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
    kept = max(config.falls_from(steps) - warmup, 0)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
        "wsd": optax.linear_schedule(peak, 0.0, max(rest - kept, 1), kept),
    }[config.decay]
    if not warmup:
        return after
    # The first update already moves: a rate of exactly 0 would waste it.
    rising = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Clipping and the chosen optimiser, for the resolved gradient.

    The optimiser computes in float32 whatever the parameters' dtype is: in bfloat16, an average
    with a decay of 0.999 would never move. Parameters that are no matrices have no weight decay,
    and Muon leaves them, and embeddings, to AdamW.

    Args:
      config: the run's settings; reads ``optimizer`` and the number of steps.

    Returns:
      A chain for gradients without an objective axis. Its updates are float32.
    """
    settings = config.optimizer
    rate = learning_rate(settings, config.train.steps)
    clip = settings.clip_norm
    return optax.chain(
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        _in_float32(_OPTIMIZERS[settings.name](settings, rate)),
    )


def _adamw(settings: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        rate,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        mu_dtype=settings.moment_dtype,
        weight_decay=settings.weight_decay,
        mask=_matrices,
    )


def _adafactor(settings: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    # Without the updates' scaling by the size of the parameters, the learning rate means what it
    # means for AdamW; and `optax.adafactor`'s own decay would not be scaled by it.
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(settings.weight_decay, _matrices),
        optax.scale_by_learning_rate(rate),
    )


def _muon(settings: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    # optax's own decay takes no mask for the parameters that AdamW updates; so it comes behind, on
    # updates that already point downwards.
    return optax.chain(
        muon(
            1.0,
            beta=settings.b1,
            mu_dtype=settings.moment_dtype,
            adam_b1=settings.b1,
            adam_b2=settings.b2,
            muon_weight_dimension_numbers=_products,
            # Updates of the size of AdamW's, so that its learning rates can be kept.
            consistent_rms=0.2,
        ),
        optax.add_decayed_weights(-settings.weight_decay, _matrices),
        optax.scale_by_schedule(rate),
    )


def _sgd(settings: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        optax.trace(settings.b1, accumulator_dtype=settings.moment_dtype),
        optax.add_decayed_weights(settings.weight_decay, _matrices),
        optax.scale_by_learning_rate(rate),
    )


_OPTIMIZERS = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon, "sgd": _sgd}


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Let a transformation see parameters and gradients in float32."""
    inner = optax.with_extra_args_support(inner)

    def float32(tree: Any) -> Any:
        return optax.tree.cast(tree, jnp.float32)

    def init(params: Any) -> Any:
        return inner.init(float32(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        params = None if params is None else float32(params)
        return inner.update(float32(updates), state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _ends(params: Any, pattern: str) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: re.search(rf"({pattern})$", path_string(path)) is not None, params
    )


def _matrices(params: Any) -> Any:
    """Which parameters have weight decay: matrices, not norms and biases."""
    return _ends(params, "kernel|embedding")


def _products(params: Any) -> Any:
    """Which axes Muon orthogonalises: those of kernels [..., in, out]; None where it does not."""
    axes = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map(lambda kernel: axes if kernel else None, _ends(params, "kernel"))
