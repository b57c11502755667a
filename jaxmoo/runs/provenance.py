"""What a checkpoint tells about the run it belongs to, and whether the run is still that one."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

from jaxmoo.config import Config, differences_from_yaml
from jaxmoo.errors import CheckpointError
from jaxmoo.models import DecoderConfig

__all__ = [
    "architecture",
    "check_base",
    "check_settings",
    "versions",
]

_PLACES = ("model.source", "data.source", "data.sources", "data.held_out_source", "lora.adapter")
_PACKAGES = ("jaxmoo", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on.

    Example:
      >>> "jax" in versions()
      True
    """
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from its sources
            continue
    return found


def architecture(model: DecoderConfig) -> dict[str, Any]:
    """Return a model's sizes and constants as JSON holds them."""
    return json.loads(json.dumps(dataclasses.asdict(model), default=str))


def check_settings(described: Mapping[str, Any], step: int, config: Config) -> None:
    """Raise unless a checkpoint is of a run with these settings.

    Args:
      described: what is stored beside it (:func:`jaxmoo.train.resume.about`); what is not in it
        is not checked.
      step: its name.
      config: the settings.

    Raises:
      CheckpointError: it is another run's.
    """
    settings = described.get("config")
    changed = [] if settings is None else differences_from_yaml(settings, config, step)
    # Files may move: what is in them is checked instead.
    changed = [one for one in changed if one.partition(":")[0] not in _PLACES]
    if changed:
        raise CheckpointError(
            f"The checkpoint of step {step} is that of a run with other settings:\n  "
            + "\n  ".join(changed)
            + "\nPut the run's own in its place, or remove it."
        )


def check_base(
    described: Mapping[str, Any], step: int, model: DecoderConfig, base: str, source: str
) -> None:
    """Raise unless a checkpoint is on top of a base model.

    Args:
      described: what is stored beside it (:func:`jaxmoo.train.resume.about`); what is not in it
        is not checked.
      step: its name.
      model: sizes and constants of the base model.
      base: fingerprint of the parameters that are not trained.
      source: where they came from.

    Raises:
      CheckpointError: it is another's.
    """
    then, now = described.get("architecture", {}), architecture(model)
    changed = [
        f"{name} {then[name]!r} -> {now[name]!r}"
        for name in then
        if name in now and then[name] != now[name]
    ]
    if described.get("base", base) != base:
        changed.append("other weights in the parameters that are not trained")
    if changed:
        raise CheckpointError(
            f"model.source: {source} is no longer the model that the run began with (checkpoint of "
            f"step {step}): {', '.join(changed)}. Put that model back, or start a new run with "
            "output=..."
        )
