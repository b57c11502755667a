"""``resolve_conflicts``: block-wise multi-objective gradients as an optax transformation."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxmoo import aggregators
from jaxmoo.aggregators import Aggregator
from jaxmoo.block_solve import Group
from jaxmoo.blocks import Blocks, Partition, partition, path_string
from jaxmoo.blocks import get as get_blocks
from jaxmoo.errors import ConfigError
from jaxmoo.resolve import group_blocks, resolve
from jaxmoo.resolver_state import new_state, next_state, normalised, step_key
from jaxmoo.sketched import check_sketchable, sketch_size

__all__ = ["freeze", "resolve_conflicts"]


def resolve_conflicts(
    aggregator: str | Aggregator | Mapping[str, str | Aggregator] = "cagrad",
    blocks: str | Blocks | Callable[[str], Hashable] = "layer",
    *,
    stacked: str | None = None,
    num_objectives: int | None = None,
    preference: Sequence[float] | jax.Array | None = None,
    match_norm: bool = False,
    nonfinite: Literal["skip", "raise"] = "skip",
    gram: str = "exact",
    seed: int = 0,
    mesh: Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Resolve conflicts between per-objective gradients, block by block.

    Takes updates whose every array carries a leading objective axis ``[K, ...]`` (see
    :func:`jaxmoo.stacked_value_and_grad`) and returns updates shaped like the parameters. Place
    it first in an ``optax.chain``. All blocks' Gram matrices are solved as one batch, and each
    array is combined once. Small arrays are joined to form Gram matrices, up to 4 MB at a time;
    large ones are not copied.

    ``update`` takes two optional extra arguments. ``active``: bool [K], False for objectives that
    are absent from this step; without it, objectives whose gradient is zero everywhere are. An
    absent objective, or one whose gradient in a block is not finite, has no part in the solve.
    ``second``: updates of an independent second batch, for the aggregators that need one (sdmgrad
    and modo).

    Args:
      aggregator: a name, an :class:`~jaxmoo.aggregators.Aggregator`, or a mapping from regular
        expressions over block names to either; the first that matches (``re.search``) is used.
      blocks: how parameters are cut into blocks; see :func:`jaxmoo.blocks.get`.
      stacked: which arrays stack the layers of a scanned model; see
        :func:`jaxmoo.blocks.partition`.
      num_objectives: K. Needed by aggregators that keep state, and for the state to hold each
        block's Gram matrix and weights.
      preference: how much each objective matters [K]; normalised to sum 1. Equal by default. It
        may be traced, and so follow a schedule (``optax.inject_hyperparams``).
      match_norm: rescale every block's result to the norm of its mean gradient, so that methods
        and block sizes can be compared at equal step lengths. A block that is stationary to
        within rounding is left as it is.
      nonfinite: ``"skip"`` leaves a non-finite objective out of its block and counts it;
        ``"raise"`` stops the program.
      gram: ``"exact"``, or ``"sketch:N"`` to estimate each block's Gram matrix from random sketches
        of N numbers per objective, fresh at every step. The combination stays exact. Of many
        objectives that takes less work, but arrays that lie on several devices are gathered: there
        it is a feature of :func:`jaxmoo.resolved_value_and_grad`.
      seed: seed of aggregators that draw random numbers, and of sketches.
      mesh: the devices that the gradients lie on; by default all of JAX's.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state
      :class:`~jaxmoo.ResolveConflictsState`; where optax has it, of its subclass
      ``optax.experimental.aggregating.Aggregator``, for transformations ``[K, *params] ->
      [*params]``.

    Raises:
      ConfigError: an option is unknown or contradicts another; a pattern matches no block; or, on
        update, the updates carry no objective axis, ``active`` or ``preference`` has not one entry
        per objective, or the state is of other blocks.

    References:
      Hoang et al., *Multilingual Fine-Tuning via Localized Gradient Conflict Resolution*,
      `arXiv:2606.05613 <https://arxiv.org/abs/2606.05613>`_.

    Example:
      >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
      >>> tx = optax.chain(resolve_conflicts("mgda", blocks="leaf"), optax.sgd(1.0))
      >>> state = tx.init(params)
      >>> updates = {"w": jnp.array([[2.0, 0.0], [0.0, 2.0]]), "b": jnp.array([[1.0], [-1.0]])}
      >>> updates, state = jax.jit(tx.update)(updates, state, params)
      >>> [[round(float(x), 4) + 0.0 for x in updates[name]] for name in ("w", "b")]
      [[-1.0, -1.0], [0.0]]
      >>> optax.tree.get(state, "conflict").tolist()
      [1.0, 0.0]
    """
    rule = get_blocks(blocks)
    _check_options(num_objectives, match_norm, nonfinite)
    if isinstance(aggregator, Mapping):
        choices: Any = {pattern: aggregators.get(a) for pattern, a in aggregator.items()}
        chosen = list(choices.values())
    else:
        choices = aggregators.get(aggregator)
        chosen = [choices]
    for each in chosen:
        if num_objectives is None and jax.tree.leaves(each.init(2)):
            raise ConfigError(
                f"{each.name} keeps state per objective: pass num_objectives=K, the length of "
                "the objective axis."
            )
    sketch = sketch_size(gram)
    if sketch is not None:
        check_sketchable(chosen)
    share = None if preference is None else normalised(preference, num_objectives)

    def cut(tree: Any) -> tuple[Partition, tuple[Group, ...]]:
        # Of a tree without arrays, such as a part of one that is masked as a whole.
        part = Partition((), (), (), (), ())
        if jax.tree.leaves(tree):
            part = partition(rule, tree, stacked=stacked)
        return part, group_blocks(part, choices)

    def init(params: Any) -> Any:  # a ResolveConflictsState
        part, groups = cut(params)
        return new_state(len(part), groups, num_objectives, seed, sketched=sketch is not None)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        active: jax.Array | None = None,
        second: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del extra_args
        leaves, treedef = jax.tree.flatten(updates)
        idle = state._replace(step=optax.safe_increment(state.step))
        if not leaves:
            return updates, idle
        k = _check_objective_axis(updates, params, num_objectives)
        if second is not None and jax.tree.map(jnp.shape, second) != jax.tree.map(
            jnp.shape, updates
        ):
            raise ConfigError("second: expected arrays shaped like the updates.")
        if active is not None:
            active = jnp.asarray(active, bool)
        for name, given in (("active", active), ("preference", share)):
            if given is not None and given.shape != (k,):
                raise ConfigError(
                    f"{name}: expected one entry for each of the {k} objectives, found shape "
                    f"{list(given.shape)}."
                )
        part, groups = cut(_like_parameters(updates, params))
        if len(part) != len(state.conflict):
            raise ConfigError(
                f"The state is of {len(state.conflict)} blocks, the updates make {len(part)}. Give "
                "update the parameters that init had: how large an array is depends on its type."
            )
        if not any(x.size for x in leaves):
            return jax.tree.map(lambda x: x.reshape(x.shape[1:]), updates), idle
        resolved = resolve(
            part,
            groups,
            leaves,
            state=state.aggregator,
            key=step_key(state),
            active=active,
            preference=share,
            match_norm=match_norm,
            second=None if second is None else jax.tree.leaves(second),
            partitioned=None if mesh is None else mesh.size > 1,
            sketch=sketch,
        )
        after = next_state(
            state,
            aggregator=resolved.state,
            gram=resolved.gram,
            weights=resolved.weights,
            update_norm=resolved.update_norm,
            mean_norm=resolved.mean_norm,
            nonfinite=resolved.nonfinite,
            gram_error=resolved.gram_error,
            stop=nonfinite == "raise",
        )
        return jax.tree.unflatten(treedef, resolved.updates), after

    return _aggregator(init, update)


