"""The vocabulary's table: the embedding, the head, or both at once when they are tied.

It is the largest array of most models, and its gradient is dense: with K objectives, K tables
would exceed everything else. Here its gradients are formed, and its blocks resolved, one slice of
the vocabulary at a time, and nowhere else does an array of K x V exist.

A tied table's gradient has two parts, from the scores at the end of the forward pass and from the
lookup at its beginning, and a block sees only their sum. The lookup therefore returns a *ticket*
beside the vectors, zeros that :func:`nll` takes. Its cotangent is what the scores' part is made
of. So it arrives at the lookup, the last step of the backward pass, which forms both parts.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoo.engine.backward import Backward, over_objectives
from jaxmoo.engine.block import current
from jaxmoo.engine.layout import Layout, sections_of_piece
from jaxmoo.engine.parameter import Parameter
from jaxmoo.engine.tables import CallBlocks, Tables
from jaxmoo.kernels.cross_entropy import (
    Scores,
    chunked_nll,
    hidden_gradient,
    scores,
    table_gradient,
)

__all__ = ["Ticket", "logits_at_once", "lookup", "nll"]

# Logits of one slice and one objective that exist at one time. The fewer, the more positions
# without a target are skipped, and the more often the sum is read and written. On a GPU the host
# waits at every round of a loop whose length depends on the data: one large product is faster.
_MOST_LOGITS = {"cpu": 2**21, "tpu": 2**24, "gpu": 2**27}


class Ticket(NamedTuple):
    """What the table's gradient from the scores is made of. B rows, S positions."""

    h: jax.Array  # [B, S, D]
    targets: jax.Array  # float32 [B, S]: token numbers, -1 for none
    normaliser: jax.Array  # float32 [B, S]
    cotangent: jax.Array  # float32 [B, S]


def lookup(table: Any, tokens: jax.Array, dtype: Any) -> tuple[jax.Array, Ticket | None]:
    """Look up one vector per token.

    Args:
      table: [V, D], or the engine's parameter in its place.
      tokens: int32 [B, S].
      dtype: dtype of the result.

    Returns:
      ``(vectors [B, S, D], ticket)``; the ticket goes to :func:`nll` when it reads the same table,
      and is None where none is needed.
    """
    engine = current()
    if engine is None or not engine.reads(table):
        return table[tokens].astype(dtype), None
    if not isinstance(engine, Backward):
        return engine.use([table], _name(engine, table, "lookup"))[0][tokens].astype(dtype), None
    if not _sliced(engine, table):
        return engine.use([table])[0][tokens].astype(dtype), None

    call = _Call(engine, table)
    size = engine.layouts[table.leaf].shape[1]
    ticketed = table.leaf in engine.tied

    @jax.custom_vjp
    def embed(value: Any, tap: Any, tables: Tables, integers: Any, tokens: Any) -> Any:
        del tap, tables, integers
        h = engine.gather(value, call.layout)[tokens].astype(dtype)
        zeros = jnp.zeros(tokens.shape, jnp.float32)
        ticket = Ticket(jnp.zeros((*tokens.shape, size), dtype), zeros, zeros, zeros)
        return h, ticket if ticketed else None

    def forward(value: Any, tap: Any, tables: Tables, integers: Any, tokens: Any) -> Any:
        state = None if tables is None else tables.state
        return embed(value, tap, tables, integers, tokens), (value, state, integers, tokens)

    def backward(residuals: Any, cotangents: Any) -> Any:
        value, state, integers, tokens = residuals
        mapped = (tokens, *cotangents)
        done = over_objectives(call.resolve, engine.topology)(mapped, value, state, integers)
        return *done, None, None

    embed.defvjp(forward, backward)
    return embed(table.value, table.tap, call.rows(), (call.integers, engine.dynamic), tokens)


