"""How near a model is to a point where no direction improves every language.

The shortest vector in the convex hull of the languages' gradients, ``min |sum_k w_k g_k|`` over
weights w >= 0 that sum to 1, is zero exactly at Pareto-stationary points. Block by block, each
with weights of its own, it is never larger than for the whole model, and all blocks may be
stationary where the model is not: that is what resolving by blocks gives up, and the reason to
show both.

Gradients of few examples are noisy, and noise adds to their squares: cosines come out too small
and minimal norms too large. So two independent batches are measured, and products *between* them,
in which the noise averages out, give estimates without it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo import mesh
from jaxmoo.aggregators.solvers import min_norm
from jaxmoo.analysis.conflict import cosines
from jaxmoo.blocks import Blocks
from jaxmoo.config.training import Config
from jaxmoo.data.tokenization.tokenize import Tokenized
from jaxmoo.engine import resolved_value_and_grad
from jaxmoo.errors import ConfigError, DataError
from jaxmoo.models import Decoder, summed_loss, target_mask
from jaxmoo.models.paths import STACKED
from jaxmoo.runs.trained_parameters import router_coef, trained_filter
from jaxmoo.runtime.processes import place
from jaxmoo.train.gradient_source import block_rule

__all__ = [
    "PairedGrams",
    "Stationarity",
    "check_examples",
    "measure_grams",
    "paired_batch",
    "stationarity",
]


class PairedGrams(NamedTuple):
    """Inner products of gradients of two independent batches, a and b; B blocks, K languages."""

    blocks: tuple[str, ...]
    losses: np.ndarray  # float64 [2, K] mean loss in nats per token
    within: np.ndarray  # float64 [2, B, K, K]: of batch a, and of batch b
    across: np.ndarray  # float64 [B, K, K]: between a and b, symmetrised

    @property
    def pooled(self) -> np.ndarray:
        """Gram matrices of the mean of both batches' gradients [B, K, K]."""
        return (self.within.sum(0) + 2 * self.across) / 4


@dataclasses.dataclass(frozen=True)
class Stationarity:
    """Of one block, or of the whole model. Norms are of gradients of the loss in nats per token.

    Attributes:
      weights: of the languages in the shortest combination, both batches together [K].
      min_norm: its norm: of both batches together.
      mean_norm: norm of the mean gradient of the languages, likewise.
      one_batch: minimal and mean norm of one batch, averaged (as squares) over the two.
      square: estimate of the squared minimal norm without noise: the product between the two
        batches' gradients, combined by the same weights; may be negative.
      mean_square: the same of the mean gradient.
      cosine: cosines between languages within one batch, averaged over the two [K, K].
      cosine_across: estimate without noise; nan for a language whose own product between the
        batches is not positive: its gradient is lost in noise.
    """

    weights: np.ndarray
    min_norm: float
    mean_norm: float
    one_batch: tuple[float, float]
    square: float
    mean_square: float
    cosine: np.ndarray
    cosine_across: np.ndarray

    @property
    def ratio(self) -> float:
        """Minimal norm over mean norm: 1 no conflict is in the way, 0 stationary."""
        return self.min_norm / self.mean_norm

    @property
    def ratio_across(self) -> float:
        """The same, estimated without noise; nan where the mean gradient is lost in noise."""
        if self.mean_square <= 0:
            return float("nan")
        return float(np.sqrt(max(self.square, 0.0) / self.mean_square))


def stationarity(within: np.ndarray, across: np.ndarray) -> Stationarity:
    """Measure one block, or the whole model.

    Args:
      within: Gram matrices of two batches [2, K, K].
      across: inner products between the batches, symmetrised [K, K].
    """
    within, across = np.asarray(within, np.float64), np.asarray(across, np.float64)
    pooled = (within.sum(0) + 2 * across) / 4
    weights = shortest(pooled)
    mean = np.full(len(pooled), 1 / len(pooled))
    each = [shortest(gram) for gram in within]
    one_batch = (
        np.mean([_square(gram, w) for gram, w in zip(within, each, strict=True)]),
        np.mean([_square(gram, mean) for gram in within]),
    )
    return Stationarity(
        weights=weights,
        min_norm=float(np.sqrt(max(_square(pooled, weights), 0.0))),
        mean_norm=float(np.sqrt(max(_square(pooled, mean), 0.0))),
        one_batch=(float(np.sqrt(max(one_batch[0], 0.0))), float(np.sqrt(max(one_batch[1], 0.0)))),
        square=_square(across, weights),
        mean_square=_square(across, mean),
        cosine=np.mean([cosines(gram) for gram in within], axis=0),
        cosine_across=cosines(across),
    )


def shortest(gram: np.ndarray) -> np.ndarray:
    """Weights [K] of the shortest vector in the convex hull of K gradients.

    Args:
      gram: [K, K]. A language without gradient has weight 0: it is absent, not stationary.
    """
    present = np.diagonal(gram) > 0
    if not present.any():
        return np.zeros(len(gram))
    # The solver works in float32, and needs no more than the gradients' ratios.
    scaled = gram / np.diagonal(gram).max()
    scaled = np.where(present[:, None] & present[None, :], scaled, 0)
    weights = _min_norm(jnp.asarray(scaled, jnp.float32), jnp.asarray(present))
    return np.asarray(weights, np.float64)


_min_norm = jax.jit(min_norm)


def _square(gram: np.ndarray, weights: np.ndarray) -> float:
    return float(weights @ gram @ weights)


