"""``resolved_value_and_grad``: losses and the resolved gradient, block by block."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo.aggregators import Aggregator
from jaxmoo.blocks import Blocks, Partition, partition, path_string
from jaxmoo.engine.block_rules import BlockRules
from jaxmoo.engine.block_table import BlockTable, Diagnostics
from jaxmoo.engine.device import DevicePass
from jaxmoo.engine.layout import Layout, Topology
from jaxmoo.engine.loss_function import LossFunction
from jaxmoo.engine.usage import Usage
from jaxmoo.errors import ConfigError, DataError
from jaxmoo.mesh import DATA, FSDP, LANGUAGE, TENSOR, make_mesh
from jaxmoo.resolve import group_blocks
from jaxmoo.resolver_state import (
    ResolverState,
    new_state,
    next_state,
    normalised,
    step_key,
)
from jaxmoo.sharding import automatic, spec_of
from jaxmoo.sketched import check_sketchable, sketch_size
from jaxmoo.stacked import num_objectives as objectives_of

__all__ = ["ResolvedGradients", "resolved_value_and_grad"]

REPLICAS = ("mean_then_resolve", "resolve_then_mean", "pooled_gram")
MICROBATCHES = ("resolve_each", "accumulate_first")


def resolved_value_and_grad(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    *,
    num_objectives: int,
    aggregator: str | Aggregator | Mapping[str, str | Aggregator] | None = "cagrad",
    blocks: str | Blocks | Callable[[str], Any] = "layer",
    weight_fn: Callable[[Any], jax.Array] | None = None,
    frozen: Any = None,
    stacked: str | None = None,
    mesh: Mesh | None = None,
    preference: Sequence[float] | jax.Array | None = None,
    match_norm: bool = False,
    nonfinite: Literal["skip", "raise"] = "skip",
    replicas: str = "mean_then_resolve",
    microbatches: int = 1,
    accumulation: str = "resolve_each",
    gram: str = "exact",
    keep: Literal["gradients", "one"] = "gradients",
    dtype: Any = None,
    seed: int = 0,
    has_aux: bool = False,
) -> ResolvedGradients:
    r"""Make a function that returns every objective's loss and the resolved gradient.

    Conflicts are resolved *inside* the backward pass: the objectives' gradients of one block exist
    only while that block is resolved, so memory stays near that of ordinary training. The result
    is what :func:`jaxmoo.stacked_value_and_grad` followed by :func:`jaxmoo.resolve_conflicts`
    gives. It can go into any optax chain.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``: the *sum* of losses over the examples of one
        objective's batch, or ``loss_fn(params, frozen, batch)`` when ``frozen`` is given. Every
        call in it that reads parameters is marked with :func:`jaxmoo.block`. Parameters that are
        read outside of blocks besides, by a penalty or a mask, are held whole for the pass, with
        every objective's gradient of them, and named in a warning.
      params: the trainable parameters, or their shapes.
      num_objectives: K.
      aggregator: see :func:`jaxmoo.resolve_conflicts`. None, with one objective only, is ordinary
        training, sharded in the same way: the baseline.
      blocks: see :func:`jaxmoo.resolve_conflicts`. ``"shard"`` stands for as many pieces as the
        mesh has.
      weight_fn: ``weight_fn(batch) -> scalar``: by how much an objective's sum of losses is
        divided, such as its number of target tokens. It must add up over examples, of which it
        sees those of one device; by default it is their number. An objective of weight 0 is
        absent from the step.
      frozen: parameters that are read but not trained, or their shapes.
      stacked: which arrays stack the layers of a scanned model; see
        :func:`jaxmoo.blocks.partition`.
      mesh: from :func:`jaxmoo.mesh.make_mesh`; by default one over all devices.
      preference: see :func:`jaxmoo.resolve_conflicts`.
      match_norm: see :func:`jaxmoo.resolve_conflicts`.
      nonfinite: see :func:`jaxmoo.resolve_conflicts`.
      replicas: what happens between the replicas of the mesh's ``data`` axis.
        ``"mean_then_resolve"`` averages the objectives' gradients (exact; K times the bytes on
        that axis). ``"resolve_then_mean"`` lets each replica resolve its own and averages the
        results. ``"pooled_gram"`` averages the Gram matrices, so that all replicas use the same
        weights, and then the results.
      microbatches: into how many parts the examples of every objective are split.
      accumulation: ``"resolve_each"`` resolves each microbatch and averages the results, at no
        cost in memory. A part's gradients are weighted by its share of the objective's weight in
        the whole step, so that ``mean`` gives what one large batch gives. ``"accumulate_first"``
        adds up every objective's gradients and resolves once, which is what one large batch gives
        with every aggregator, and needs K times the memory of the gradient.
      gram: ``"exact"``, or ``"sketch:N"``: the Gram matrices of blocks resolved in the pass are
        estimated from random sketches of N numbers per objective, fresh at every step, which are
        exchanged in the gradients' place; each device combines its own objectives' gradients, and
        the sums are exchanged as in ordinary training, whatever K and the number of replicas.
        Blocks that are resolved after the pass are exchanged, and exact.
      keep: ``"gradients"`` holds this device's objectives' gradients of a call's parameters until
        they are resolved. ``"one"``, with sketches, forms one at a time and drops it, and then
        their weighted sum: memory does not depend on K, at the price of one more product for
        every matrix, and of computing every block's call anew in the backward pass. Calls whose
        arrays lie in several blocks, or are resolved after the pass, keep theirs.
      dtype: dtype in which matrices are gathered and their gradients are sent, such as that of
        the computation; by default each parameter's own. Gram matrices and sums are float32.
      seed: seed of aggregators that draw random numbers, and of sketches.
      has_aux: whether ``loss_fn`` returns ``(scalar, aux)``. Like the losses, aux is added up over
        devices and microbatches that hold some of an objective's examples: give sums and counts.

    Returns:
      A :class:`ResolvedGradients`.

    Raises:
      ConfigError: an option is unknown or contradicts another.

    References:
      Hoang et al., *Multilingual Fine-Tuning via Localized Gradient Conflict Resolution*,
      `arXiv:2606.05613 <https://arxiv.org/abs/2606.05613>`_.

    Example:
      >>> from jaxmoo.engine import block
      >>> def loss(params, batch):
      ...     prediction = block(lambda p, x: x * p["w"])(params, batch["x"])
      ...     return jnp.sum((prediction - batch["y"]) ** 2)
      >>> params = {"w": jnp.ones(2)}
      >>> gradients = resolved_value_and_grad(loss, params, num_objectives=2, aggregator="mgda")
      >>> batch = {"x": jnp.ones((2, 3, 2)), "y": jnp.array([[[1.0, 3.0]] * 3, [[3.0, 1.0]] * 3])}
      >>> losses, update, state = gradients(params, batch, gradients.init())
      >>> losses.tolist(), [round(x, 3) for x in update["w"].tolist()]
      ([4.0, 4.0], [-2.0, -2.0])
    """
    _check(nonfinite, ("skip", "raise"), "nonfinite")
    _check(replicas, REPLICAS, "replicas")
    _check(accumulation, MICROBATCHES, "accumulation")
    if microbatches < 1:
        raise ConfigError(f"microbatches: expected at least 1, found {microbatches}.")
    mesh = make_mesh(num_objectives) if mesh is None else mesh
    topology = Topology.of(mesh, num_objectives)
    part = partition(
        f"shard:{topology.pieces}" if blocks == "shard" else blocks, params, stacked=stacked
    )
    if aggregator is None and num_objectives > 1:
        raise ConfigError(
            f"aggregator=None is ordinary training of a single objective, found {num_objectives}. "
            "Name a method; aggregator='mean' averages the objectives."
        )
    groups = None if aggregator is None else group_blocks(part, aggregator)
    _check(keep, ("gradients", "one"), "keep")
    accumulate = accumulation == "accumulate_first" and microbatches > 1
    sketch = sketch_size(gram)
    if keep == "one" and sketch is None:
        raise ConfigError(
            "keep='one' needs sketches: an exact Gram matrix takes all gradients at once. Use "
            "gram='sketch:16384', or keep='gradients'."
        )
    if sketch is not None:
        if groups is None:
            raise ConfigError("gram: ordinary training has no Gram matrix. Use gram='exact'.")
        check_sketchable(
            (group.aggregator for group in groups),
            replicas=replicas,
            accumulated=accumulate,
            tensor=mesh.shape.get(TENSOR, 1),
        )
    for group in groups or ():
        if group.aggregator.cross_gram:
            raise ConfigError(
                f"{group.aggregator.name} needs gradients of two batches per step; use "
                "stacked_value_and_grad and resolve_conflicts."
            )
        if group.aggregator.combine is not None and replicas == "pooled_gram":
            raise ConfigError(
                f"{group.aggregator.name} works coordinate by coordinate and has no Gram matrix to "
                "pool; use replicas='mean_then_resolve' or 'resolve_then_mean'."
            )
    if isinstance(preference, Tracer):
        raise ConfigError(
            "preference: the engine takes numbers that are known when it is made, found a traced "
            "array. Make it outside of jit, or use resolve_conflicts."
        )
    share = None if preference is None else np.asarray(normalised(preference, num_objectives))
    loss = LossFunction(
        loss_fn,
        _layouts(params, frozen, part, stacked, topology, dtype),
        num_trained=len(jax.tree.leaves(params)),
        has_frozen=frozen is not None,
        has_aux=has_aux,
    )
    return ResolvedGradients(
        loss=loss,
        weight_fn=_number_of_examples if weight_fn is None else weight_fn,
        partition=part,
        rules=BlockRules(groups, len(part), share, match_norm, replicas, sketch, keep, part.sparse),
        mesh=mesh,
        topology=topology,
        nonfinite=nonfinite,
        microbatches=microbatches,
        accumulate=accumulate,
        seed=seed,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ResolvedGradients:
    """Computes losses and the resolved gradient; made by :func:`resolved_value_and_grad`.

    Attributes:
      partition: the blocks.
      mesh: the devices.
    """

    loss: LossFunction
    weight_fn: Callable[[Any], jax.Array]
    partition: Partition
    rules: BlockRules
    mesh: Mesh
    topology: Topology
    nonfinite: str
    microbatches: int
    accumulate: bool
    seed: int
    _usages: dict[Any, Usage] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Where every array lies, the trainable ones first."""
        return self.loss.layouts

    @property
    def num_trained(self) -> int:
        """Number of trainable arrays."""
        return self.loss.num_trained

    def init(self) -> ResolverState:
        """Return the state before the first step, on the mesh."""

        # Were it elsewhere than where a step leaves it, the second step would be compiled anew.
        @functools.partial(jax.jit, out_shardings=NamedSharding(self.mesh, P()))
        def make() -> ResolverState:
            groups = self.rules.groups or ()
            return new_state(
                len(self.partition),
                groups,
                self.topology.objectives,
                self.seed,
                sketched=self.rules.sketch is not None,
            )

        return make()

    def __call__(
        self, params: Any, batch: Any, state: ResolverState, frozen: Any = None
    ) -> tuple[Any, Any, ResolverState]:
        """Compute the losses and the resolved gradient of one step; call it within ``jax.jit``.

        Args:
          params: trainable parameters.
          batch: pytree of arrays [K, B, ...]; arrays [K] hold a number per objective.
          state: from :meth:`init` or the last step.
          frozen: parameters that are not trained.

        Returns:
          ``(losses [K], gradient shaped like the parameters, state)``. The loss of an absent
          objective is 0. With ``has_aux``, ``(losses, aux)`` takes the losses' place.

        Raises:
          ConfigError: a parameter is read by no block.
          DataError: the batch does not fit the mesh or K.
        """
        self._check_batch(batch)
        usage = self.usage(params, batch, frozen)
        self._warn(usage)
        leaves, tree = jax.tree.flatten(params)
        frozen_leaves, frozen_tree = jax.tree.flatten(frozen)
        per_device = DevicePass(
            loss=functools.partial(
                self.loss, trees=(tree, frozen_tree), outside=frozenset(usage.outside)
            ),
            weight_fn=self.weight_fn,
            layouts=self.layouts,
            topology=self.topology,
            rules=self.rules,
            microbatches=self.microbatches,
            accumulate=self.accumulate,
            deferred=self.deferred(usage),
            tied=usage.tied(),
        )
        losses, aux, updates, state = automatic(
            functools.partial(self._step, per_device),
            (leaves, frozen_leaves, batch, state),
            (P(), P(), [spec_of(x) for x in leaves], P()),
        )
        updates = jax.tree.unflatten(tree, updates)
        return (losses, aux) if self.loss.has_aux else losses, updates, state

    def _step(
        self, per_device: DevicePass, leaves: Any, frozen: Any, batch: Any, state: Any
    ) -> tuple[jax.Array, Any, list[jax.Array], ResolverState]:
        """Run every device's part of a step, and put the parts together."""
        k = self.topology.objectives
        pad = self.topology.local_objectives * self.topology.language - k
        if pad:
            batch = jax.tree.map(lambda x: jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))), batch)
        specs = [layout.spec for layout in self.layouts]
        trained, fixed = specs[: self.num_trained], specs[self.num_trained :]
        rows = jax.tree.map(lambda x: P(LANGUAGE, *[(DATA, FSDP)] * (x.ndim > 1)), batch)
        key = jax.random.key_data(step_key(state))
        run = jax.shard_map(
            per_device,
            mesh=Mesh(self.mesh.devices, self.mesh.axis_names),
            in_specs=(trained, fixed, rows, P(), P()),
            out_specs=(P(LANGUAGE), P(LANGUAGE), trained, P()),
            # A tensor axis is left to the compiler.
            axis_names=frozenset(
                name for name, size in self.mesh.shape.items() if name != TENSOR or size == 1
            ),
            check_vma=False,
        )
        losses, aux, updates, table = run(
            leaves, frozen, batch, key, self._expand(state.aggregator)
        )
        losses, aux = jax.tree.map(lambda x: x[:k], (losses, aux))
        return losses, aux, updates, self._next_state(state, table)

    def usage(self, params: Any, batch: Any, frozen: Any = None) -> Usage:
        """Trace the loss function on shapes, to see how it uses the parameters.

        What was seen is remembered: a plan and the step itself trace it once between them.

        Args:
          params: trainable parameters or their shapes.
          batch: batch [K, B, ...] or [K], or its shapes.
          frozen: other parameters or their shapes.

        Raises:
          ConfigError: a trainable parameter is not read by any block.
        """
        rows = self.topology.data * self.topology.fsdp * self.microbatches
        one = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (*(n // rows for n in x.shape[1:2]), *x.shape[2:]), x.dtype
            ),
            batch,
        )
        trees = (jax.tree.structure(params), jax.tree.structure(frozen))
        shapes, tree = jax.tree.flatten(one)
        asked = trees, tree, tuple(shapes)
        if asked not in self._usages:
            self._usages[asked] = self.loss.usage(trees, one, self.topology.pieces)
        return self._usages[asked]

    def _warn(self, usage: Usage) -> None:
        if not usage.outside:
            return
        named = [self.layouts[i].path + line for i, line in usage.outside.items()]
        warnings.warn(
            f"Read outside of a block: {', '.join(named[:3])}{', ...' if named[3:] else ''}. The "
            f"result is right, but {len(named)} of {len(self.layouts)} arrays are held whole for "
            "the pass, with the gradients of every objective. Read them in the blocks that use "
            "them, jaxmoo.block(function)(params, ...), to avoid that.",
            stacklevel=3,
        )

    def deferred(self, usage: Usage) -> frozenset[int]:
        """Numbers of the arrays whose gradients [K, ...] are kept until the end of the pass."""
        return frozenset(range(self.num_trained)) if self.accumulate else usage.deferred()

    def kept_bytes(self, usage: Usage) -> dict[str, int]:
        """Return what resolving after the backward pass costs.

        Returns:
          For each array whose objectives' gradients are kept until the end of the pass, its path
          and their bytes per device.
        """
        kept = {}
        for number in sorted(self.deferred(usage)):
            layout = self.layouts[number]
            piece = math.prod(layout.piece_shape(self.topology.pieces)) * (layout.layers or 1)
            itemsize = jnp.dtype(layout.gathered_dtype).itemsize
            itemsize = max(itemsize, 4) if self.accumulate else itemsize
            kept[layout.path] = self.topology.objectives * piece * itemsize
        return kept

    def _check_batch(self, batch: Any) -> None:
        k, top = objectives_of(batch), self.topology
        if k != top.objectives:
            raise DataError(f"num_objectives={top.objectives}, but the batch holds {k} objectives.")
        rows = top.data * top.fsdp * self.microbatches
        leaves = jax.tree_util.tree_leaves_with_path(batch)
        for path, x in leaves:
            if x.ndim > 1 and (not x.shape[1] or x.shape[1] % rows):
                raise DataError(
                    f"Batch {path_string(path)!r}: expected [K, B, ...] with B a multiple of "
                    f"{rows} (data {top.data} x fsdp {top.fsdp} x microbatches "
                    f"{self.microbatches}), or [K]; found {x.shape[1]}."
                )
        if all(x.ndim < 2 for _, x in leaves):
            raise DataError(
                "Batch: expected arrays [K, B, ...] of examples, found only arrays [K] of one "
                "number per objective."
            )

    def _expand(self, state: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give every group's state a row per block, and one to spare."""
        rows = len(self.partition) + 1

        def grow(x: jax.Array, blocks: np.ndarray) -> jax.Array:
            return jnp.zeros((rows, *x.shape[1:]), x.dtype).at[blocks].set(x)

        return tuple(
            jax.tree.map(functools.partial(grow, blocks=np.asarray(group.blocks)), s)
            for group, s in zip(self.rules.groups or (), state, strict=True)
        )

    def _next_state(self, state: ResolverState, table: BlockTable) -> ResolverState:
        found = Diagnostics.of(table.diagnostics, self.topology.objectives)
        return next_state(
            state,
            aggregator=tuple(
                jax.tree.map(operator.itemgetter(np.asarray(group.blocks)), s)
                for group, s in zip(self.rules.groups or (), table.states, strict=True)
            ),
            gram=found.gram,
            weights=found.weights,
            update_norm=found.update_norm,
            mean_norm=found.mean_norm,
            nonfinite=found.nonfinite,
            gram_error=found.gram_error,
            stop=self.nonfinite == "raise",
        )


def _layouts(
    params: Any,
    frozen: Any,
    part: Partition,
    stacked: str | None,
    topology: Topology,
    dtype: Any,
) -> tuple[Layout, ...]:
    found = []
    for tree, labels in ((params, part.labels), (frozen, None)):
        for number, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
            name = path_string(path)
            is_stack = stacked is not None and re.search(stacked, name) is not None
            mine = None if labels is None else labels[number]
            found.append(
                Layout.of(
                    name,
                    x,
                    stacked=is_stack,
                    pieces=topology.pieces,
                    labels=mine,
                    dtype=dtype,
                )
            )
    return tuple(found)


def _number_of_examples(batch: Any) -> jax.Array:
    return jnp.float32(next(len(x) for x in jax.tree.leaves(batch) if x.ndim))


def _check(value: str, choices: Sequence[str], name: str) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, found {value!r}.")