def nll(
    table: Any, h: jax.Array, targets: jax.Array, chunk: int, ticket: Ticket | None
) -> jax.Array:
    """Negative log-likelihood of targets under the softmax of the table's scores.

    Args:
      table: [V, D], or the engine's parameter in its place.
      h: [B, T, D].
      targets: int32 [B, T], those of each row first; -1 for none.
      chunk: positions per row whose logits exist at one time; a divisor of T.
      ticket: from :func:`lookup` of the same table, when it is tied.

    Returns:
      float32 [B, T]; 0 where there is no target.
    """
    engine = current()
    if engine is None or not engine.reads(table):
        return chunked_nll(h, table, targets, chunk)
    if not isinstance(engine, Backward):
        whole = engine.use([table], _name(engine, table, "nll"))[0]
        return chunked_nll(h, whole, targets, chunk)
    if not _sliced(engine, table):
        return chunked_nll(h, engine.use([table])[0], targets, chunk)

    call = _Call(engine, table)
    if table.leaf not in engine.tied:
        ticket = None

    def score(value: Any, h: jax.Array, targets: jax.Array, *, slopes: bool) -> Scores:
        return scores(h, engine.gather(value, call.layout), targets, chunk, slopes=slopes)

    @jax.custom_vjp
    def scored(value: Any, rest: Any, integers: Any, h: jax.Array, t: jax.Array) -> jax.Array:
        del rest, integers
        return score(value, h, t, slopes=False).nll

    def forward(value: Any, rest: Any, integers: Any, h: jax.Array, t: jax.Array) -> Any:
        tables = rest[1]
        found = score(value, h, t, slopes=True)
        state = None if tables is None else tables.state
        return found.nll, (value, state, integers, h, t, found.normaliser, found.slope)

    def backward(residuals: Any, cotangent: jax.Array) -> Any:
        value, state, integers, h, t, normaliser, slope = residuals
        dh = hidden_gradient(slope, t, cotangent)
        mine = Ticket(h, t.astype(jnp.float32), normaliser, cotangent)
        if ticket is not None:
            fitted = jax.tree.map(_fit, mine, ticket)
            return None, (None, None, fitted), None, dh, None
        mapped = (None, None, mine)
        update, tap, tables = over_objectives(call.resolve, engine.topology)(
            mapped, value, state, integers
        )
        return update, (tap, tables, None), None, dh, None

    scored.defvjp(forward, backward)
    rows, tap = (None, None) if ticket is not None else (call.rows(), table.tap)
    integers = (call.integers, engine.dynamic)
    return scored(table.value, (tap, rows, ticket), integers, h, targets)


def logits_at_once() -> int:
    """How many logits of one objective's forward pass should exist at one time.

    On a GPU all objectives of a device share 512 MiB: products are large enough to be fast there,
    and the memory is the same for any number of objectives. Elsewhere each has 128 MiB.
    """
    engine = current()
    if isinstance(engine, Backward) and engine.topology.platform == "gpu":
        return 2**27 // engine.topology.local_objectives
    return 2**25


def _sliced(engine: Any, table: Parameter) -> bool:
    """Whether a table is trained, and cut so that every device has its share of each slice."""
    layout: Layout = engine.layouts[table.leaf]
    return layout.labels is not None and len(layout.shape) == 2 and layout.axis in (None, 1)


def _name(engine: Any, table: Any, name: str) -> str | None:
    return name if isinstance(table, Parameter) and _sliced(engine, table) else None


