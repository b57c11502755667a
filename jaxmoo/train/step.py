"""One optimiser step: per-language gradients, resolved per block, applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo.resolver_state import SketchedConflictsState
from jaxmoo.train.gradient_source import GradientSource

__all__ = [
    "TrainState",
    "abstract_state",
    "compiled_step",
    "initial_state",
    "language_conflict",
    "make_train_step",
    "mean_cosines",
]


class TrainState(NamedTuple):
    """What a step reads and replaces, and a checkpoint holds."""

    step: Any  # int32 []
    params: Any  # trainable parameters
    resolver: Any  # of the conflict resolution, with the last step's diagnostics
    opt_state: Any
    ema: Any = None  # float32 moving average of params, where one is kept

    @property
    def weights(self) -> Any:
        """The trainable parameters to evaluate and export: the average where one is kept."""
        if self.ema is None:
            return self.params
        return jax.tree.map(lambda p, average: average.astype(p.dtype), self.params, self.ema)


def abstract_state(
    gradients: GradientSource,
    optimizer: optax.GradientTransformation,
    params: Any,
    device_mesh: Mesh,
    *,
    ema: bool = False,
) -> TrainState:
    """Shapes and shardings of a training state.

    Args:
      gradients: from :func:`jaxmoo.train.gradient_source.make_gradients`.
      optimizer: from :func:`jaxmoo.train.optimizer.make_optimizer`.
      params: trainable parameters, or their shapes; they have shardings.
      device_mesh: the devices.
      ema: whether to keep a moving average of the parameters.

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
        opt_state=_like_parameters(jax.eval_shape(optimizer.init, params), params, everywhere),
        ema=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), params
        )
        if ema
        else None,
    )


def _like_parameters(state: Any, params: Any, everywhere: NamedSharding) -> Any:
    """Place what an optimiser keeps per parameter where that lies, everything else everywhere.

    An optimiser's state holds trees like the parameters', or parts of them where it treats groups
    differently: the path of such a leaf ends with its parameter's.
    """
    known = {path: p for path, p in jax.tree_util.tree_leaves_with_path(params)}

    def placed(path: tuple[Any, ...], x: Any) -> jax.ShapeDtypeStruct:
        ends = (path[i:] for i in range(len(path) + 1))
        parameter = next((known[end] for end in ends if end in known), None)
        # Factored moments have fewer axes than their parameter.
        sharding = everywhere
        if parameter is not None and parameter.shape == x.shape:
            sharding = parameter.sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(placed, state)


def initial_state(
    gradients: GradientSource,
    optimizer: optax.GradientTransformation,
    params: Any,
    device_mesh: Mesh,
    *,
    ema: bool = False,
) -> TrainState:
    """Make the state before the first step, laid out as :func:`abstract_state` says."""
    where = jax.tree.map(
        lambda x: x.sharding, abstract_state(gradients, optimizer, params, device_mesh, ema=ema)
    )
    return TrainState(
        step=jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=where.step)(),
        params=params,
        resolver=jax.jit(gradients.init, out_shardings=where.resolver)(params),
        opt_state=jax.jit(optimizer.init, out_shardings=where.opt_state)(params),
        # Arrays of their own: a step gives away those of its state.
        ema=jax.tree.map(lambda x: jnp.array(x, jnp.float32), params) if ema else None,
    )


def make_train_step(
    gradients: GradientSource,
    optimizer: optax.GradientTransformation,
    *,
    ema: float | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Make the training step; see :func:`compiled_step`.

    Args:
      gradients: from :func:`jaxmoo.train.gradient_source.make_gradients`.
      optimizer: from :func:`jaxmoo.train.optimizer.make_optimizer`.
      ema: decay of the moving average of the parameters that the state keeps, if any.

    Returns:
      A function ``(state, frozen, batch, rate=None) -> (state, metrics)``. Batch arrays are
      [K, B, ...]. A number `rate` multiplies the optimiser's updates: one compiled step serves
      several learning rates where the optimiser's own is 1.
      Metrics, for K languages and B blocks: ``loss`` [K], ``grad_norm`` [], ``conflict`` [B],
      ``update_norm`` [B], ``mean_norm`` [B], ``weights`` [B, K], ``cosine`` [K, K],
      ``language_norm`` [K], ``language_conflict`` [K], ``skipped`` [K]; ``loss_weights`` [K]
      where losses are weighed; ``gram_error`` [B] where Gram matrices are sketched.
    """

    def step(
        state: TrainState, frozen: Any, batch: Any, rate: Any = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        losses, updates, resolver = gradients.compute(state.params, frozen, batch, state.resolver)
        # Of the gradient itself: blocks' norms are means over microbatches and replicas.
        grad_norm = optax.tree.norm(optax.tree.cast(updates, jnp.float32))
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(updates, state.opt_state, state.params)
            if rate is not None:
                updates = optax.tree.scale(rate, updates)
            params = optax.apply_updates(state.params, updates)
        resolved = gradients.diagnostics(resolver)
        average = state.ema
        if ema is not None:
            average = optax.incremental_update(params, average, 1 - ema)
        metrics = {
            "loss": losses,
            "grad_norm": grad_norm,
            "conflict": resolved.conflict,
            "update_norm": resolved.update_norm,
            "mean_norm": resolved.mean_norm,
            "weights": resolved.weights,
            "cosine": mean_cosines(resolved.gram),
            "language_norm": jnp.sqrt(jnp.diagonal(resolved.gram, axis1=1, axis2=2).sum(0)),
            "language_conflict": language_conflict(resolved.gram),
            "gram": resolved.gram,
            "skipped": resolved.skipped,
        }
        if isinstance(resolved, SketchedConflictsState):
            metrics["gram_error"] = resolved.gram_error
        if gradients.loss_weights is not None:
            metrics["loss_weights"] = gradients.loss_weights(state.resolver)
        return TrainState(state.step + 1, params, resolver, opt_state, average), metrics

    return step


def compiled_step(
    gradients: GradientSource,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    device_mesh: Mesh,
    *,
    ema: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Make the training step, compiled when it is first called.

    Args:
      gradients: from :func:`jaxmoo.train.gradient_source.make_gradients`.
      optimizer: from :func:`jaxmoo.train.optimizer.make_optimizer`.
      state: where the state lies, or its shapes; it stays there.
      device_mesh: the devices.
      ema: see :func:`make_train_step`.
      options: see :func:`jaxmoo.runtime.compiled.compiler_options`.

    Returns:
      The function of :func:`make_train_step`. The state it is given is consumed; every process
      can read the metrics.
    """
    where = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        make_train_step(gradients, optimizer, ema=ema),
        donate_argnums=0,
        out_shardings=(where, NamedSharding(device_mesh, P())),
        compiler_options=dict(options) if options else None,
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


def language_conflict(grams: jax.Array) -> jax.Array:
    """Share of each objective's partners whose gradient opposes its own [K], over all blocks.

    Args:
      grams: Gram matrices [B, K, K]; an objective with a zero row is absent there.

    Example:
      >>> gram = jnp.array([[[1.0, -1.0, 1.0], [-1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]])
      >>> language_conflict(gram).tolist()
      [0.5, 0.5, 0.0]
    """
    present = jnp.diagonal(grams, axis1=1, axis2=2) > 0
    partners = jnp.where(present, present.sum(1, keepdims=True) - 1, 0).sum(0)
    return (grams < 0).sum((0, 2)) / jnp.maximum(partners, 1)
