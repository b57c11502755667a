"""The settings of the optimiser; see :mod:`jaxmoo.config.training`."""

from __future__ import annotations

import dataclasses

from jaxmoo.config.schema import Range, setting

__all__ = ["OptimizerConfig"]

_AT_LEAST_0 = Range(least=0)
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
        "How the learning rate falls to 0 over the steps after the warm-up; `constant` keeps it.",
        choices=("cosine", "linear", "constant"),
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
