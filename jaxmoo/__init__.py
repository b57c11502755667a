"""Fine-tune one model on many objectives without the objectives hurting each other."""

from jaxmoo import aggregators, blocks, errors
from jaxmoo.aggregators import Aggregator, aggregate
from jaxmoo.gradients import stacked_value_and_grad
from jaxmoo.transform import ResolveConflictsState, resolve_conflicts

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "ResolveConflictsState",
    "aggregate",
    "aggregators",
    "blocks",
    "errors",
    "resolve_conflicts",
    "stacked_value_and_grad",
]
