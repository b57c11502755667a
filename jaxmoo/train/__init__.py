"""Fine-tuning runs: from settings to weights, metrics and a table.

:func:`train` runs or resumes what a :class:`~jaxmoo.config.Config` describes; :func:`plan` says
beforehand what a step of it needs. A run is set up in :mod:`~jaxmoo.train.setup`, trained by
:mod:`~jaxmoo.train.loop` with the step of :mod:`~jaxmoo.train.step`, and written down by
:mod:`~jaxmoo.train.reporter`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxmoo.errors import InterruptedRunError
    from jaxmoo.train.chips import ChipFullError, slice_of
    from jaxmoo.train.metrics import read_metrics
    from jaxmoo.train.planning import Plan, plan
    from jaxmoo.train.reporter import NonFiniteLossError
    from jaxmoo.train.run import train

__all__ = [
    "ChipFullError",
    "InterruptedRunError",
    "NonFiniteLossError",
    "Plan",
    "plan",
    "read_metrics",
    "slice_of",
    "train",
]

# Imported when first asked for: what only needs the names of chips does not wait for JAX.
_HOMES = {
    "ChipFullError": "train.chips",
    "InterruptedRunError": "errors",
    "NonFiniteLossError": "train.reporter",
    "Plan": "train.planning",
    "plan": "train.planning",
    "read_metrics": "train.metrics",
    "slice_of": "train.chips",
    "train": "train.run",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jaxmoo.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
