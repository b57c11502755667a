"""GradVac: gradients pulled towards the cosines they usually have."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.aggregators.methods.pcgrad import random_orders
from jaxmoo.aggregators.solvers import equilibrate
from jaxmoo.kernels.linear import matvec
from jaxmoo.parameters import check_choice, check_number
from jaxmoo.sharding import varying

# The formula divides by the sine of the target's angle, which rounding alone would decide for
# gradients that are always parallel.
_MAX_TARGET = 0.9999


@register
def gradvac(
    beta: float | jax.Array = 0.5, *, reduction: Literal["mean", "sum"] = "mean"
) -> Aggregator:
    """Gradient vaccine.

    Like PCGrad, but gradient i is moved towards an original gradient j whenever their cosine
    ``phi`` is below the target ``t`` of the pair, a running mean of the cosines seen so far:
    ``g_i <- g_i + |g_i| (t sqrt(1 - phi^2) - phi sqrt(1 - t^2)) / (|g_j| sqrt(1 - t^2)) g_j``, then
    ``t <- (1 - beta) t + beta phi``. With targets of 0, where they start, it is PCGrad.

    Keeps: degree 1 in the gradients; permutation equivariance in distribution. Promises no
    non-conflict beyond PCGrad's.

    Departures: the paper uses ``beta = 0.01``, most code 0.5; the targets move at every meeting, as
    in the paper, while some code moves them only when a gradient is changed. Targets above 0.9999
    count as 0.9999. Published code sums. Preferences weight the moved gradients.

    Args:
      beta: rate of the running mean, from 0 to 1. May be traced.
      reduction: ``"mean"``, or ``"sum"`` for the published scale.

    Returns:
      The aggregator. It needs a key, and keeps ``[K, K]`` targets per block.

    Raises:
      ConfigError: if a parameter is out of range.

    References:
      Wang et al., *Gradient Vaccine: Investigating and Improving Multi-task Optimization in
      Massively Multilingual Models*, ICLR 2021,
      `arXiv:2010.05874 <https://arxiv.org/abs/2010.05874>`_.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> d = aggregate(gradvac(), J, key=jax.random.key(0))
      >>> [round(float(x), 4) for x in d]
      [0.2924, 1.9006, 1.9006]
    """
    check_number("gradvac", "beta", beta, low=0, high=1)
    check_choice("gradvac", "reduction", reduction, ("mean", "sum"))

    def init(num_objectives):
        return jnp.zeros((num_objectives, num_objectives))

    def weigh(gram, active, preference, state, key):
        cosine, norm = equilibrate(gram, active)
        orders = random_orders(key, active.shape[0])
        coefficients, targets = vaccinate(cosine, orders, active, state, beta)
        return matvec(preference * norm, coefficients) / norm, targets

    return Aggregator("gradvac", weigh, init=init, stochastic=True, summed=reduction == "sum")


def vaccinate(
    cosine: jax.Array,
    orders: jax.Array,
    active: jax.Array,
    targets: jax.Array,
    beta: float | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """GradVac's moves for given orders.

    Args:
      cosine: ``[K, K]`` cosines between the gradients.
      orders: ``[K, K]``; row i is the order in which gradient i meets the others.
      active: ``[K]`` bool; pairs with an inactive gradient do not meet.
      targets: ``[K, K]`` target cosines of gradient i with the original j.
      beta: rate of the targets.

    Returns:
      ``(coefficients [K, K], targets [K, K])``; row i of the first holds the coefficients of the
      moved unit gradient i.
    """
    k = cosine.shape[0]
    identity = jnp.eye(k, dtype=cosine.dtype)
    beta = jnp.asarray(beta, cosine.dtype)
    nothing = (8 * jnp.finfo(cosine.dtype).eps) ** 2
    pairs = active[:, None] & active[None, :] & (identity == 0)

    def meet(t, carry):
        coefficients, products, square, targets = carry
        other = jax.nn.one_hot(orders[:, t], k, dtype=cosine.dtype)
        meets = jnp.sum(jnp.where(pairs, other, 0.0), axis=1) > 0
        length = jnp.sqrt(square)
        along = jnp.sum(products * other, axis=1)
        phi = jnp.clip(along / jnp.where(length > 0, length, 1.0), -1.0, 1.0)
        old = jnp.sum(targets * other, axis=1)
        target = jnp.clip(old, -_MAX_TARGET, _MAX_TARGET)
        pull = target * jnp.sqrt((1 - phi**2) / (1 - target**2)) - phi
        # A gradient that has been moved to nothing has no direction to compare.
        step = jnp.where(meets & (phi < target) & (square > nothing), pull * length, 0.0)
        add = step[:, None] * other
        new = jnp.where(meets, (1 - beta) * old + beta * phi, old)
        return (
            coefficients + add,
            products + matvec(add, cosine),
            jnp.maximum(square + 2 * step * along + step**2, 0.0),
            jnp.where(other > 0, new[:, None], targets),
        )

    start = (identity, cosine, jnp.ones(k, cosine.dtype), targets)
    coefficients, _, _, targets = lax.fori_loop(0, k, meet, varying(start, orders))
    return coefficients, targets
