"""The vocabulary's table: the embedding, the head, or both at once when they are tied.

It is the largest array of most models, and its gradient is dense: with K objectives, K tables
would exceed everything else. Here its gradients are formed, and its blocks resolved, one slice of
the vocabulary at a time, and nowhere else does an array of K x V exist.

A tied table's gradient has two parts, from the scores at the end of the forward pass and from the
lookup at its beginning, and a block sees only their sum. The lookup therefore returns zeros beside
the vectors, in the form of :class:`HeadResiduals`, which :func:`nll` takes. Their cotangent is what
the scores' part is made of. So it arrives at the lookup, the last step of the backward pass, which
forms both parts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoo.dtypes import at_least_float32
from jaxmoo.engine.backward import Backward, CallInputs, StepInputs, over_objectives
from jaxmoo.engine.block import current
from jaxmoo.engine.block_table import BlockTable
from jaxmoo.engine.call_blocks import BlockIndices, CallBlocks
from jaxmoo.engine.layout import (
    Layout,
    reduce_pieces,
    scatter,
    scatter_vectors,
    sections_of_piece,
    sections_of_whole,
)
from jaxmoo.engine.parameter import Parameter
from jaxmoo.engine.usage import Use
from jaxmoo.kernels.cross_entropy import (
    PLAIN,
    Logits,
    Scores,
    chunked_nll,
    hidden_gradient,
    scores,
    table_gradient,
)
from jaxmoo.platforms import like_gpu, like_tpu

__all__ = ["HeadResiduals", "logits_at_once", "lookup", "nll"]


class HeadResiduals(NamedTuple):
    """What the table's gradient from the scores is made of. B rows, S positions."""

    h: jax.Array  # [B, S, D]
    targets: jax.Array  # float32 [B, S]: token numbers, -1 for none
    normaliser: jax.Array  # float32 [B, S]
    cotangent: jax.Array  # float32 [B, S]


class TableCotangents(NamedTuple):
    """What a table's gradient is made of; parts that an operation does not have are None."""

    tokens: jax.Array | None  # int32 [B, S] that were looked up
    vectors: jax.Array | None  # [B, S, D]: cotangents of their vectors
    head: HeadResiduals | None


class TableResult(NamedTuple):
    """What the backward step of an operation on a table gives; what does not apply is None."""

    update: jax.Array | None  # of the device's piece, where the table is resolved in the pass
    accumulator: jax.Array | None  # [K, *piece], where it is deferred
    rows: BlockTable | None  # where it has blocks that are resolved in the pass


def lookup(
    table: Any, tokens: jax.Array, dtype: Any, form: Logits = PLAIN
) -> tuple[jax.Array, HeadResiduals | None]:
    """Look up one vector per token.

    Args:
      table: [V, D], or the engine's parameter in its place.
      tokens: int32 [B, S].
      dtype: dtype of the result.
      form: of the logits, as :func:`nll` of the same table is given it.

    Returns:
      ``(vectors [B, S, D], residuals)``; the residuals go to :func:`nll` when it reads the same
      table, and are None where none are needed.
    """
    engine = current()
    if engine is None or not engine.reads(table):
        return table[tokens].astype(dtype), None
    if not isinstance(engine, Backward):
        return engine.use([table], _name(engine, table, "lookup"))[0][tokens].astype(dtype), None
    if not _sliced(engine, table):
        return engine.use([table])[0][tokens].astype(dtype), None

    call = _Call(engine, table, form)
    size = engine.layouts[table.leaf].shape[1]
    tied = table.leaf in engine.tied

    @jax.custom_vjp
    def embed(
        value: Any, accumulator: Any, rows: BlockTable | None, inputs: CallInputs, tokens: jax.Array
    ) -> tuple[jax.Array, HeadResiduals | None]:
        del accumulator, rows, inputs
        h = engine.gather(value, call.layout)[tokens].astype(dtype)
        zeros = jnp.zeros(tokens.shape, jnp.float32)
        residuals = HeadResiduals(jnp.zeros((*tokens.shape, size), dtype), zeros, zeros, zeros)
        return h, residuals if tied else None

    def forward(
        value: Any, accumulator: Any, rows: BlockTable | None, inputs: CallInputs, tokens: jax.Array
    ) -> Any:
        states = None if rows is None else rows.states
        return embed(value, accumulator, rows, inputs, tokens), (value, states, inputs, tokens)

    def backward(residuals: Any, cotangents: Any) -> Any:
        value, states, inputs, tokens = residuals
        mapped = TableCotangents(tokens, *cotangents)
        found = over_objectives(call.resolve, engine.topology)(mapped, value, states, inputs)
        return found.update, found.accumulator, found.rows, None, None

    embed.defvjp(forward, backward)
    return embed(table.value, table.accumulator, call.rows(), call.inputs, tokens)