def paired_batch(
    tokenized: Mapping[str, Sequence[Tokenized]],
    languages: Sequence[str],
    examples: int,
    *,
    seed: int = 0,
    pad_id: int = 0,
) -> dict[str, np.ndarray]:
    """Draw two batches of every language that share no example.

    Args:
      tokenized: per language its examples.
      languages: the K languages.
      examples: B, per language and batch.
      seed: which examples.
      pad_id: the token to pad with.

    Returns:
      ``tokens`` int32 and ``loss_mask`` bool [2 K, B, S]: first all languages' batches a, then b.

    Raises:
      DataError: a language has fewer than 2 B examples.
    """
    chosen: list[list[Tokenized]] = [[], []]
    for language in languages:
        available = tokenized[language]
        if len(available) < 2 * examples:
            raise DataError(
                f"language {language!r} has {len(available)} training examples; two batches of "
                f"{examples} need {2 * examples}. Measure with fewer examples."
            )
        order = np.random.default_rng(seed).permutation(len(available))
        for side, part in enumerate((order[:examples], order[examples : 2 * examples])):
            chosen[side] += [available[i] for i in part]
    rows = [*chosen[0], *chosen[1]]
    length = -(-max(len(row.tokens) for row in rows) // 32) * 32
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = row.tokens
        mask[i, : len(row.tokens)] = row.loss_mask
    shape = (2 * len(languages), examples, length)
    return {"tokens": tokens.reshape(shape), "loss_mask": mask.reshape(shape)}


def check_examples(examples: int, device_mesh: Mesh) -> None:
    """Raise ConfigError unless the devices of a mesh can share so many examples."""
    rows = device_mesh.shape[mesh.DATA] * device_mesh.shape[mesh.FSDP]
    if examples % rows:
        raise ConfigError(
            f"{examples} examples per language and batch cannot be divided among {rows} devices "
            "(data x fsdp). Choose a multiple of their number (--examples), or arrange the devices "
            "otherwise (--mesh)."
        )


def measure_grams(
    model: Decoder,
    config: Config,
    batch: Mapping[str, np.ndarray],
    *,
    blocks: str = "module",
    device_mesh: Mesh | None = None,
) -> PairedGrams:
    """Measure the inner products of the languages' gradients in a model.

    The two batches of K languages are 2 K objectives of one backward pass, which holds the
    gradients of one block at a time.

    Args:
      model: the decoder, in segments that suit ``config.model.trainable``; with its adapters, if
        the run trains adapters.
      config: settings of the run: which parameters are trained.
      batch: from `paired_batch`.
      blocks: how parameters are cut into blocks; see ``resolve.blocks``.
      device_mesh: the devices, from :func:`jaxmoo.mesh.make_mesh` for 2 K languages; by default all
        of them. Where they belong to several processes, the model's parameters lie on it, and all
        processes call.

    Raises:
      ConfigError: there are no such blocks, or the examples cannot be divided among the devices.
    """
    config = dataclasses.replace(config, resolve=dataclasses.replace(config.resolve, blocks=blocks))
    graph, params, frozen = nnx.split(model, trained_filter(config), ...)
    objectives = len(batch["tokens"])
    grid = mesh.make_mesh(objectives) if device_mesh is None else device_mesh
    check_examples(batch["tokens"].shape[1], grid)
    params, frozen = (
        jax.device_put(tree, mesh.parameter_shardings(grid, tree, stacked=STACKED))
        for tree in (params, frozen)
    )
    leaves, trees = jax.tree.flatten((params, frozen))
    program = _program(
        graph,
        trees,
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves),
        objectives,
        block_rule(config, params, grid),
        router_coef(config, model.config),
        grid,
    )
    losses, grams = jax.device_get(
        program.run(params, frozen, place(dict(batch), mesh.batch_sharding(grid)))
    )
    k = objectives // 2
    grams = np.asarray(grams, np.float64)
    across = grams[:, :k, k:]
    return PairedGrams(
        blocks=program.blocks,
        losses=np.asarray(losses, np.float64).reshape(2, k),
        within=np.stack([grams[:, :k, :k], grams[:, k:, k:]]),
        across=(across + across.swapaxes(1, 2)) / 2,
    )


class _Program(NamedTuple):
    """What measures a model, and all others alike.

    Attributes:
      run: ``(params, frozen, batch) -> (losses [K], Gram matrices [B, K, K])``.
      blocks: names of the B blocks.
    """

    run: Callable[[Any, Any, Any], tuple[jax.Array, jax.Array]]
    blocks: tuple[str, ...]


@functools.lru_cache(maxsize=4)  # compiled once for all checkpoints of a run
def _program(
    graph: nnx.GraphDef[Decoder],
    trees: Any,
    leaves: tuple[jax.ShapeDtypeStruct, ...],
    objectives: int,
    blocks: str | Blocks,
    coef: float,
    grid: Mesh,
) -> _Program:
    params, frozen = jax.tree.unflatten(trees, leaves)

    def loss(params: Any, frozen: Any, one: Any) -> jax.Array:
        return summed_loss(nnx.merge(graph, params, frozen), one, router_coef=coef)

    engine = resolved_value_and_grad(
        loss,
        params,
        frozen=frozen,
        num_objectives=objectives,
        aggregator="mean",
        blocks=blocks,
        weight_fn=lambda one: target_mask(one).sum(),
        stacked=STACKED,
        mesh=grid,
    )

    @functools.partial(jax.jit, out_shardings=NamedSharding(grid, P()))
    def run(params: Any, frozen: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        losses, _, state = engine(params, batch, engine.init(), frozen)
        assert state.gram is not None
        return losses, state.gram

    return _Program(run, engine.partition.names)
