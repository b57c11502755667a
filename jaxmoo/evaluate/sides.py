"""What can be compared: results of an evaluation, training runs, and models that runs exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxmoo.config import load_config
from jaxmoo.convert.kinds import kind_of
from jaxmoo.errors import ConfigError
from jaxmoo.evaluate.evaluation import Evaluation, evaluate
from jaxmoo.evaluate.results import Results, read_results
from jaxmoo.files.outputs import typed_path
from jaxmoo.runs.directory import RunDirectory

__all__ = ["results_of"]


def results_of(
    side: Path,
    other: Path,
    *,
    config: str | None = None,
    say: Callable[[str], None] = print,
    **changes: Any,
) -> Results:
    """Return the results of one side of a comparison, evaluating it where there are none yet.

    Runs and models are asked for the replies that a run holds out. The results are kept: in a run
    as ``held_out.json``, beside an exported model as ``NAME-held_out.json``.

    Args:
      side: a file of results, ``*.json``; the directory of a training run, or of a model.
      other: the other side, whose run's examples are taken where a model is in no run.
      config: settings of a run, for the examples that it holds out; by default those of the run.
      say: called with lines for a person to read.
      **changes: other values of the attributes of an `Evaluation`, such as ``batch_size``.

    Raises:
      ConfigError: it is nothing of these, or nobody says which examples to take.
      JaxmooError: it cannot be evaluated.
    """
    if side.suffix == ".json" and not side.is_dir():
        return read_results(side)
    if not side.is_dir():
        raise ConfigError(
            f"{side}: expected results of an evaluation (*.json), a training run or the directory "
            "of a model. Score any other with `jaxmoo evaluate --model ... --output FILE.json`."
        )
    run = next(filter(None, (_run_of(side), _run_of(other))), None)
    if config is not None:
        name, settings_of = f"held_out-{typed_path(config).stem}", config
    elif run is not None:
        name, settings_of = "held_out", str(RunDirectory(run).config)
    else:
        raise ConfigError(
            f"{side} is a model outside of any training run, so nobody says what to compare it on: "
            "give --config, the settings of a run."
        )
    own = _is_run(side)
    output = side / f"{name}.json" if own else side.with_name(f"{side.name}-{name}.json")
    known: dict[str, Any] = {"name": str(side), "model": side, "output": output}
    settings = Evaluation.held_out_by(load_config(settings_of).data, **known | changes)
    # The scores come with those of the other side.
    evaluate(settings, lambda text: None if "\n" in text else say(text))
    return read_results(output)


def _run_of(side: Path) -> Path | None:
    """The run that a directory is, or whose export it is."""
    parent = RunDirectory(side.absolute().parent)
    exported = side.absolute() in (parent.export, parent.adapter)
    own = side if _is_run(side) else parent.path
    return own if _is_run(own) and (own == side or exported) else None


def _is_run(path: Path) -> bool:
    return path.is_dir() and RunDirectory(path).config.is_file() and kind_of(path) == "run"
