"""The settings of the optimiser; see :mod:`jaxmoo.config.training`."""

from __future__ import annotations

import dataclasses
import math

from jaxmoo.config.schema import Range, setting

__all__ = ["OptimizerConfig", "check_optimizer", "planned_from", "steps_advice"]

_AT_LEAST_0 = Range(least=0)
_AT_LEAST_1 = Range(least=1)
_POSITIVE = Range(above=0)
_FRACTION = Range(least=0, below=1)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser of the resolved gradient, and its schedule."""

    name: str = setting(
        "adamw",
        "Method: `adamw`; `adafactor` (second moments as row and column averages: least memory); "
        "`muon` (orthogonalised momentum for the layers' matrices, AdamW for the rest); or `sgd` "
        "with momentum.",
        choices=("adamw", "adafactor", "muon", "sgd"),
    )
    learning_rate: float = setting(1e-4, "Learning rate after the warm-up.", within=_POSITIVE)
    warmup_steps: int = setting(
        0, "Steps over which the learning rate rises to that value.", within=_AT_LEAST_0
    )
    decay: str = setting(
        "cosine",
        "How the learning rate falls to 0 over the steps after the warm-up; `constant` keeps it; "
        "`wsd` (warm-up, stable, decay) keeps it until the last `decay_steps`, over which it falls "
        "linearly.",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    decay_steps: int | None = setting(
        None,
        "Steps of the fall of `wsd`; null takes a tenth of `train.steps`.",
        within=_AT_LEAST_1,
    )
    weight_decay: float = setting(
        0.0, "Decoupled weight decay of matrices; norms have none.", within=_AT_LEAST_0
    )
    b1: float = setting(
        0.9, "Decay of the average gradient (momentum); not for `adafactor`.", within=_FRACTION
    )
    b2: float = setting(
        0.999,
        "Decay of the average squared gradient of AdamW; `adafactor` has its own schedule.",
        within=_FRACTION,
    )
    eps: float = setting(
        1e-8, "Added to the root of the average square (`adamw`).", within=_POSITIVE
    )
    moment_dtype: str = setting(
        "float32",
        "Precision in which the average gradient is kept; the average square is always float32.",
        choices=("float32", "bfloat16"),
    )
    ema: float | None = setting(
        None,
        "Decay of a moving average of the trained weights, such as 0.999, kept in float32; it is "
        "evaluated and exported in their place. null keeps none.",
        within=_FRACTION,
    )
    clip_norm: float | None = setting(
        1.0,
        "Largest norm of the resolved gradient, all blocks together; null never clips.",
        within=_POSITIVE,
    )

    def falls_from(self, steps: int) -> int:
        """Return the step from which the learning rate of `wsd` falls, in a run of so many."""
        return steps - (max(steps // 10, 1) if self.decay_steps is None else self.decay_steps)


def check_optimizer(optimizer: OptimizerConfig, steps: int) -> list[str]:
    """Return what the settings of the optimiser contradict each other in."""
    problems = []
    if optimizer.warmup_steps > steps:
        problems.append(
            f"optimizer.warmup_steps is {optimizer.warmup_steps}, more than the {steps} of "
            "train.steps."
        )
    elif optimizer.decay == "wsd" and optimizer.falls_from(steps) < optimizer.warmup_steps:
        problems.append(
            f"optimizer.warmup_steps, {optimizer.warmup_steps}, and the decay of wsd, "
            f"{steps - optimizer.falls_from(steps)}, are more steps than train.steps, {steps}."
        )
    if optimizer.decay_steps is not None and optimizer.decay != "wsd":
        problems.append("optimizer.decay_steps has no effect without optimizer.decay=wsd.")
    return problems


def planned_from(optimizer: OptimizerConfig, steps: int) -> float:
    """Return after how many steps the learning rates begin to depend on the number of all steps.

    A run that has no more steps behind it can still become longer or shorter.

    Example:
      >>> planned_from(OptimizerConfig(decay="wsd", decay_steps=20), 100)
      81
      >>> planned_from(OptimizerConfig(warmup_steps=5), 100)
      6
      >>> planned_from(OptimizerConfig(decay="constant"), 100)
      inf
    """
    if optimizer.decay == "constant":
        return math.inf
    # The first update of the decay still has the rate before it.
    begun = optimizer.falls_from(steps) if optimizer.decay == "wsd" else optimizer.warmup_steps
    return begun + 1


def steps_advice(optimizer: OptimizerConfig, steps: int, done: int) -> str:
    """Say how a run can have more steps than planned, where its schedule is on its way."""
    planned = planned_from(optimizer, steps)
    keep = ""
    if optimizer.decay == "wsd":
        keep = (
            f"; or delete its checkpoints after step {planned}, and it goes on from one before the "
            "learning rate began to fall"
        )
    return (
        f"The learning rates of the {done} steps that are done were chosen for {steps} steps "
        f"(optimizer.decay={optimizer.decay}). To train longer, start a new run from this one's "
        f"weights, model.source=OUTPUT/export{keep}. With optimizer.decay=constant, train.steps "
        "may change at any time, with wsd until the learning rate falls."
    )
