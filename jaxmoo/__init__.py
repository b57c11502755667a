"""Fine-tune one model on many objectives without the objectives hurting each other."""

from jaxmoo import aggregators, blocks, errors
from jaxmoo.aggregators import Aggregator, aggregate
from jaxmoo.engine import ResolvedGradients, block, resolved_value_and_grad
from jaxmoo.resolver_state import ResolveConflictsState
from jaxmoo.stacked import stacked_value_and_grad
from jaxmoo.transform import freeze, resolve_conflicts

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "ResolveConflictsState",
    "ResolvedGradients",
    "aggregate",
    "aggregators",
    "block",
    "blocks",
    "errors",
    "freeze",
    "resolve_conflicts",
    "resolved_value_and_grad",
    "stacked_value_and_grad",
]