def nll(
    table: Any,
    h: jax.Array,
    targets: jax.Array,
    chunk: int,
    residuals: HeadResiduals | None,
    form: Logits = PLAIN,
) -> jax.Array:
    """Negative log-likelihood of targets under the softmax of the table's scores.

    Args:
      table: [V, D], or the engine's parameter in its place.
      h: [B, T, D].
      targets: int32 [B, T], those of each row first; -1 for none.
      chunk: positions per row whose logits exist at one time; a divisor of T.
      residuals: from :func:`lookup` of the same table, when it is tied.
      form: how products with the table become logits.

    Returns:
      float32 [B, T]; 0 where there is no target.
    """
    engine = current()
    if engine is None or not engine.reads(table):
        return chunked_nll(h, table, targets, chunk, form)
    if not isinstance(engine, Backward):
        whole = engine.use([table], _name(engine, table, "nll"))[0]
        return chunked_nll(h, whole, targets, chunk, form)
    if not _sliced(engine, table):
        return chunked_nll(h, engine.use([table])[0], targets, chunk, form)

    call = _Call(engine, table, form)
    # A tied table's gradient is formed at the lookup.
    to_lookup = residuals if table.leaf in engine.tied else None

    def score(value: Any, h: jax.Array, targets: jax.Array, *, slopes: bool) -> Scores:
        return scores(h, engine.gather(value, call.layout), targets, chunk, form, slopes=slopes)

    @jax.custom_vjp
    def scored(
        value: Any,
        accumulator: Any,
        rows: BlockTable | None,
        to_lookup: HeadResiduals | None,
        inputs: CallInputs,
        h: jax.Array,
        t: jax.Array,
    ) -> jax.Array:
        del accumulator, rows, to_lookup, inputs
        return score(value, h, t, slopes=False).nll

    def forward(
        value: Any,
        accumulator: Any,
        rows: BlockTable | None,
        to_lookup: HeadResiduals | None,
        inputs: CallInputs,
        h: jax.Array,
        t: jax.Array,
    ) -> Any:
        del accumulator, to_lookup
        found = score(value, h, t, slopes=True)
        states = None if rows is None else rows.states
        return found.nll, (value, states, inputs, h, t, found.normaliser, found.slope)

    def backward(kept: Any, cotangent: jax.Array) -> Any:
        value, states, inputs, h, t, normaliser, slope = kept
        dh = hidden_gradient(slope, t, cotangent)
        mine = HeadResiduals(h, t.astype(jnp.float32), normaliser, cotangent)
        if to_lookup is not None:
            return None, None, None, jax.tree.map(_fit, mine, to_lookup), None, dh, None
        mapped = TableCotangents(None, None, mine)
        found = over_objectives(call.resolve, engine.topology)(mapped, value, states, inputs)
        return found.update, found.accumulator, found.rows, None, None, dh, None

    scored.defvjp(forward, backward)
    rows, accumulator = (call.rows(), table.accumulator) if to_lookup is None else (None, None)
    return scored(table.value, accumulator, rows, to_lookup, call.inputs, h, targets)


def logits_at_once() -> int:
    """How many logits of one objective's forward pass should exist at one time.

    On a GPU all objectives of a device share 512 MiB: products are large enough to be fast there,
    and the memory is the same for any number of objectives. Elsewhere each has 128 MiB.
    """
    engine = current()
    if isinstance(engine, Backward) and like_gpu(engine.topology.platform):
        return 2**27 // engine.topology.local_objectives
    return 2**25


def _sliced(engine: Any, table: Parameter) -> bool:
    """Whether a table is trained, and cut so that every device has its share of each slice."""
    layout: Layout = engine.layouts[table.leaf]
    return layout.trained and len(layout.shape) == 2 and layout.axis in (None, 1)


