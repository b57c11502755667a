"""The model that a run leaves in its directory: written once, and looked after from then on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxmoo.config import Config
from jaxmoo.data.tokenization.tokenizer import NO_ENDING, read_template
from jaxmoo.errors import CheckpointError, ConfigError
from jaxmoo.files.digests import DIGESTS, damaged_files, files_below, read_digests
from jaxmoo.hf import save_adapter, save_model
from jaxmoo.hf.directory import first_process, is_unfinished, remove_directory, written_files
from jaxmoo.hf.generation import left_to_callers
from jaxmoo.models import merge_adapters
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.runs.run_card import adapter_card, loadable_name, run_card
from jaxmoo.runtime.processes import from_first, is_first
from jaxmoo.train.job import Job

__all__ = ["check_exports", "export", "exports"]

_CARD = "README.md"


def check_exports(config: Config, directory: RunDirectory) -> None:
    """Raise if a run that is still to be trained would have to delete what is not its own.

    Raises:
      ConfigError: names the files.
      CheckpointError: what is recorded of an earlier end is damaged.
    """
    exported, steps = directory.exported_step(), directory.steps()
    if exported is not None and steps and steps[-1] >= config.train.steps:
        return
    for path in exports(config, directory):
        _check_own(path)


def export(job: Job, params: Any, step: int) -> dict[str, str | None]:
    """Write the model, unless it is there already, whole.

    Args:
      job: the run.
      params: the trained parameters.
      step: the steps that they have behind them.

    Returns:
      What is to be recorded; see :meth:`~jaxmoo.runs.directory.RunDirectory.exported`.

    Raises:
      CheckpointError: the model that is there is damaged, or it cannot be written.
      ConfigError: another's files are in the way.
    """
    directory, config = job.directory, job.config
    recorded = directory.exported(step)
    made = dict(recorded)
    ending = job.setup.ending
    stop = () if ending is None else (ending,)
    for path in exports(config, directory):
        onto = config.lora.merge_onto if config.lora.quantize_base else None
        if path == directory.adapter:
            onto = None
        before = recorded.get(path.name, onto)
        there = path.is_dir() and any(path.iterdir()) and not is_unfinished(path)
        if from_first(there and path.name in recorded and before in (onto, None)):
            first_process(lambda path=path: _check_whole(path))
            continue
        if is_first() and path.name in recorded:
            why = f"is merged onto {before}, and lora.merge_onto is now {onto}"
            job.say(f"{path} {why if there else 'is gone, or empty'}: the model is exported again.")
        made[path.name] = onto
        first_process(lambda path=path: _remove(path))
        # If this is interrupted, nothing is to say of another model that it was exported there.
        first_process(lambda: directory.results.unlink(missing_ok=True))
        model = job.setup.merge(params, job.setup.frozen)
        card = run_card(directory, config, step)
        if path == directory.adapter:
            base = loadable_name(job.setup.source)
            save_adapter(model, path, base_model=base, card=adapter_card(card))
            job.say(f"Exported the adapters to {path} (PEFT format).")
            if note := left_to_callers(job.setup.source, stop):
                job.say(f"Note: {note}")
        else:
            if onto is None:
                merge_adapters(model)
            save_model(
                model,
                path,
                source=job.setup.source,
                card=card,
                chat_template=read_template(config.data.chat_template),
                stop=stop,
                merge_onto=onto,
            )
            job.say(f"Exported to {path} (Hugging Face format).")
            if ending is None:
                job.say(NO_ENDING)
    return made


def exports(config: Config, directory: RunDirectory) -> tuple[Path, ...]:
    """Return where a run exports to, the merged model first."""
    if not config.export:
        return ()
    merged, adapter = directory.export, directory.adapter
    return {"merged": (merged,), "adapter": (adapter,), "both": (merged, adapter)}[
        config.lora.export
    ]


def _check_whole(path: Path) -> None:
    problems = damaged_files(path, written_files(path))
    if problems:
        raise CheckpointError(
            f"{path} is no longer what this run exported: {', '.join(problems[:5])}. Remove that "
            "directory, or move it away if you have changed it on purpose, and give the same "
            "command again: the model is exported anew."
        )


def _remove(path: Path) -> None:
    """Remove an earlier export; nothing else."""
    _check_own(path)
    remove_directory(path)


def _check_own(path: Path) -> None:
    """Raise unless a directory holds only what a run exported, as it was."""
    if not path.exists() or is_unfinished(path):
        return
    if not path.is_dir():
        raise ConfigError(f"output: {path} is in the way of the export. Move it away.")
    in_the_way = f"output: {path} is where the model will be exported to, but"
    try:
        digests = read_digests(path)
    except CheckpointError as error:
        raise ConfigError(f"{in_the_way} {error}. Move that directory away.") from None
    others = files_below(path)
    fault = f"holds files, and nothing says ({DIGESTS}) that a run has written them"
    if digests is not None:
        others = [name for name in others if name not in digests.files and name != DIGESTS]
        # It is there for people to edit.
        if _CARD in digests.files and (path / _CARD).exists():
            others += damaged_files(path, {_CARD: digests.files[_CARD]})
        fault = "holds what no run has written there"
    if others:
        raise ConfigError(
            f"{in_the_way} {fault}: {', '.join(others[:5])}. Move that directory away."
        )
