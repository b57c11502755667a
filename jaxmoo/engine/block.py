"""``block``: mark the calls whose parameters form blocks."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxmoo.engine.backward import GATHERED
from jaxmoo.engine.parameter import Parameter
from jaxmoo.errors import ConfigError, did_you_mean

__all__ = ["REMAT", "block", "current", "running"]

_current: contextvars.ContextVar[Any] = contextvars.ContextVar("jaxmoo_engine", default=None)


def _all_but_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Checkpoint policy: keep everything except gathered parameters."""
    return primitive.name != "all_gather" and GATHERED not in str(parameters.get("name", ""))


# What the backward pass of a block recomputes: everything; all but matrix products with
# parameters; nothing but the gathering of parameters.
REMAT: dict[str, Any] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
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
        yield
    finally:
        _current.reset(token)


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
      function: ``function(params, *args)``, where ``params`` is a pytree of parameters; or a Flax
        NNX module, which then is called as ``block(module)(*args)``. It must not read other
        parameters.
      remat: what the backward pass computes again: "full" keeps only the arguments, "dots" also
        products with parameters, "none" everything except the gathered parameters.

    Returns:
      The marked function.

    Raises:
      ConfigError: ``remat`` is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = block(lambda params, x: jnp.tanh(x @ params["w"]))
      >>> layer({"w": jnp.eye(2)}, jnp.zeros((1, 2))).tolist()
      [[0.0, 0.0]]
    """
    check_remat(remat)
    if isinstance(function, nnx.Module):
        graph, params = nnx.split(function)

        def apply(params: Any, *args: Any) -> Any:
            return nnx.merge(graph, params)(*args)

        return lambda *args: block(apply, remat=remat)(params, *args)

    def call(params: Any, *args: Any) -> Any:
        engine = current()
        # In a scan the compiler cannot merge the recomputation with the forward pass, so the
        # barrier against that (prevent_cse) would only cost time.
        barrier = not _scanned(params)
        leaves, tree = jax.tree.flatten(params)
        # The number of a layer that was taken from its stack by indexing stays a certain number.
        certain = {i: x for i, x in enumerate(leaves) if isinstance(x, np.integer)}
        params = [None if i in certain else x for i, x in enumerate(leaves)]

        def run(leaves: list[Any], *args: Any) -> Any:
            leaves = [certain.get(i, x) for i, x in enumerate(leaves)]
            return function(_whole(engine, jax.tree.unflatten(tree, leaves)), *args)

        if remat == "none" and engine is None:
            return run(params, *args)
        return jax.checkpoint(run, policy=REMAT[remat], prevent_cse=barrier)(params, *args)

    return call


def _scanned(params: Any) -> bool:
    """Whether parameters are slices of a stack that is being scanned over."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Parameter))
    return any(isinstance(x, Parameter) and isinstance(x.layer, jax.core.Tracer) for x in leaves)


def _whole(engine: Any, params: Any) -> Any:
    """Replace every parameter by its whole array."""
    if engine is None:
        return params
    leaves, tree = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, Parameter))
    at = [i for i, leaf in enumerate(leaves) if engine.reads(leaf)]
    for i, array in zip(at, engine.use([leaves[i] for i in at]), strict=True):
        leaves[i] = array
    return jax.tree.unflatten(tree, leaves)
