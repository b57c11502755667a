"""Weightings of the objectives' losses: cheap, before any gradient is taken.

Unlike an aggregator, which combines the gradients of a block, a weighting turns the vector of
losses into weights on them. Used alone, the step descends the weighted mean loss with a single
backward pass:

    weights, state = weighting.update(losses, state)        # losses of the last step or this one
    loss = jnp.mean(weights * losses)                       # differentiate this

Used with an aggregator, it scales the losses, and so the gradients, that the aggregator sees:
multiply every objective's loss (or row of the stacked gradients) by its weight. Weights have mean
1 over the objectives present, so a learning rate carries over. They carry no gradient.
"""

from jaxmoo.weighting.base import Weighting, initial_weights
from jaxmoo.weighting.dwa import dwa
from jaxmoo.weighting.famo import famo
from jaxmoo.weighting.learned import imtl_l, uw
from jaxmoo.weighting.registry import get, names
from jaxmoo.weighting.static import static, temperature

__all__ = [
    "Weighting",
    "dwa",
    "famo",
    "get",
    "imtl_l",
    "initial_weights",
    "names",
    "static",
    "temperature",
    "uw",
]
