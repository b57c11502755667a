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

from jaxmoo.weighting.weighting import Weighting as Weighting
from jaxmoo.weighting.weighting import get as get
from jaxmoo.weighting.weighting import initial_weights as initial_weights
from jaxmoo.weighting.weighting import names as names

# isort: off
from jaxmoo.weighting.static import static as static
from jaxmoo.weighting.static import temperature as temperature
from jaxmoo.weighting.famo import famo as famo
from jaxmoo.weighting.uw import uw as uw
from jaxmoo.weighting.dwa import dwa as dwa
from jaxmoo.weighting.imtl_l import imtl_l as imtl_l
