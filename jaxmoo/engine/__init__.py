"""Conflicts resolved in the backward pass, on a sharded mesh.

The terms of this package:

- *array*: one leaf of the trees of parameters, known by its number: first the trainable ones, then
  the frozen ones. A *piece* is what one device holds of it, a *layout* says where the pieces lie.
- *section*: an equal part of an array, or of one of its layers, that lies in one block.
- *call*: one call of a function marked with `block`. A *use* is one array, or one layer of a stack,
  that it reads. A *recorder* stands in for the engine while the calls are counted.
- *in the pass*: a block is resolved in the backward step of the one call that sees all of its
  gradients. The others are *deferred*: resolved after the pass, from *cotangent accumulators*.
  These are zeros [K, piece] that are inputs beside the array, and whose cotangents are the
  objectives' gradients, added up over all uses.
- *device-local* blocks each lie on one device alone, which resolves them without communication.
- *block table*: diagnostics and aggregators' states, a row per block. It is an input of the loss
  function, each call takes its rows, and their cotangents are the rows' new values.
- *sketched* blocks: what devices exchange is not the gradients but short random sketches of them.
- *one at a time*: no two objectives' gradients of a call exist. They are formed from *factors*,
  what the call computed and what arrives from above, for which its backward step runs *in parts*.
- *head residuals*: what a tied head hands to the embedding, whose backward step forms both parts
  of the table's gradient.
"""

from jaxmoo.engine.block import block
from jaxmoo.engine.resolved_gradients import ResolvedGradients, resolved_value_and_grad

__all__ = ["ResolvedGradients", "block", "resolved_value_and_grad"]
