"""``block``: mark the calls whose parameters form blocks."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.core import Tracer

from jaxmoo.engine.backward import GATHERED
from jaxmoo.engine.one_at_a_time import call_one_at_a_time, can_be_taken_apart
from jaxmoo.engine.parameter import Parameter
from jaxmoo.errors import ConfigError, did_you_mean

__all__ = ["REMAT", "block", "current", "running", "sum_over_examples"]

_current: contextvars.ContextVar[Any] = contextvars.ContextVar("jaxmoo_engine", default=None)
# JAX keeps what it has traced, under jit, checkpoint or scan, by the function and the shapes of its
# arguments; what an engine makes of a call is part of it too. Every trace has a number of its own.
_traced_for = jax.make_user_context(None)
_traces = itertools.count(1)


def _all_but_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Checkpoint policy: keep everything except gathered parameters."""
    return primitive.name != "all_gather" and GATHERED not in str(parameters.get("name", ""))


def _attention_kernel(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Checkpoint policy: keep what JAX's own attention kernel gives."""
    del parameters
    return primitive.name.startswith("dot_product_attention_fwd")


# What the backward pass of a block recomputes: everything; all but matrix products with
# parameters and attention, where that is one kernel of JAX's; nothing but the gathering of
# parameters.
REMAT: dict[str, Any] = {
    "full": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _attention_kernel
    ),
    "none": _all_but_gathered,
}


def current() -> Any:
    """Return the engine that is tracing the loss function, or None."""
    return _current.get()


@contextlib.contextmanager
def running(engine: Any) -> Iterator[None]:
    """Make an engine the current one while it traces a loss function."""
    token = _current.set(engine)
    try:
        with _traced_for(next(_traces)):
            yield
    finally:
        _current.reset(token)


def sum_over_examples(tree: Any) -> Any:
    """Add up what follows from an objective's examples over the devices that hold some of them.

    For losses that are no sum over examples. It has no derivative.

    Args:
      tree: pytree of arrays, within the loss function of :func:`jaxmoo.resolved_value_and_grad`.

    Returns:
      The same of all of the objective's examples in a microbatch; elsewhere, the tree as it is.
    """
    engine, tree = current(), jax.lax.stop_gradient(tree)
    return tree if engine is None else engine.over_examples(tree)


def check_remat(remat: str) -> str:
    """Return a known name of :data:`REMAT`.

    Raises:
      ConfigError: it is not known.
    """
    if remat not in REMAT:
        raise ConfigError(
            f"remat must be one of {', '.join(REMAT)}, got {remat!r}.{did_you_mean(remat, REMAT)}"
        )
    return remat


def block(function: Callable[..., Any] | nnx.Module, *, remat: str = "full") -> Callable[..., Any]:
    """Mark a call as one whose parameters are gathered, and whose conflicts are resolved, together.

    Within :func:`jaxmoo.resolved_value_and_grad` the parameters of the call are gathered from all
    devices just before it, and in the backward pass every objective's gradients of these
    parameters are formed, resolved block by block, and dropped, before the next call's. Anywhere
    else the marked function computes what the function computes.

    Args:
      function: ``function(params, *args, **kwargs)``, where ``params`` is a pytree of parameters;
        or a Flax NNX module, which then is called as ``block(module)(*args, **kwargs)`` and keeps
        what the call changes: statistics of a norm, counters of a dropout. Arguments that are no
        arrays, such as flags, stay as they are.
      remat: what the backward pass computes again: "full" keeps only the arguments, "dots" also
        products with parameters and what cuDNN's attention gives, "none" everything except the
        gathered parameters.

    Returns:
      The marked function.

    Raises:
      ConfigError: ``remat`` is unknown; or, when it is called, a module changes its parameters or
        makes new variables.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = block(lambda params, x: jnp.tanh(x @ params["w"]))
      >>> layer({"w": jnp.eye(2)}, jnp.zeros((1, 2))).tolist()
      [[0.0, 0.0]]
    """
    check_remat(remat)
    if isinstance(function, nnx.Module):
        return functools.partial(_call_module, function, remat)

    def call(params: Any, *args: Any, **kwargs: Any) -> Any:
        engine = current()
        if can_be_taken_apart(engine, _parameters(params)):
            return _one_at_a_time(engine, function, params, args, kwargs)
        # In a scan the compiler cannot merge the recomputation with the forward pass, so the
        # barrier against that (prevent_cse) would only cost time.
        barrier = not _scanned(params)
        # The number of a layer that was taken from its stack by indexing stays a certain number.
        leaves, tree, certain = _split(params, lambda x: not isinstance(x, np.integer))
        given, form, fixed = _split((args, kwargs), lambda x: isinstance(x, jax.Array | np.ndarray))

        def run(leaves: list[Any], given: list[Any]) -> Any:
            args, kwargs = _join(given, form, fixed)
            return function(_whole(engine, _join(leaves, tree, certain)), *args, **kwargs)

        if remat == "none" and engine is None:
            return run(leaves, given)
        return jax.checkpoint(run, policy=REMAT[remat], prevent_cse=barrier)(leaves, given)

    return call


