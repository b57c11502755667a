"""DualProj: the mean gradient projected on the cone that opposes no objective."""

from __future__ import annotations

import jax.numpy as jnp

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.aggregators.solvers import equilibrate, project_on_dual_cone


@register
def dualproj() -> Aggregator:
    """Projection of the mean gradient on the dual cone.

    ``w = argmin {v^T G v : v >= p}``, solved exactly: the vector nearest to the mean gradient that
    opposes no objective.

    Keeps: non-conflict; permutation equivariance; degree 1 in the gradients. Without conflicts
    with the mean it is the mean.

    Departures: published code adds a ridge to G, which opposes the weakest objective when the
    norms differ; here the cosines are used, so the norms do not matter to the solve.

    Returns:
      The aggregator.

    References:
      Lopez-Paz and Ranzato, *Gradient Episodic Memory for Continual Learning*, NeurIPS 2017,
      `arXiv:1706.08840 <https://arxiv.org/abs/1706.08840>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> [round(float(x), 4) for x in aggregate(dualproj(), J)]
      [0.5556, 1.1111, 1.1111]
    """

    def weigh(gram, active, preference, state, key):
        cosine, norm = equilibrate(gram, active)
        pull = preference * norm
        size = jnp.maximum(jnp.max(pull), 1e-30)
        added = size * project_on_dual_cone(cosine, active, pull / size)
        return preference + added / norm, state

    return Aggregator("dualproj", weigh, elementary=True)
