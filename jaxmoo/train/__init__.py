"""Fine-tuning runs: from settings to weights, metrics and a table.

:func:`train` runs or resumes what a :class:`~jaxmoo.config.Config` describes; :func:`plan` says
beforehand what a step of it needs. A run is set up in :mod:`~jaxmoo.train.setup`, trained by
:mod:`~jaxmoo.train.loop` with the step of :mod:`~jaxmoo.train.step`, and written down by
:mod:`~jaxmoo.train.reporter`.
"""

from jaxmoo.train.chips import ChipFullError, slice_of
from jaxmoo.train.metrics import read_metrics
from jaxmoo.train.planning import Plan, plan
from jaxmoo.train.run import InterruptedRunError, NonFiniteLossError, train

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
