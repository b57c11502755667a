"""From a config to the function that gives losses and the resolved gradient."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxmoo import aggregators, blocks, mesh, weighting
from jaxmoo.aggregators import track_gradients
from jaxmoo.blocks import Blocks, Partition, path_string
from jaxmoo.config import Config, ResolveConfig, SamplingConfig
from jaxmoo.engine import ResolvedGradients, resolved_value_and_grad
from jaxmoo.errors import ConfigError
from jaxmoo.models import Decoder, language_loss, summed_loss, target_mask
from jaxmoo.models.paths import STACKED
from jaxmoo.runs.trained_parameters import router_coef
from jaxmoo.stacked import stacked_value_and_grad
from jaxmoo.transform import resolve_conflicts
from jaxmoo.weighting import Weighting, initial_weights

__all__ = [
    "GradientSource",
    "SampledState",
    "block_rule",
    "engine_source",
    "make_gradients",
    "ordinary",
    "ordinary_gradients",
    "sampled",
    "token_mean",
    "weighted",
]

_TABLES = r"(^|\.)embedding$"


class GradientSource(NamedTuple):
    """How a step comes by its gradient.

    Attributes:
      init: ``params -> state``.
      compute: ``(params, frozen, batch, state) -> (losses [K], resolved gradient, state)``.
      diagnostics: the resolver's part of the state, a
        :class:`~jaxmoo.ResolveConflictsState` with the arrays of all K languages.
      partition: the blocks.
      engine: the in-backward engine, where it is used.
      loss_weights: ``state -> [K]``, what the next step multiplies the languages' losses by, where
        they are weighed.
    """

    init: Callable[[Any], Any]
    compute: Callable[[Any, Any, Any, Any], tuple[jax.Array, Any, Any]]
    diagnostics: Callable[[Any], Any]
    partition: Partition
    engine: ResolvedGradients | None
    loss_weights: Callable[[Any], jax.Array] | None = None


def block_rule(config: Config, params: Any, device_mesh: Mesh) -> str | Blocks:
    """Return the blocks of a run.

    The vocabulary's tables are cut into slices where blocks follow the model's structure, by
    default the fewest that are no larger than a layer.

    Args:
      config: the run's settings.
      params: the trainable parameters, or their shapes.
      device_mesh: the devices, as many as ``shard`` blocks are cut into.

    Raises:
      ConfigError: the slices asked for do not divide the vocabulary.
    """
    kind = config.resolve.blocks
    shard = kind == "shard"
    if shard:
        kind = f"shard:{device_mesh.shape[mesh.LANGUAGE] * device_mesh.shape[mesh.FSDP]}"
    leaves = [
        (path_string(path), x.shape) for path, x in jax.tree_util.tree_leaves_with_path(params)
    ]
    tables = [shape for path, shape in leaves if re.search(_TABLES, path)]
    if not tables or not (shard or kind in ("layer", "module", "expert", "leaf")):
        return kind
    slices = config.resolve.vocabulary_slices
    if slices is None:
        layers = [math.prod(shape[1:]) for path, shape in leaves if re.search(STACKED, path)]
        most = sum(layers) or max(map(math.prod, tables))
        rows, size = max(tables)
        slices = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n * size <= most)
    if slices == 1:
        return kind
    only = len(tables) == len(leaves)
    return blocks.choose({_TABLES: f"slices:{slices}"} | ({} if only else {".*": kind}))


def make_gradients(
    config: Config,
    merge: Callable[[Any, Any], Decoder],
    params: Any,
    frozen: Any,
    device_mesh: Mesh,
) -> GradientSource:
    """Make the source of gradients that the settings ask for.

    Args:
      config: the run's settings.
      merge: ``(params, frozen) -> Decoder``.
      params: the trainable parameters, or their shapes.
      frozen: the others, or their shapes.
      device_mesh: from :func:`jaxmoo.mesh.make_mesh`.

    Raises:
      ConfigError: settings that contradict each other or the model.
    """
    resolution, seen = config.resolve, config.data.seen
    preference = resolution.preference
    common: dict[str, Any] = {
        "aggregator": aggregators.get(resolution.aggregator, **resolution.options),
        "blocks": block_rule(config, params, device_mesh),
        "stacked": STACKED,
        "num_objectives": config.data.step_languages,
        "preference": None if preference is None else [preference.get(c, 1.0) for c in seen],
        "match_norm": resolution.match_norm,
        "gram": resolution.gram,
        "seed": config.seed,
    }
    if resolution.engine == "stacked":
        source = _stacked(config, merge, params, device_mesh, common)
    else:
        source = _backward(config, merge, params, frozen, device_mesh, common)
    if resolution.weighting is not None:
        method = weighting.get(resolution.weighting, **resolution.weighting_options)
        source = weighted(source, method, len(seen))
    if resolution.token_mean:
        source = token_mean(source)
    return sampled(source, len(seen)) if config.data.samples else source


def ordinary(config: Config) -> Config:
    """Return the settings of ordinary fine-tuning on the tokens of a run's step, as one batch.

    For :func:`ordinary_gradients`, with whose step that of the run is compared. All devices of a
    replica share its parameters, as without groups of languages.

    Args:
      config: the run's settings.
    """
    data = config.data
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            data,
            seen=data.seen[:1],
            unseen=[],
            languages_per_step=None,
            sampling=SamplingConfig(),
            batch_size=data.batch_size * data.step_languages,
        ),
        resolve=ResolveConfig(aggregator="mean"),
        mesh=dataclasses.replace(config.mesh, language=None, fsdp=None),
    )


def ordinary_gradients(*arguments: Any) -> GradientSource:
    """Make the source of the gradient of ordinary fine-tuning, sharded as the engine shards it.

    Args:
      *arguments: those of :func:`make_gradients`, with the settings of :func:`ordinary`.
    """
    engine = make_gradients(*arguments).engine
    assert engine is not None
    return engine_source(
        dataclasses.replace(engine, rules=dataclasses.replace(engine.rules, groups=None))
    )


def _backward(
    config: Config,
    merge: Callable[[Any, Any], Decoder],
    params: Any,
    frozen: Any,
    device_mesh: Mesh,
    common: dict[str, Any],
) -> GradientSource:
    model, resolution = config.model, config.resolve

    def summed(params: Any, frozen: Any, batch: Any) -> jax.Array:
        decoder = merge(params, frozen)
        coef = router_coef(config, decoder.config)
        return summed_loss(decoder, batch, router_coef=coef, scale_B=batch.get(SCALE))

    engine = resolved_value_and_grad(
        summed,
        params,
        frozen=frozen,
        weight_fn=lambda batch: target_mask(batch).sum(),
        mesh=device_mesh,
        replicas=resolution.replicas,
        keep=cast(Any, resolution.keep),
        microbatches=config.train.microbatches,
        accumulation=config.train.accumulation,
        dtype=None if model.dtype == model.param_dtype else model.dtype,
        **common,
    )
    return engine_source(engine)


def engine_source(engine: ResolvedGradients) -> GradientSource:
    """Make the source of gradients that an engine is."""
    return GradientSource(
        init=lambda params: engine.init(),
        compute=lambda params, frozen, batch, state: engine(params, batch, state, frozen),
        diagnostics=lambda state: state,
        partition=engine.partition,
        engine=engine,
    )


SCALE = "loss_scale"


def token_mean(source: GradientSource) -> GradientSource:
    """Weigh every language's loss by its share of the step's target tokens.

    A language's loss is the mean over its own tokens; times K n_k / n, for n_k of the n tokens of
    the K languages that have any, the mean over languages is the mean over all tokens. The losses
    returned stay those of the languages.
    """

    def compute(params: Any, frozen: Any, batch: Any, state: Any) -> tuple[jax.Array, Any, Any]:
        count = jax.vmap(target_mask)(batch).sum((1, 2)).astype(jnp.float32)
        scale = count * ((count > 0).sum() / jnp.maximum(count.sum(), 1))
        batch = batch | {SCALE: jnp.broadcast_to(scale[:, None], batch["tokens"].shape[:2])}
        losses, updates, state = source.compute(params, frozen, batch, state)
        return losses / jnp.where(scale > 0, scale, 1), updates, state

    return source._replace(compute=compute)


class WeightedState(NamedTuple):
    """State of :func:`weighted`; K languages."""

    resolver: Any
    weighting: Any
    weights: jax.Array  # float32 [K], of the next step


def weighted(source: GradientSource, method: Weighting, num_languages: int) -> GradientSource:
    """Multiply every language's loss by a weight that follows from the losses of earlier steps.

    The weights of a step are known before it, so gradients are those of weighted losses at no
    further pass. A language that has no target in a step, or whose loss is not finite,
    keeps its weight. The losses returned stay those of the languages.

    Args:
      source: for all languages.
      method: gives the weights.
      num_languages: K.
    """

    def init(params: Any) -> WeightedState:
        first = initial_weights(method, num_languages)
        return WeightedState(source.init(params), method.init(num_languages), first)

    def compute(
        params: Any, frozen: Any, batch: Any, state: WeightedState
    ) -> tuple[jax.Array, Any, WeightedState]:
        weights = jax.lax.stop_gradient(state.weights)
        rows = batch["tokens"].shape[:2]
        scale = jnp.broadcast_to(weights[:, None], rows) * batch.get(SCALE, 1.0)
        losses, updates, resolver = source.compute(
            params, frozen, batch | {SCALE: scale}, state.resolver
        )
        total = scale[:, 0]  # a weight times a share of the tokens, which may be 0
        own = losses / jnp.where(total > 0, total, 1)
        present = jax.vmap(target_mask)(batch).any((1, 2)) & jnp.isfinite(own)
        new, kept = method.update(own, state.weighting, present)
        return (
            losses / jnp.where(weights > 0, weights, 1),
            updates,
            WeightedState(resolver, kept, jnp.where(present, new, weights)),
        )

    return source._replace(
        init=init,
        compute=compute,
        diagnostics=lambda state: source.diagnostics(state.resolver),
        loss_weights=lambda state: state.weights,
    )


class SampledState(NamedTuple):
    """State of :func:`sampled`; B blocks, K languages."""

    resolver: Any  # of the languages of a step, in the order of its batch
    gram: jax.Array  # float32 [B, K, K], of the last step; zero for languages that had no part
    weights: jax.Array  # float32 [B, K], likewise
    skipped: jax.Array  # int32 [K]


def sampled(source: GradientSource, num_languages: int) -> GradientSource:
    """Make a source for steps of k languages one for all K.

    Batches carry the number of each row's language, ``language`` [k, B]. What the resolver says of
    the k languages of a step is put into arrays over all K; the losses of the others are 0.

    Args:
      source: for k languages, keeping nothing for each of them from step to step.
      num_languages: K.
    """

    def init(params: Any) -> SampledState:
        blocks = len(source.partition)
        return SampledState(
            resolver=source.init(params),
            gram=jnp.zeros((blocks, num_languages, num_languages), jnp.float32),
            weights=jnp.zeros((blocks, num_languages), jnp.float32),
            skipped=jnp.zeros(num_languages, jnp.int32),
        )

    def compute(
        params: Any, frozen: Any, batch: Any, state: SampledState
    ) -> tuple[jax.Array, Any, SampledState]:
        here = batch["language"][:, 0]
        batch = {name: x for name, x in batch.items() if name != "language"}
        before = source.diagnostics(state.resolver).skipped
        losses, updates, resolver = source.compute(params, frozen, batch, state.resolver)
        found = source.diagnostics(resolver)
        blank = jax.tree.map(jnp.zeros_like, state._replace(resolver=None))
        return (
            jnp.zeros(num_languages, losses.dtype).at[here].set(losses),
            updates,
            SampledState(
                resolver=resolver,
                gram=blank.gram.at[:, here[:, None], here[None, :]].set(found.gram),
                weights=blank.weights.at[:, here].set(found.weights),
                skipped=state.skipped.at[here].add(found.skipped - before),
            ),
        )

    def diagnostics(state: SampledState) -> Any:
        return source.diagnostics(state.resolver)._replace(
            gram=state.gram, weights=state.weights, skipped=state.skipped
        )

    return source._replace(init=init, compute=compute, diagnostics=diagnostics)


def _stacked(
    config: Config,
    merge: Callable[[Any, Any], Decoder],
    params: Any,
    device_mesh: Mesh,
    common: dict[str, Any],
) -> GradientSource:
    if common["num_objectives"] % device_mesh.shape[mesh.LANGUAGE]:
        raise ConfigError(
            f"resolve.engine=stacked: mesh.language ({device_mesh.shape[mesh.LANGUAGE]}) must "
            f"divide the number of languages ({common['num_objectives']})."
        )
    # MoCo resolves running estimates of the languages' gradients.
    track = config.resolve.aggregator == "moco"
    resolver = optax.chain(
        track_gradients(common["num_objectives"]) if track else optax.identity(),
        resolve_conflicts(**common, mesh=device_mesh),
    )
    per_language = mesh.objective_shardings(device_mesh, params, stacked=STACKED)
    per_parameter = mesh.parameter_shardings(device_mesh, params, stacked=STACKED)

    def compute(params: Any, frozen: Any, batch: Any, state: Any) -> tuple[jax.Array, Any, Any]:
        def loss(params: Any, one: Any) -> jax.Array:
            decoder = merge(params, frozen)
            coef = router_coef(config, decoder.config)
            scale = one[SCALE][0] if SCALE in one else 1.0
            return language_loss(decoder, one, router_coef=coef) * scale

        value_and_grad = stacked_value_and_grad(loss)
        losses, gradients = value_and_grad(params, batch)
        gradients = jax.lax.with_sharding_constraint(gradients, per_language)
        present, finite = jax.vmap(target_mask)(batch).any((1, 2)), jnp.isfinite(losses)
        updates, after = resolver.update(gradients, state, params, active=present & finite)
        tracked, resolved = cast(tuple[Any, Any], after)
        state = tracked, resolved._replace(skipped=resolved.skipped + (present & ~finite))
        return losses, jax.lax.with_sharding_constraint(updates, per_parameter), state

    return GradientSource(
        init=jax.jit(resolver.init),
        compute=compute,
        diagnostics=lambda state: state[1],
        partition=blocks.partition(common["blocks"], params, stacked=STACKED),
        engine=None,
    )
