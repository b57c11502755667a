"""IMTL-L: all weighted losses tend to the same."""

from __future__ import annotations

from jaxmoo.weighting.learned import learned
from jaxmoo.weighting.weighting import Weighting, register


@register
def imtl_l(learning_rate: float = 0.01, *, normalise: bool = True) -> Weighting:
    """Impartial multi-task learning, loss balance.

    Adam minimises ``sum_k exp(s_k) L_k - s_k``; the weights are ``exp(s_k)``, under which all
    weighted losses tend to 1.

    Departures: the paper trains s with the model's optimiser, here it has its own; weights are
    scaled to mean 1, so that the learning rate carries over, unless ``normalise`` is False.

    Args:
      learning_rate: Adam's learning rate of s.
      normalise: whether to scale the weights to mean 1.

    Returns:
      The weighting. It keeps K numbers with Adam's state.

    Raises:
      ConfigError: if a parameter is out of range.

    References:
      Liu et al., *Towards Impartial Multi-task Learning*, ICLR 2021,
      `OpenReview <https://openreview.net/forum?id=IMPnRXEWpvr>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> weighting = imtl_l(normalise=False)
      >>> state = weighting.init(2)
      >>> for _ in range(400):
      ...     weights, state = weighting.update(jnp.array([1.0, 2.0]), state)
      >>> [round(float(w), 2) for w in weights]
      [1.0, 0.5]
    """
    return learned("imtl_l", learning_rate, normalise)
