"""What a directory is: a model of which kind, and where its config and tokenizer are."""

from __future__ import annotations

from pathlib import Path

from jaxmoo.config.training import load_config as load_run_config
from jaxmoo.errors import CheckpointError, JaxmooError
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.adapter import Adapters, describe_adapter, is_adapter
from jaxmoo.hf.source import resolve_source
from jaxmoo.runs.directory import RunDirectory

__all__ = ["CHECKPOINT_FILE", "base_of", "kind_of", "source_of", "tokenizer_of"]

CHECKPOINT_FILE = "checkpoint.json"


def kind_of(path: Path) -> str:
    """Tell what a directory is: "run", "checkpoint", "adapter" (in PEFT format) or "hf".

    Raises:
      CheckpointError: when it is none of them.
    """
    path = typed_path(path)
    if RunDirectory(path).config.is_file():
        return "run"
    if (path / CHECKPOINT_FILE).is_file():
        return "checkpoint"
    if is_adapter(path):
        return "adapter"
    if (path / "config.json").is_file():
        return "hf"
    run = path.absolute().parent.parent
    if (
        RunDirectory(run).checkpoints == path.absolute().parent
        and RunDirectory(run).config.is_file()
    ):
        raise CheckpointError(
            f"{path} is one checkpoint of a training run: name the run, {run}, and step {path.name}"
        )
    raise CheckpointError(
        f"{path} is not a model: expected a Hugging Face directory (config.json), adapters in PEFT "
        f"format (adapter_config.json), a checkpoint directory ({CHECKPOINT_FILE}) or the output "
        "of a training run (config.yaml)"
    )


def source_of(path: Path, *, base: str | None = None) -> Path:
    """Find the directory with the config and tokenizer of a model of any kind; reads no weights.

    Args:
      path: a Hugging Face directory, adapters, a checkpoint directory or a training run.
      base: the model that the run began with, or that adapters belong to, if it is no longer where
        their config says.

    Raises:
      CheckpointError: when the directory is of no kind.
      ConfigError, DownloadError: when the model that a run began with is not to be had.
    """
    path = typed_path(path)
    kind = kind_of(path)
    if kind == "adapter":
        return base_of(path, describe_adapter(path), base)
    if kind != "run":
        return path
    return resolve_source(base or load_run_config(RunDirectory(path).config).model.source)


def tokenizer_of(path: Path, source: Path) -> Path:
    """Return the directory with the tokenizer of a model.

    Args:
      path: the model's directory, of any kind.
      source: from `source_of`.

    Returns:
      ``source``, but for adapters that have a tokenizer of their own beside them.
    """
    own = kind_of(path) == "adapter" and (typed_path(path) / "tokenizer.json").is_file()
    return typed_path(path) if own else source


def base_of(path: Path, adapters: Adapters, base: str | None) -> Path:
    """Find the directory of the model that adapters belong to.

    Args:
      path: the adapters' directory.
      adapters: what it says of them.
      base: see `source_of`.

    Raises:
      CheckpointError: the model is not named, or not to be had.
    """
    named = base or adapters.base
    if named is None:
        raise CheckpointError(
            f"{path} does not say which model its adapters belong to (base_model_name_or_path in "
            "adapter_config.json): name it with --base"
        )
    try:
        return resolve_source(named)
    except JaxmooError as error:
        raise CheckpointError(
            f"the adapters in {path} belong to the model {named!r}, which is not "
            f"to be had: {error}\nIf it has moved, name it with --base."
        ) from error
