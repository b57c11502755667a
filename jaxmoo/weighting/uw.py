"""Uncertainty weighting."""

from __future__ import annotations

from jaxmoo.weighting.learned import learned
from jaxmoo.weighting.weighting import Weighting, register


@register
def uw(learning_rate: float = 0.01, *, normalise: bool = True) -> Weighting:
    """Uncertainty weighting.

    Adam minimises ``sum_k L_k exp(-s_k) + s_k`` over the log-variances s; the weights are
    ``exp(-s_k)`` and tend to ``1 / L_k``.

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
      Kendall, Gal and Cipolla, *Multi-Task Learning Using Uncertainty to Weigh Losses for Scene
      Geometry and Semantics*, CVPR 2018, `arXiv:1705.07115 <https://arxiv.org/abs/1705.07115>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> weighting = uw()
      >>> state = weighting.init(2)
      >>> for _ in range(400):
      ...     weights, state = weighting.update(jnp.array([1.0, 3.0]), state)
      >>> [round(float(w), 2) for w in weights]
      [1.5, 0.5]
    """
    # In logs = -s the objective is exp(logs) L - logs, which is IMTL-L's.
    return learned("uw", learning_rate, normalise)
