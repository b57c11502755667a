"""The model card of a run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from jaxmoo.config import Config
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf import ModelCard
from jaxmoo.runs.directory import RunDirectory

__all__ = ["adapter_card", "kind_of_adapters", "loadable_name", "public_name", "run_card"]

# A model in the Hugging Face hub's own cache.
_CACHED = re.compile(r"/models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/[0-9a-f]+/?$")


def run_card(run: RunDirectory, config: Config, step: int) -> ModelCard:
    """Make a model card of what a run's own files say.

    Args:
      run: the run's directory.
      config: its settings.
      step: the step whose weights are exported.
    """
    before, after = run.scores(0), run.scores(step)
    metrics = {}
    if before and after:
        metrics["Held-out reply NLL per token"] = {
            code: {"before": before[code].nll, "after": after[code].nll}
            for code in before
            if code in after
        }
    resolve, page = config.resolve, run.report / "index.html"
    tuned = "fine-tuning"
    if config.lora.rank is not None:
        lora = config.lora
        tuned = f"{kind_of_adapters(config)} (rank {lora.rank}, alpha {lora.alpha:g})"
    return ModelCard(
        title=run.path.absolute().name,
        base_model=public_name(config.model.source),
        languages=tuple(config.data.seen),
        method=f"{tuned} with jaxmoo, {step} steps of {config.train.steps}; one gradient per "
        f"language, resolved by {resolve.aggregator} in blocks ({resolve.blocks})",
        data=", ".join(public_name(str(one.source)) for one in config.data.each),
        metrics=metrics,
        report=page.read_text("utf-8") if page.is_file() else None,
    )


def kind_of_adapters(config: Config) -> str:
    """What the adapters of a run are called, with the base that they learnt on."""
    lora = config.lora
    kind = "DoRA" if lora.dora else "LoRA"
    return kind if lora.quantize_base is None else f"{kind} on a base in {lora.quantize_base}"


def adapter_card(card: ModelCard) -> ModelCard:
    """The card of the adapters alone."""
    return dataclasses.replace(card, library="peft")


def public_name(name: str) -> str:
    """A name without the place on this machine, where it is a path."""
    path = typed_path(name)
    return path.name if path.is_absolute() or path.exists() or name.startswith(".") else name


def loadable_name(source: Path) -> str:
    """The name by which other libraries find a model: its id on the hub, or else where it lies.

    Args:
      source: the directory that it was read from.

    Example:
      >>> loadable_name(Path("/cache/models--org--base/snapshots/0a1b"))
      'org/base'
      >>> loadable_name(Path("/models/base"))
      '/models/base'
    """
    place = source.absolute()
    cached = _CACHED.search(place.as_posix())
    return f"{cached['owner']}/{cached['name']}" if cached else str(place)