def freeze() -> optax.GradientTransformationExtraArgs:
    """Leave parameters as they are: zero updates, without the objective axis of the gradients.

    For the parts of an ``optax.partition`` that are not trained. ``optax.set_to_zero`` gives zeros
    shaped like what it gets: of per-objective gradients ``[K, ...]``, which
    ``optax.apply_updates`` would then add to the parameters as if they were K models.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` without state.

    Example:
      >>> params = {"trunk": jnp.zeros(2), "embedding": jnp.ones(3)}
      >>> tx = optax.partition(
      ...     {"train": resolve_conflicts("mgda"), "frozen": freeze()},
      ...     {"trunk": "train", "embedding": "frozen"},
      ... )
      >>> gradients = jax.tree.map(lambda p: jnp.ones((4, *p.shape)), params)
      >>> updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
      >>> jax.tree.map(jnp.shape, updates)
      {'embedding': (3,), 'trunk': (2,)}
    """

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del params, extra_args
        return jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), updates), state

    return _aggregator(optax.init_empty_state, update)


def _aggregator(init: Any, update: Any) -> optax.GradientTransformationExtraArgs:
    """A transformation ``[K, *params] -> [*params]``, of the type that optax has for these."""
    aggregating = getattr(getattr(optax, "experimental", None), "aggregating", None)
    plain = optax.GradientTransformationExtraArgs
    return getattr(aggregating, "Aggregator", plain)(init, update)


