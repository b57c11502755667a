"""The settings of adapters; see :mod:`jaxmoo.config.training`."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field, with a factory for lists and mappings.

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jaxmoo.config.schema import Range, setting
from jaxmoo.errors import ConfigError
from jaxmoo.projections import PROJECTIONS

if TYPE_CHECKING:
    from jaxmoo.models.lora import LoRA

__all__ = ["LoraConfig", "check_lora", "lora_of"]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: the model stays as it is, and only what is added to it is trained."""

    rank: int | None = setting(
        None,
        "Rank of the adapters. null trains parameters themselves; with a rank `model.trainable` "
        "chooses the layers that get adapters.",
        within=Range(least=1),
    )
    alpha: float = setting(16.0, "Adapters are scaled by `alpha / rank`.", within=Range(above=0))
    targets: list[str] = setting(
        list(PROJECTIONS),
        "Projections of those layers that get adapters; by default, or as `[all-linear]`, all. "
        "`gate_proj`, `up_proj` and `down_proj` of a mixture are those of every expert.",
    )
    rslora: bool = setting(
        False, "Scale adapters by `alpha / sqrt(rank)` instead (rank-stabilised LoRA)."
    )
    dora: bool = setting(
        False, "Train the norms of the adapted kernels' columns apart (weight-decomposed, DoRA)."
    )
    rank_pattern: dict[str, int] = setting(
        {}, "Ranks of single projections in place of `rank`, such as `{down_proj: 32}`."
    )
    alpha_pattern: dict[str, float] = setting(
        {}, "Alphas of single projections in place of `alpha`, such as `{down_proj: 64}`."
    )
    quantize_base: str | None = setting(
        None,
        "Hold the matrices of the model's layers, which stay as they are, in few bits (QLoRA): "
        "`nf4`, 4.5 bits per weight, or `int8`. null holds them in `model.param_dtype`.",
        choices=("nf4", "int8"),
    )
    merge_onto: str = setting(
        "base",
        "With `quantize_base`, what adapters are merged into: the model's own matrices, read again "
        "(`base`), or what their few bits stand for, which is what training saw (`quantized`).",
        choices=("base", "quantized"),
        free=True,
    )
    adapter: str | None = setting(
        None,
        "Directory in PEFT format with the adapters to start from; null starts from new ones, "
        "which change nothing yet.",
    )
    export: str = setting(
        "merged",
        "What `export` writes: the whole model with the adapters merged into it (`merged`, to "
        "`export/`), the adapters alone in PEFT format (`adapter`, to `adapter/`), or `both`.",
        choices=("merged", "adapter", "both"),
        free=True,
    )


def lora_of(settings: LoraConfig) -> LoRA | None:
    """Return the kind of adapters a run trains, or None when it trains parameters themselves."""
    if settings.rank is None:
        return None
    from jaxmoo.models.lora import LoRA

    return LoRA(
        settings.rank,
        settings.alpha,
        tuple(settings.targets),
        rslora=settings.rslora,
        dora=settings.dora,
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
    )


def check_lora(lora: LoraConfig) -> list[str]:
    """Return what is wrong with the settings of adapters, a sentence each."""
    if lora.rank is None:
        # They would have no effect, which may not be what was meant.
        changed = [
            f"lora.{field.name}"
            for field in dataclasses.fields(lora)
            if getattr(lora, field.name) != getattr(LoraConfig(), field.name)
        ]
        return [f"{', '.join(changed)} have no effect without lora.rank."] if changed else []
    if lora.quantize_base is None and lora.merge_onto != LoraConfig().merge_onto:
        return ["lora.merge_onto has no effect without lora.quantize_base."]
    try:
        lora_of(lora)
    except ConfigError as error:
        return [f"lora: {error}"]
    return []