def _one_at_a_time(
    engine: Any, function: Callable[..., Any], params: Any, args: Any, kwargs: Any
) -> Any:
    """Call a function such that no two objectives' gradients exist."""
    leaves, tree = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, Parameter))
    at = [i for i, x in enumerate(leaves) if isinstance(x, Parameter)]
    others = [None if i in at else x for i, x in enumerate(leaves)]
    given, form, fixed = _split(
        (others, args, kwargs), lambda x: isinstance(x, jax.Array | np.ndarray)
    )

    def run(wholes: list[Any], arrays: list[Any]) -> Any:
        mine = iter(arrays)
        full = [None if i in fixed else next(mine) for i in range(len(given))]
        others, args, kwargs = _join(full, form, fixed)
        for i, x in zip(at, wholes, strict=True):
            others[i] = x
        return function(jax.tree.unflatten(tree, others), *args, **kwargs)

    arrays = [x for i, x in enumerate(given) if i not in fixed]
    barrier = not _scanned(params)
    return call_one_at_a_time(engine, run, _parameters(params), arrays, barrier=barrier)


def _split(tree: Any, traced: Callable[[Any], bool]) -> tuple[list[Any], Any, dict[int, Any]]:
    """Take a tree apart into leaves to be traced, its structure, and the other leaves by number."""
    leaves, structure = jax.tree.flatten(tree)
    others = {i: x for i, x in enumerate(leaves) if not traced(x)}
    return [None if i in others else x for i, x in enumerate(leaves)], structure, others


def _join(leaves: list[Any], structure: Any, others: dict[int, Any]) -> Any:
    """Put together what :func:`_split` took apart."""
    leaves = [others.get(i, x) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, leaves)


def _call_module(module: nnx.Module, remat: str, /, *args: Any, **kwargs: Any) -> Any:
    """Call a module as a block, and give it the new values of the variables that changed."""
    graph, state = nnx.split(module)
    paths: list[Any] = []  # of those variables: known once the call is traced

    def apply(state: nnx.State, *args: Any, **kwargs: Any) -> Any:
        before = _values(state)
        inner = nnx.merge(graph, state)
        result = inner(*args, **kwargs)
        after = _values(nnx.state(inner))
        changed = {path: x for path, x in after.items() if x is not before.get(path)}
        for path in changed:
            _check_change(module, path, after=nnx.state(inner), before=before)
        paths[:] = changed
        return result, list(changed.values())

    result, values = block(apply, remat=remat)(state, *args, **kwargs)
    if paths:
        variables = dict(nnx.to_flat_state(state))
        nnx.update(
            module,
            nnx.from_flat_state(
                [(p, variables[p].replace(v)) for p, v in zip(paths, values, strict=True)]
            ),
        )
    return result


def _values(state: nnx.State) -> dict[Any, Any]:
    return {path: variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _check_change(module: nnx.Module, path: Any, *, after: nnx.State, before: Any) -> None:
    """Refuse changes that a block cannot keep."""
    name = f"{type(module).__name__}.{'.'.join(map(str, path))}"
    if path not in before:
        raise ConfigError(
            f"block({type(module).__name__}): the call makes the new variable {name!r}. Make it "
            "beforehand, or call the module through jaxmoo.block(function)(params, ...) and return "
            "what you need of it."
        )
    if isinstance(dict(nnx.to_flat_state(after))[path], nnx.Param):
        raise ConfigError(
            f"block({type(module).__name__}): the call changes its parameter {name!r}. Keep what a "
            "call changes in a variable of another type than nnx.Param, such as nnx.BatchStat."
        )


def _scanned(params: Any) -> bool:
    """Whether parameters are slices of a stack that is being scanned over."""
    return any(isinstance(x.layer, Tracer) for x in _parameters(params))


def _parameters(params: Any) -> list[Parameter]:
    """The engine's parameters among a call's."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Parameter))
    return [x for x in leaves if isinstance(x, Parameter)]


def _whole(engine: Any, params: Any) -> Any:
    """Replace every parameter by its whole array."""
    if engine is None:
        return params
    leaves, tree = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, Parameter))
    at = [i for i, leaf in enumerate(leaves) if engine.reads(leaf)]
    for i, array in zip(at, engine.use([leaves[i] for i in at]), strict=True):
        leaves[i] = array
    return jax.tree.unflatten(tree, leaves)