def _name(engine: Any, table: Any, name: str) -> str | None:
    return name if isinstance(table, Parameter) and _sliced(engine, table) else None


def _fit(x: jax.Array, like: jax.Array) -> jax.Array:
    """Cut or fill up the axis of positions; what is cut holds no targets."""
    x = x[:, : like.shape[1]]
    fill = [(0, 0), (0, like.shape[1] - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, fill).astype(like.dtype)


class _Call:
    """A call that resolves a table, as if its slices were layers of a stack."""

    def __init__(self, engine: Backward, table: Parameter, form: Logits) -> None:
        self.engine, self.table, self.form = engine, table, form
        self.layout = engine.layouts[table.leaf]
        rows, size = self.layout.shape
        self.deferred = table.leaf in engine.deferred
        # A deferred table's slices are of no consequence but for memory.
        labels = None if self.deferred else self.layout.block_labels.reshape(-1, 1)
        self.slices = _default_slices(rows) if labels is None else len(labels)
        self.stack = dataclasses.replace(
            self.layout, shape=(rows // self.slices, size), layers=self.slices, labels=labels
        )
        self.resolves = not self.deferred and engine.rules.groups is not None
        self.sketched = self.resolves and engine.rules.sketch is not None
        # On a TPU columns are the lanes of registers. What devices send to each other would be cut
        # along them by a slow copy, if it did not come from the product in pieces.
        # A sketch is sent instead.
        in_pieces = engine.topology.tpu and self.layout.axis == 1 and not self.sketched
        self.pieces = engine.topology.pieces if in_pieces else 1
        self.blocks = self._blocks(jnp.arange(self.slices)) if self.resolves else None
        self.inputs = CallInputs(None if self.blocks is None else self.blocks.indices, engine.step)

    def _blocks(self, slice_number: jax.Array) -> CallBlocks:
        leaf = self.table.leaf
        uses = [Use(leaf, slice_number)]
        return CallBlocks.of({leaf: self.stack}, self.engine.rules, uses, self.engine.topology)

    def rows(self) -> BlockTable | None:
        """The block table's rows of all slices, [slices, 1, ...]."""
        return None if self.blocks is None else self.blocks.rows(self.engine.table)

    def _lookups(self, mapped: TableCotangents) -> _Lookups | None:
        """Sums of the vectors' cotangents, per objective.

        They are this device's objectives', or, where gradients are exchanged in pieces, all
        objectives' of its piece of every vector, which are fewer numbers than a table's.
        """
        tokens, vectors = mapped.tokens, mapped.vectors
        if tokens is None or vectors is None:
            return None
        tokens, vectors = (
            x.reshape(len(x), tokens[0].size, *x.shape[3:]) for x in (tokens, vectors)
        )
        if self.pieces > 1:
            tokens, vectors = scatter_vectors(tokens, vectors, self.engine.topology)
        sums = functools.partial(_sums_by_token, self.layout.shape[0], self.layout.gathered_dtype)
        return jax.lax.map(lambda x: sums(*x), (tokens, vectors))

    def resolve(
        self, mapped: TableCotangents, value: jax.Array, states: Any, inputs: CallInputs
    ) -> TableResult:
        """Form the gradients [K / L, ...] slice by slice and resolve each.

        Args:
          mapped: per objective [K / L, ...].
          value: this device's piece of the table.
          states: aggregators' states of all slices, or None.
          inputs: of all slices.
        """
        engine, layout = self.engine, self.layout
        head = mapped.head
        count = engine.topology.local_objectives
        height, size = self.stack.shape
        shape = (self.pieces, height, size // self.pieces)
        sends = self.pieces == 1 or head is not None
        together = _objectives_at_once(head, height, engine.topology.platform)
        lookups = self._lookups(mapped)
        one_at_a_time = self.sketched and engine.rules.keep == "one"
        # Added to what this device sends, or to what it receives.
        before, after = (lookups, None) if self.pieces == 1 else (None, lookups)

        def one(place: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
            number, states, indices = xs
            first = number * height
            piece = jax.lax.dynamic_slice_in_dim(value, first, height, 0)
            table = None if head is None else engine.gather(piece, layout)

            def of_objective(mine: tuple[HeadResiduals | None, _Lookups | None]) -> jax.Array:
                total = jnp.zeros(shape, place.dtype)
                if mine[0] is not None and table is not None:
                    found = _from_scores(
                        mine[0], table, first, engine.topology.platform, self.pieces, self.form
                    )
                    total = found.astype(place.dtype)
                return total if mine[1] is None else _add_lookup(total, mine[1], first)

            def of_some(i: jax.Array, place: jax.Array) -> jax.Array:
                some = jax.tree.map(
                    lambda x: jax.lax.dynamic_slice_in_dim(x, i * together, together),
                    (head, before),
                )
                found = jax.vmap(of_objective)(some)
                return jax.lax.dynamic_update_slice_in_dim(place, found, i * together, 0)

            if one_at_a_time:
                update, rows = self._one_at_a_time(
                    lambda k: of_objective(jax.tree.map(lambda x: x[k], (head, before)))[0],
                    number,
                    indices,
                    states,
                    inputs.step,
                )
                return place, (update, rows)

            # A few objectives at a time, so that a sum over all positions of one is formed in one
            # place that is as small as one slice.
            if not sends:
                gradients = jnp.zeros((engine.topology.objectives, *shape[1:]), place.dtype)
            else:
                if together == count:
                    local = jax.vmap(of_objective)((head, before))
                else:
                    local = place = jax.lax.fori_loop(0, count // together, of_some, place)
                if self.sketched:
                    call, stack = self._blocks(number), indices._replace(layers=(number,))
                    resolved = engine.resolve_sketched(
                        [local[:, 0]],
                        [self.stack],
                        [self.table.leaf],
                        call,
                        stack,
                        states,
                        inputs.step,
                    )
                    return place, (
                        resolved.updates[0],
                        call.new_rows(resolved, indices.members),
                    )
                if self.pieces > 1:
                    gradients = scatter(local, 0, engine.topology)[:, 0]
                else:
                    gradients = scatter(local[:, 0], layout.axis, engine.topology)
            if after is not None:
                # One objective after the other: a TPU would sort the rows of all.
                gradients = jax.lax.fori_loop(
                    0,
                    len(gradients),
                    lambda k, x: _add_lookup(x, jax.tree.map(lambda y: y[k], after), first, k),
                    gradients,
                )
            gradients = engine.join(gradients)
            if not self.resolves:
                return place, (gradients if self.deferred else gradients[0], None)
            section = sections_of_piece(
                gradients[:, None],
                self.stack,
                self.table.leaf,
                indices.labels[0][None],
                number[None],
                engine.topology,
            )
            call = self._blocks(number)
            resolved = engine.resolve([section], call, indices, states, inputs.step)
            update = resolved.updates[0].reshape(gradients.shape[1:])
            return place, (update, call.new_rows(resolved, indices.members))

        # A place of the local gradients is handed on, so that it is not cleared for every slice.
        needed = sends and together < count and not one_at_a_time
        empty = jnp.zeros((count, *shape) if needed else (), layout.gathered_dtype)
        slices = (jnp.arange(self.slices), states, inputs.indices)
        _, (pieces, rows) = jax.lax.scan(one, empty, slices)
        if self.deferred:  # [slices, K, rows, size] -> [K, V, size]
            shape = (pieces.shape[1], *value.shape)
            return TableResult(None, jnp.moveaxis(pieces, 0, 1).reshape(shape), rows)
        return TableResult(pieces.reshape(value.shape).astype(value.dtype), None, rows)

    def _one_at_a_time(
        self,
        gradient: Callable[[jax.Array], jax.Array],
        number: jax.Array,
        indices: BlockIndices,
        states: Any,
        step: StepInputs,
    ) -> tuple[jax.Array, BlockTable]:
        """Resolve a slice, given a function from an objective's number to its gradient [height, D].

        Every gradient is formed twice, and dropped: to be sketched, and to be added up.
        """
        engine, leaf, label = self.engine, self.table.leaf, indices.labels[0]

        def sketch(k: jax.Array) -> jax.Array:  # [1, m]
            section = sections_of_whole(gradient(k)[None], leaf, label, number)
            return engine.sketch([section], indices, step)[0]

        count, call = engine.topology.local_objectives, self._blocks(number)
        z = jax.lax.map(sketch, jnp.arange(count))
        resolved = engine.weigh(z, call, indices, states, step)
        weights = engine.topology.own(resolved.weights)[0]

        def add(k: jax.Array, total: jax.Array) -> jax.Array:
            return total + jnp.where(weights[k] != 0, weights[k] * gradient(k), 0)

        wide = at_least_float32(self.layout.gathered_dtype)
        total = jax.lax.fori_loop(0, count, add, jnp.zeros(self.stack.shape, wide))
        total = total.astype(self.layout.gathered_dtype)
        update = reduce_pieces(total, self.layout.axis, engine.topology)
        return update, call.new_rows(resolved, indices.members)


def _most_logits(platform: str) -> int:
    """How many logits of one slice and one objective exist at one time.

    The fewer, the more positions without a target are skipped, and the more often the sum is read
    and written. On a GPU the host waits at every round of a loop whose length depends on the data:
    one large product is faster.
    """
    if like_gpu(platform):
        return 2**27
    return 2**26 if like_tpu(platform) else 2**21


def _objectives_at_once(head: HeadResiduals | None, height: int, platform: str) -> int:
    """Of how many objectives the gradients of one slice are formed at once.

    As many as have no more logits together than may exist: on a GPU a loop costs launches, on a
    TPU what one objective leaves is copied into the order in which devices exchange it.
    """
    if head is None or platform == "cpu":
        return 1
    count, rows, length = head.targets.shape
    most = _most_logits(platform) // (rows * length * height)
    return max(n for n in range(1, count + 1) if count % n == 0 and n <= max(1, most))


def _default_slices(rows: int) -> int:
    return next((n for n in range(8, 65) if rows % n == 0), 1)


class _Lookups(NamedTuple):
    """Sums of vectors' cotangents by token. N looked-up tokens."""

    tokens: jax.Array  # int32 [N]; -1 for those that occurred before
    sums: jax.Array  # [N, D]; 0 for those that occurred before


def _sums_by_token(vocabulary: int, dtype: Any, tokens: jax.Array, vectors: jax.Array) -> _Lookups:
    """Add up vectors' cotangents [N, D] of equal tokens [N], in float32.

    So that a table's gradient needs to be formed in no higher precision than it is sent in.
    """
    count = jnp.arange(tokens.size)
    first = jnp.full(vocabulary, tokens.size).at[tokens].min(count)[tokens]
    sums = jnp.zeros(vectors.shape, at_least_float32(vectors.dtype)).at[first].add(vectors)
    return _Lookups(jnp.where(first == count, tokens, -1), sums.astype(dtype))


def _add_lookup(
    totals: jax.Array, lookups: _Lookups, first: jax.Array, at: int | jax.Array = 0
) -> jax.Array:
    """Add sums of cotangents to the rows of their tokens, in one slice.

    Args:
      totals: the slice's gradients so far, [N, height, D].
      lookups: of all tokens.
      first: number of the slice's first token.
      at: which of the N gradients.
    """
    height = totals.shape[1]
    row = lookups.tokens - first
    outside = height + jnp.arange(row.size)  # numbers that do not occur twice
    row = jnp.where((row >= 0) & (row < height), row, outside)
    new = lookups.sums.astype(totals.dtype)
    return totals.at[at, row].add(new, mode="drop", unique_indices=True)


def _from_scores(
    head: HeadResiduals,
    table: jax.Array,
    first: jax.Array,
    platform: str,
    pieces: int,
    form: Logits,
) -> jax.Array:
    """Gradient of one objective's scores with respect to one slice of the table, in pieces."""
    rows, length = head.targets.shape
    chunks = -(-length * rows * table.shape[0] // _most_logits(platform))
    chunk = -(-length // chunks)  # all of about the same size
    fill = -length % chunk
    h = jnp.pad(head.h, ((0, 0), (0, fill), (0, 0)))
    targets = jnp.pad(head.targets.astype(jnp.int32), ((0, 0), (0, fill)), constant_values=-1)
    normaliser, ct = (jnp.pad(x, ((0, 0), (0, fill))) for x in (head.normaliser, head.cotangent))
    skip = platform == "cpu"
    return table_gradient(
        h, table, targets, normaliser, ct, chunk, first, form=form, skip=skip, pieces=pieces
    )