def _check_options(num_objectives: Any, match_norm: Any, nonfinite: Any) -> None:
    """Check options that must be known when a program is compiled."""
    if nonfinite not in ("skip", "raise"):
        raise ConfigError(f"nonfinite: expected 'skip' or 'raise', found {nonfinite!r}.")
    static = "With optax.inject_hyperparams, name it in static_args."
    if not isinstance(match_norm, bool):
        raise ConfigError(f"match_norm: expected True or False, found {match_norm!r}. {static}")
    if num_objectives is None:
        return
    try:
        whole = operator.index(num_objectives)
    except (TypeError, jax.errors.TracerIntegerConversionError):
        whole = 0
    if whole < 1:
        raise ConfigError(
            f"num_objectives: expected an integer, at least 1, found {num_objectives!r}. {static}"
        )


def _like_parameters(updates: Any, params: Any) -> Any:
    """Shapes of the updates without their objective axis, in the parameters' types if known."""

    def like(x: jax.Array, p: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape[1:], p.dtype)

    return jax.tree.map(like, updates, params if _known(params, updates) else updates)


def _known(params: Any, updates: Any) -> bool:
    """Whether parameters were given that are those of the updates."""
    return params is not None and jax.tree.structure(params) == jax.tree.structure(updates)


def _check_objective_axis(updates: Any, params: Any, expected: int | None) -> int:
    """Return K, after checking that every array of the updates starts with the same axis."""
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    shapes = (
        [x.shape for x in jax.tree.leaves(params)]
        if _known(params, updates)
        else [None] * len(leaves)
    )
    hint = "Take per-objective gradients with jaxmoo.stacked_value_and_grad."
    lengths: dict[int, str] = {}
    for (path, x), shape in zip(leaves, shapes, strict=True):
        name = path_string(path)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ConfigError(f"Update {name!r}: expected floating point, found {x.dtype}.")
        if x.ndim == 0 or (shape is not None and x.shape[1:] != shape):
            wanted = "[K, ...]" if shape is None else f"[K, {', '.join(map(str, shape))}]"
            raise ConfigError(
                f"Update {name!r} carries no objective axis: expected shape {wanted}, found "
                f"{list(x.shape)}. {hint}"
            )
        lengths.setdefault(x.shape[0], name)
    if len(lengths) > 1:
        found = ", ".join(f"{k} in {name!r}" for k, name in lengths.items())
        raise ConfigError(f"Objective axes disagree: found lengths {found}. {hint}")
    k = next(iter(lengths))
    if k == 0:
        raise ConfigError(f"The updates hold no objectives: their first axis has length 0. {hint}")
    if expected is not None and k != expected:
        raise ConfigError(f"num_objectives={expected}, but the updates hold {k} objectives.")
    return k
