"""Random weights, a control."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmoo.aggregators.aggregator import Aggregator, register


@register
def random() -> Aggregator:
    """Random weighting: a softmax of standard normals, drawn anew at every step and block.

    ``w = softmax(z + log p)``, z standard normal. A control: methods should beat it. The paper
    found that it holds its own against loss weightings.

    Keeps: degree 1 in the gradients; permutation equivariance in distribution.

    Departures: the paper draws once for the whole model, here every block draws. Preferences,
    which the paper does not have, enter as log-odds.

    Returns:
      The aggregator. It needs a key.

    References:
      Lin et al., *Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
      Learning*, TMLR 2022, `arXiv:2111.10603 <https://arxiv.org/abs/2111.10603>`_.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> d = aggregate(random(), jnp.eye(2), key=jax.random.key(0))
      >>> round(float(d.sum()), 4)
      1.0
    """

    def weigh(gram, active, preference, state, key):
        logits = jax.random.normal(key, active.shape, gram.dtype) + jnp.log(preference)
        # A block without active rows has no finite logit; its weights are dropped anyway.
        logits = jnp.where(jnp.any(active), logits, 0.0)
        return jax.nn.softmax(logits), state

    return Aggregator("random", weigh, reads_gram=False, stochastic=True)
