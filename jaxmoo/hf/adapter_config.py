"""What the ``adapter_config.json`` of a directory in PEFT format says of its adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxmoo.errors import CheckpointError, ConfigError, shown
from jaxmoo.hf.expert_adapter import GATE_UP, Columns, Place
from jaxmoo.models.lora import LoRA

__all__ = ["CONFIG_FILE", "check_kind", "lora_of_file", "settings_of"]

CONFIG_FILE = "adapter_config.json"

# What makes an adapter compute something else than ours, where it is set.
_OTHER_KINDS = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Ways of starting that leave the base model as it is; others change it.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def check_kind(config: Mapping[str, Any], path: Path) -> None:
    """Raise unless adapters compute what ours can.

    Args:
      config: contents of the file.
      path: the directory, for errors.

    Raises:
      CheckpointError: they do not, or a setting has another type than PEFT writes.
    """
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {shown(config.get('peft_type'))}, expected 'LORA'")
    problems += [f"{name} is set" for name in _OTHER_KINDS if config.get(name)]
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {shown(config['bias'])}, expected 'none'")
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        problems.append(f"init_lora_weights={shown(start)} changes the base model")
    if problems:
        raise CheckpointError(
            f"the adapters in {path} are of a kind that is not supported: {'; '.join(problems)}"
        )
    for name in ("use_rslora", "use_dora"):
        if not isinstance(config.get(name, False), bool):
            raise CheckpointError(
                f"{path / CONFIG_FILE}: {name} must be true or false, found {shown(config[name])}"
            )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise CheckpointError(
                f"{path / CONFIG_FILE}: {name} must be an object, found {shown(config[name])}"
            )
    if not isinstance(config.get("target_parameters") or [], list):
        raise CheckpointError(
            f"{path / CONFIG_FILE}: target_parameters must be a list, found "
            f"{shown(config['target_parameters'])}"
        )


def settings_of(
    config: Mapping[str, Any], path: Path, places: Iterable[Place]
) -> dict[str, tuple[int, float]]:
    """Rank and alpha of every projection, and of experts' gate_up_proj.

    Args:
      config: contents of the file.
      path: the directory, for errors.
      places: what its tensors belong to.

    Raises:
      CheckpointError: one has another range, or is not the same in all layers.
    """
    general = (config.get("r"), config.get("lora_alpha"))
    patterns = [config.get(f"{name}_pattern") or {} for name in ("rank", "alpha")]
    found: dict[str, tuple[int, float]] = {}
    try:
        for key, name in sorted({(place.key, place.projection) for place in places}):
            rank, alpha = map(_by_pattern, patterns, general, (key, key))
            LoRA(rank, alpha)  # type and range of both
            _check_same(name, found.setdefault(name, (rank, alpha)), (rank, alpha))
    except ConfigError as error:
        raise _unlike_ours(config, path, error) from error
    return found


def _by_pattern(pattern: Mapping[str, Any], general: Any, key: str) -> Any:
    """What a pattern of PEFT's says of a module.

    Its keys are regular expressions, of which the first that matches the end of the module's name
    counts.

    Raises:
      ConfigError: it is no expression.
    """
    try:
        return next((x for k, x in pattern.items() if re.match(rf"(.*\.)?({k})$", key)), general)
    except re.error as error:
        raise ConfigError(f"a pattern of theirs is no regular expression: {error}.") from error


def lora_of_file(
    config: Mapping[str, Any],
    path: Path,
    own: Mapping[str, tuple[int, float]],
    columns: Columns,
) -> LoRA:
    """The kind of adapters in a directory.

    Args:
      config: contents of the file.
      path: the directory, for errors.
      own: from :func:`settings_of`.
      columns: of experts' gate and up, which share the rank of gate_up_proj, and keep its scale.

    Raises:
      CheckpointError: there are no such adapters here.
    """
    rank, alpha, rslora = config.get("r"), config.get("lora_alpha"), config.get("use_rslora", False)
    projections = {name: x for name, x in own.items() if name != GATE_UP}
    try:
        for name, chosen in columns.items():
            together, theirs = own[GATE_UP]
            mine = int(chosen.sum())
            part = (mine, round(theirs * (mine / together) ** (0.5 if rslora else 1), 9))
            _check_same(name, projections.setdefault(name, part), part)
        return LoRA(
            rank,  # pyright: ignore[reportArgumentType] -- checked there
            alpha,  # pyright: ignore[reportArgumentType]
            targets=tuple(sorted(projections)),
            rank_pattern={name: x for name, (x, _) in projections.items() if x != rank},
            alpha_pattern={name: x for name, (_, x) in projections.items() if x != alpha},
            rslora=rslora,
            dora=config.get("use_dora", False),
        )
    except ConfigError as error:
        raise _unlike_ours(config, path, error) from error


def _check_same(name: str, one: tuple[int, float], other: tuple[int, float]) -> None:
    for a, b in zip(one, other, strict=True):
        if a != b:
            raise ConfigError(
                f"adapters of {name} have {shown(a)} in one layer and {shown(b)} in another, but "
                "here all layers' have the same."
            )


def _unlike_ours(config: Mapping[str, Any], path: Path, error: ConfigError) -> CheckpointError:
    return CheckpointError(
        f"the adapters in {path} have rank {shown(config.get('r'))} and alpha "
        f"{shown(config.get('lora_alpha'))}: {error}"
    )