def _fit(x: jax.Array, like: jax.Array) -> jax.Array:
    """Cut or fill up the axis of positions; what is cut holds no targets."""
    x = x[:, : like.shape[1]]
    fill = [(0, 0), (0, like.shape[1] - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, fill).astype(like.dtype)


class _Call:
    """A call that resolves a table, as if its slices were layers of a stack."""

    def __init__(self, engine: Backward, table: Parameter) -> None:
        self.engine, self.table = engine, table
        self.layout = engine.layouts[table.leaf]
        rows, size = self.layout.shape
        self.tapped = table.leaf in engine.tapped
        labels = self.layout.labels
        # A tapped table's slices are of no consequence but for memory.
        self.slices = _default_slices(rows) if self.tapped else labels.shape[1]
        self.stack = dataclasses.replace(
            self.layout,
            shape=(rows // self.slices, size),
            layers=self.slices,
            labels=None if self.tapped else labels.reshape(-1, 1),
        )
        self.resolves = not self.tapped and engine.rules.groups is not None
        self.blocks = self._blocks(jnp.arange(self.slices)) if self.resolves else None
        self.integers = None if self.blocks is None else self.blocks.integers

    def _blocks(self, slice_number: jax.Array) -> CallBlocks:
        uses = [(self.table.leaf, slice_number)]
        stack = {self.table.leaf: self.stack}
        return CallBlocks.of(stack, self.engine.rules, uses, self.engine.topology.objectives)

    def rows(self) -> Tables | None:
        """The tables' rows of all slices, [slices, 1, ...]."""
        return None if self.blocks is None else self.blocks.rows(self.engine.tables)

    def resolve(self, mapped: Any, value: jax.Array, state: Any, integers: Any) -> Any:
        """Form the gradients [K / L, ...] slice by slice and resolve each.

        Args:
          mapped: (tokens [K / L, B, S], cotangents of their vectors, ticket's cotangents), or None
            for what does not occur.
          value: this device's piece of the table.
          state: aggregators' states of all slices.
          integers: see :class:`~jaxmoo.engine.tables.CallBlocks`, for all slices; and the
            engine's ``dynamic``.

        Returns:
          (update of the piece, cotangent of the tap, new rows).
        """
        engine, layout = self.engine, self.layout
        scores = mapped[2]
        blocks, dynamic = integers
        count = engine.topology.local_objectives
        height = self.stack.shape[0]

        def one(place: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
            number, state, ints = xs
            first = number * height
            piece = jax.lax.dynamic_slice_in_dim(value, first, height, 0)
            table = None if scores is None else engine.gather(piece, layout)

            def of_objective(i: jax.Array, place: jax.Array) -> jax.Array:
                tokens, vectors, scores = jax.tree.map(lambda x: x[i], mapped)
                total = jnp.zeros(self.stack.shape, jnp.float32)
                if scores is not None:
                    total = _from_scores(scores, table, first, engine.topology.platform)
                if tokens is not None:
                    total = _add_lookup(total, tokens, vectors, first)
                return place.at[i].set(total.astype(place.dtype))

            # One objective after the other, so that a sum over all its positions is formed in one
            # place that is as small as one slice.
            place = jax.lax.fori_loop(0, count, of_objective, place)
            gradients = engine.scatter(place, layout.axis)
            if not self.resolves:
                return place, (gradients if self.tapped else gradients[0], None)
            _, labels, numbers, member = ints
            section = sections_of_piece(
                gradients[:, None],
                self.stack,
                self.table.leaf,
                labels[0][None],
                number[None],
                engine.topology,
            )
            call = self._blocks(number)
            resolved = engine.resolve([section], call, numbers, member, state, dynamic)
            update = resolved.updates[0].reshape(gradients.shape[1:])
            return place, (update, call.new_rows(resolved, member))

        # The place of the local gradients is handed on, so that it is not cleared for every slice.
        empty = jnp.zeros((count, *self.stack.shape), layout.gathered_dtype)
        _, (pieces, rows) = jax.lax.scan(one, empty, (jnp.arange(self.slices), state, blocks))
        if self.tapped:  # [slices, K, rows, size] -> [K, V, size]
            tap = jnp.moveaxis(pieces, 0, 1).reshape(pieces.shape[1], *value.shape)
            return None, tap, rows
        return pieces.reshape(value.shape).astype(value.dtype), None, rows


def _default_slices(rows: int) -> int:
    return next((n for n in range(8, 65) if rows % n == 0), 1)


def _add_lookup(
    total: jax.Array, tokens: jax.Array, vectors: jax.Array, first: jax.Array
) -> jax.Array:
    """Add vectors' cotangents [B, S, D] to the rows [height, D] of their tokens, in one slice."""
    height, size = total.shape
    row = tokens.reshape(-1) - first
    row = jnp.where((row >= 0) & (row < height), row, height)
    return total.at[row].add(vectors.reshape(-1, size).astype(total.dtype), mode="drop")


def _from_scores(ticket: Ticket, table: jax.Array, first: jax.Array, platform: str) -> jax.Array:
    """Gradient of one objective's scores with respect to one slice of the table."""
    rows, length = ticket.targets.shape
    most = _MOST_LOGITS.get(platform, _MOST_LOGITS["cpu"])
    chunks = -(-length * rows * table.shape[0] // most)
    chunk = -(-length // chunks)  # all of about the same size
    fill = -length % chunk
    h = jnp.pad(ticket.h, ((0, 0), (0, fill), (0, 0)))
    targets = jnp.pad(ticket.targets.astype(jnp.int32), ((0, 0), (0, fill)), constant_values=-1)
    normaliser, ct = (jnp.pad(x, ((0, 0), (0, fill))) for x in ticket[2:])
    skip = platform != "gpu"
    return table_gradient(h, table, targets, normaliser, ct, chunk, first, skip=skip)
