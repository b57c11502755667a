"""Per-objective gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoo.blocks import path_string
from jaxmoo.errors import DataError

__all__ = ["num_objectives", "stacked_value_and_grad", "watched"]


def stacked_value_and_grad(
    loss_fn: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """Make a function that returns every objective's loss and gradient.

    The parameters are shared and the batch is mapped over its leading axis, so that matrix
    products of the forward pass stay ordinary. The gradients take K times the memory of the
    parameters. An objective whose loss is not finite has a gradient of NaN, whatever its derivative
    is, so that :func:`jaxmoo.resolve_conflicts` leaves it out and counts it.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``, or ``(scalar, aux)``, of one objective.
      has_aux: whether ``loss_fn`` returns auxiliary data.

    Returns:
      A function ``(params, batch) -> (losses [K], gradients)``, where every array of ``batch``
      has a leading axis of K objectives and so has every array of the gradients. With ``has_aux``
      it returns ``((losses, aux), gradients)``.

    Raises:
      DataError: the arrays of the batch have no common leading axis.

    Example:
      >>> import jax.numpy as jnp
      >>> def loss(w, batch):
      ...     return jnp.mean((batch["x"] * w - batch["y"]) ** 2)
      >>> batch = {"x": jnp.ones((2, 3)), "y": jnp.array([[1.0] * 3, [-1.0] * 3])}
      >>> losses, gradients = stacked_value_and_grad(loss)(jnp.array(0.5), batch)
      >>> losses.tolist(), gradients.tolist()
      ([0.25, 2.25], [-1.0, 3.0])
    """

    def loss(params: Any, batch: Any) -> Any:
        found = loss_fn(params, batch)
        # A tuple where none belongs is for JAX to refuse.
        return (watched(found[0]), *found[1:]) if has_aux else jax.tree.map(watched, found)

    mapped = jax.vmap(jax.value_and_grad(loss, has_aux=has_aux), in_axes=(None, 0))

    def stacked(params: Any, batch: Any) -> tuple[Any, Any]:
        num_objectives(batch)
        return mapped(params, batch)

    return stacked


@jax.custom_jvp
def watched(loss: jax.Array) -> jax.Array:
    """Return a loss as it is, with a derivative of NaN where it is not finite.

    Example:
      >>> jax.value_and_grad(lambda x: watched(x - jnp.inf))(1.0)
      (Array(-inf, dtype=float32, weak_type=True), Array(nan, dtype=float32, weak_type=True))
    """
    return loss


@watched.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (loss,), (tangent,) = primals, tangents
    return loss, tangent * jnp.where(jnp.isfinite(loss), 1, jnp.nan).astype(tangent.dtype)


def num_objectives(batch: Any) -> int:
    """Return K, the length of the axis that every array of a batch starts with.

    Raises:
      DataError: an array has no axis, or the lengths disagree.
    """
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    lengths = {path_string(path): (x.shape[0] if x.ndim else None) for path, x in leaves}
    if not lengths:
        raise DataError("The batch holds no arrays; expected arrays with an objective axis first.")
    if len(set(lengths.values())) > 1 or None in lengths.values():
        found = ", ".join(
            f"{name or 'batch'}: {'no axis' if n is None else n}" for name, n in lengths.items()
        )
        raise DataError(
            "Every array of a batch must start with the same objective axis [K, ...]; found "
            f"lengths {found}."
        )
    return jnp.shape(leaves[0][1])[0]
