"""The grid of a study: its training runs and the settings of each."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxmoo.config import schema
from jaxmoo.config.study_config import MeasureConfig, StudyConfig
from jaxmoo.config.training import Config, load_config
from jaxmoo.config.yaml_text import flow
from jaxmoo.errors import ConfigError, did_you_mean
from jaxmoo.files.outputs import typed_path

__all__ = ["Cell", "Key", "make_cells"]

# Where things lie is no part of what is compared: the examples and weights themselves are.
_PLACES = ("output", "model.source", "data.source", "data.subset", "data.split", "data.codes")
# What a run of a study would leave behind for nobody.
_LEAN = ("export=false", "report=false", "tensorboard=false", "train.gram_every=0")
# What is measured, of `jaxmoo.evaluate.measures.MEASURES`.
_OF_REPLIES = ("nll", "bits_per_byte")
_OF_CHOICES = ("accuracy", "accuracy_unnormalised")


class Key(NamedTuple):
    """Which run of the grid.

    Attributes:
      arm: its name.
      seed: of the data's order and every other random choice of the run.
      learning_rate: the highest of its schedule.
    """

    arm: str
    seed: int
    learning_rate: float

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}, learning rate {self.learning_rate:g}"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A training run of the grid.

    Attributes:
      key: which one.
      config: its settings.
      settings: what decides its result, by full names.
    """

    key: Key
    config: Config
    settings: dict[str, Any]


def make_cells(study: StudyConfig) -> list[Cell]:
    """List the runs of a study in the order in which they are run.

    Seeds come outermost: whenever a study is stopped, the seeds before the last one are complete
    and can be compared. Seeds by which learning rates are chosen come first.

    Args:
      study: the settings.

    Returns:
      One cell per arm, seed and learning rate, each with checked settings.

    Raises:
      ConfigError: the base file or an arm's settings are wrong, naming the arm; or `measure` names
        a language or a measure that there is none of.
    """
    shared = [f"{name}={_value(value)}" for name, value in study.training.items()]
    cells, seen = [], {}
    for seed in (*study.tuning_seeds, *study.seeds):
        for rate in study.learning_rates:
            for arm, own in study.arms.items():
                key = Key(arm, seed, rate)
                place = typed_path(study.output) / "runs" / _directory(key)
                given = [f"seed={seed}", f"optimizer.learning_rate={rate!r}", f"output={place}"]
                try:
                    config = load_config(study.base, [*_LEAN, *shared, *own, *given])
                except ConfigError as error:
                    raise ConfigError(f"arm {arm!r}: {error}") from error
                cells.append(Cell(key, config, _settings(study, config)))
                text = json.dumps(cells[-1].settings, sort_keys=True)
                other = seen.setdefault((seed, rate, text), arm)
                if other != arm:
                    raise ConfigError(
                        f"arms {other!r} and {arm!r} are the same run: their settings do not "
                        "differ."
                    )
    languages = {(*cell.config.data.seen, "|", *cell.config.data.unseen) for cell in cells}
    if len(languages) > 1:
        raise ConfigError("arms differ in data.seen or data.unseen, so they cannot be compared.")
    _check_measure(study.measure, cells[0].config.data.seen)
    return cells


def _check_measure(asked: MeasureConfig, seen: Sequence[str]) -> None:
    """Raise where it names what this study does not have."""
    for code in asked.skip:
        if code not in seen:
            raise ConfigError(
                f"measure.skip names {code!r}, which is not in data.seen."
                f"{did_you_mean(code, seen)} There are {', '.join(seen)}; a language that is not "
                "trained on is left out of data.unseen."
            )
    if set(asked.skip) >= set(seen):
        raise ConfigError("measure.skip names all of data.seen: leave one to be measured.")
    names = _OF_REPLIES if asked.choices is None else (*_OF_REPLIES, *_OF_CHOICES)
    for name in asked.smallest_effect:
        if name not in names:
            hint = " It takes measure.choices." if name in _OF_CHOICES else ""
            raise ConfigError(
                f"measure.smallest_effect names {name!r}, which this study does not measure."
                f"{hint or did_you_mean(name, names)} There are {', '.join(names)}."
            )


def _settings(study: StudyConfig, config: Config) -> dict[str, Any]:
    leaves = schema.leaves(Config)
    decisive = {
        name: value
        for name, value in schema.values(config).items()
        if name not in _PLACES and not name.startswith("data.columns.") and not leaves[name].free
    }
    # These may change between a run's interruption and its resumption, but decide what it leaves.
    for name in ("train.select", "train.evaluate_every", "train.score", "train.patience"):
        decisive[name] = schema.values(config)[name]
    decisive["measure.choices"] = study.measure.choices
    decisive["measure.max_examples"] = study.measure.max_examples
    if study.measure.skip:  # rows from before there was this setting are without it
        decisive["measure.skip"] = study.measure.skip
    if study.tune != schema.leaves(StudyConfig)["tune"].default:  # nor was it kept in rows
        decisive["tune"] = study.tune
    return decisive


def _value(value: Any) -> str:
    return value if isinstance(value, str) else flow(value)


def _directory(key: Key) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", f"{key.arm}_seed{key.seed}_lr{key.learning_rate:g}")
