"""Per-objective gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Literal, TypeAlias, TypeVar, overload

import jax
import jax.numpy as jnp

from jaxmoo.blocks import path_string
from jaxmoo.errors import ConfigError, DataError

__all__ = ["num_objectives", "stacked_value_and_grad", "watched"]

Params = TypeVar("Params")
Loss: TypeAlias = Callable[Concatenate[Params, ...], Any]


@overload
def stacked_value_and_grad(
    loss_fn: Loss[Params] | Sequence[Loss[Params]],
    *,
    has_aux: Literal[False] = False,
    in_axes: int | Sequence[int | None] | None = None,
) -> Callable[..., tuple[jax.Array, Params]]: ...


@overload
def stacked_value_and_grad(
    loss_fn: Loss[Params] | Sequence[Loss[Params]],
    *,
    has_aux: Literal[True],
    in_axes: int | Sequence[int | None] | None = None,
) -> Callable[..., tuple[tuple[jax.Array, Any], Params]]: ...


def stacked_value_and_grad(
    loss_fn: Loss[Params] | Sequence[Loss[Params]],
    *,
    has_aux: bool = False,
    in_axes: int | Sequence[int | None] | None = None,
) -> Callable[..., tuple[Any, Params]]:
    """Make a function that returns every objective's loss and gradient.

    The parameters are shared and the batch is mapped over its leading axis, so that matrix
    products of the forward pass stay ordinary. The gradients take K times the memory of the
    parameters. An objective whose loss is not finite has a gradient of NaN, whatever its derivative
    is, so that :func:`jaxmoo.resolve_conflicts` leaves it out and counts it.

    Args:
      loss_fn: ``loss_fn(params, batch, *args, **kwargs) -> scalar``, or ``(scalar, aux)``, of one
        objective. Or a sequence of K such functions, one per objective; each gets all arguments as
        they are, ``batch`` included.
      has_aux: whether ``loss_fn`` returns auxiliary data.
      in_axes: of the further positional arguments, as in ``jax.vmap``: 0 for one that has a value
        per objective along its first axis, such as K keys; None for one that all share, which may
        be of any type. One for all of them, or one for each. Not for a sequence of losses.

    Returns:
      A function ``(params, batch, *args, **kwargs) -> (losses [K], gradients)``, where every array
      of ``batch`` has a leading axis of K objectives and so has every array of the gradients.
      Keyword arguments are shared. With ``has_aux`` it returns ``((losses, aux), gradients)``; aux
      has a leading axis of K too, or is a list of K for a sequence of losses.

    Raises:
      ConfigError: the sequence of losses is empty, or ``in_axes`` is not one per argument.
      DataError: the arrays of the batch have no common leading axis.

    Example:
      >>> import jax.numpy as jnp
      >>> def loss(w, batch):
      ...     return jnp.mean((batch["x"] * w - batch["y"]) ** 2)
      >>> batch = {"x": jnp.ones((2, 3)), "y": jnp.array([[1.0] * 3, [-1.0] * 3])}
      >>> losses, gradients = stacked_value_and_grad(loss)(jnp.array(0.5), batch)
      >>> losses.tolist(), gradients.tolist()
      ([0.25, 2.25], [-1.0, 3.0])
      >>> two = [lambda w, x: w * x, lambda w, x: w**2]
      >>> losses, gradients = stacked_value_and_grad(two)(jnp.array(3.0), 5.0)
      >>> losses.tolist(), gradients.tolist()
      ([15.0, 9.0], [5.0, 6.0])
    """
    if not callable(loss_fn):
        return _of_each(list(loss_fn), has_aux)
    if in_axes is not None and not isinstance(in_axes, int):
        in_axes = tuple(in_axes)

    def stacked(params: Any, batch: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        num_objectives(batch)
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        if len(axes) != len(args):
            raise ConfigError(
                f"in_axes: expected one for each of the {len(args)} arguments after the batch, "
                f"found {len(axes)}."
            )
        mapped = [x for x, axis in zip(args, axes, strict=True) if axis is not None]

        def loss(params: Any, batch: Any, mine: Sequence[Any]) -> Any:
            given = iter(mine)
            each = (x if axis is None else next(given) for x, axis in zip(args, axes, strict=True))
            return _watched(loss_fn(params, batch, *each, **kwargs), has_aux)

        along = [axis for axis in axes if axis is not None]
        function = jax.value_and_grad(loss, has_aux=has_aux)
        return jax.vmap(function, in_axes=(None, 0, along))(params, batch, mapped)

    return stacked


def _of_each(functions: Sequence[Callable[..., Any]], has_aux: bool) -> Callable[..., Any]:
    """Losses and gradients of objectives that are functions of their own."""
    if not functions:
        raise ConfigError("loss_fn: expected a function, or one per objective; found none.")

    def stacked(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        losses, extras, gradients = [], [], []
        for function in functions:

            def loss(params: Any, function: Any = function) -> Any:
                return _watched(function(params, *args, **kwargs), has_aux)

            value, gradient = jax.value_and_grad(loss, has_aux=has_aux)(params)
            value, extra = value if has_aux else (value, None)
            losses.append(value)
            extras.append(extra)
            gradients.append(gradient)
        stack = jax.tree.map(lambda *rows: jnp.stack(rows), *gradients)
        return (jnp.stack(losses), extras) if has_aux else jnp.stack(losses), stack

    return stacked


def _watched(found: Any, has_aux: bool) -> Any:
    # A tuple where none belongs is for JAX to refuse.
    return (watched(found[0]), *found[1:]) if has_aux else jax.tree.map(watched, found)


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
