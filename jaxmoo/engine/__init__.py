"""Conflicts resolved in the backward pass, on a sharded mesh."""

from jaxmoo.engine.block import block
from jaxmoo.engine.resolved_gradients import ResolvedGradients, resolved_value_and_grad

__all__ = ["ResolvedGradients", "block", "resolved_value_and_grad"]
