"""Fine-tune one model on many objectives without the objectives hurting each other."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

# Imported when first asked for: `jaxmoo --help` waits neither for JAX nor for anything that needs
# it.
_HOMES = {
    "Aggregator": "aggregators",
    "aggregate": "aggregators",
    "ResolvedGradients": "engine",
    "block": "engine",
    "resolved_value_and_grad": "engine",
    "stacked_value_and_grad": "stacked",
    "ResolveConflictsState": "resolver_state",
    "freeze": "transform",
    "resolve_conflicts": "transform",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"jaxmoo.{_HOMES[name]}"), name)
    elif name in __all__:
        value = importlib.import_module(f"jaxmoo.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
