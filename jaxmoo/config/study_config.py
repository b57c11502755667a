"""The settings of a study: which training runs are compared, and by what."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field, with a factory for lists and mappings.

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxmoo.config import reading, schema
from jaxmoo.config.schema import MISSING, Range, setting
from jaxmoo.errors import ConfigError, did_you_mean

__all__ = ["MeasureConfig", "StudyConfig", "help_text", "load_study"]

_AT_LEAST_1 = Range(least=1)


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    """What the trained models are asked, besides the likelihood of held-out replies."""

    choices: str | None = setting(
        None,
        "Also the accuracy of choosing the reply: from all replies of the data (`replies`), from "
        "a column's list (`column:NAME`), or from labels (`a,b,c`).",
    )
    max_examples: int | None = setting(
        None, "Most held-out examples per language; null asks all.", within=_AT_LEAST_1
    )
    batch_size: int = setting(16, "Sequences at a time.", within=_AT_LEAST_1, free=True)
    skip: list[str] = setting(
        [],
        "Languages that are trained on but not measured, such as one whose replies are wrong on "
        "purpose.",
    )
    smallest_effect: dict[str, float] = setting(
        {},
        "The smallest difference worth having, by measure, such as `{nll: 0.01, accuracy: 0.01}`: "
        "arms whose difference is surely smaller are reported as equivalent.",
        free=True,
    )
    other_languages: bool = setting(
        True,
        "Test claims about other languages, too, with those measured as drawn from more. `false`: "
        "about these very languages, as where they differ on purpose.",
        free=True,
    )


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """A grid of training runs: every arm with every seed and learning rate."""

    output: str = setting(
        MISSING,
        "Directory of the study: a row per finished run, tables, the plot. The same command with "
        "the same directory runs what is missing.",
        free=True,
    )
    base: str = setting(MISSING, "YAML file of the training run that all arms share.")
    training: dict[str, Any] = setting(
        {},
        "Settings of that run that are different here, by their full names, such as "
        "`{train.steps: 100}`; on the command line `training.train.steps=100`.",
    )
    arms: dict[str, list[str]] = setting(
        MISSING,
        "The runs that are compared: name and settings of each, such as "
        "`{mean: [resolve.aggregator=mean]}`.",
    )
    baseline: str = setting(MISSING, "The arm that the others are compared with.", free=True)
    seeds: list[int] = setting(
        [1, 2, 3],
        "Seeds of the runs. A seed means the same batches in every arm, so arms are compared seed "
        "by seed.",
        free=True,
    )
    learning_rates: list[float] = setting(
        MISSING,
        "Learning rates that every arm is given. With several, each arm is reported at the one "
        "that is best for it on the tuning examples.",
        free=True,
    )
    tuning_seeds: list[int] = setting(
        [],
        "Seeds of runs by which each arm's learning rate is chosen, and which are not reported: "
        "the others are then run at the chosen rate alone. Without any, all seeds are run at all "
        "rates.",
        free=True,
    )
    tune: float = setting(
        0.5,
        "Share of the held-out examples by which learning rates are chosen; the others are "
        "reported. With one learning rate nothing is chosen and all are reported.",
        within=Range(above=0, below=1),
    )
    keep_runs: bool = setting(
        False,
        "Keep the directories of finished runs, with their weights, instead of deleting them once "
        "their row is written.",
        free=True,
    )
    measure: MeasureConfig = dataclasses.field(default_factory=MeasureConfig)


def load_study(path: str | Path, overrides: Iterable[str] = ()) -> StudyConfig:
    """Read a study's settings from a YAML file and overrides, and check them.

    Args:
      path: the YAML file, or the name of an example config.
      overrides: texts ``key=value``, applied in order after the file.

    Returns:
      The settings. The training runs' own settings are checked by
      :func:`jaxmoo.study.grid.make_cells`.

    Raises:
      ConfigError: the file is missing or not YAML; or settings are unknown, missing, of the wrong
        type, out of range or contradict each other: the message lists them.
    """
    study = reading.load(StudyConfig, path, overrides)
    try:
        schema.raise_problems(_problems(study))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return study


def _problems(study: StudyConfig) -> list[str]:
    problems = []
    if study.baseline not in study.arms:
        problems.append(
            f"baseline names {study.baseline!r}, which is not in arms."
            f"{did_you_mean(study.baseline, study.arms)} There are {', '.join(study.arms)}."
        )
    lists: dict[str, list[Any]] = {
        "seeds": study.seeds,
        "learning_rates": study.learning_rates,
        "tuning_seeds": study.tuning_seeds,
    }
    for name, numbers in lists.items():
        if not numbers and name != "tuning_seeds":
            problems.append(f"{name} is empty: name at least one.")
        twice = sorted({n for n in numbers if numbers.count(n) > 1})
        if twice:
            problems.append(f"{name} names {', '.join(map(str, twice))} more than once.")
    for name in ("seeds", "tuning_seeds"):
        problems += [f"{name}: {seed} is below 0." for seed in lists[name] if seed < 0]
    both = sorted(set(study.seeds) & set(study.tuning_seeds))
    if both:
        problems.append(
            f"{', '.join(map(str, both))} in both seeds and tuning_seeds: what chooses is not "
            "reported."
        )
    if study.tuning_seeds and len(study.learning_rates) < 2:
        problems.append("tuning_seeds have nothing to choose from: name several learning_rates.")
    problems += [
        f"learning_rates: {rate} is not above 0 and finite."
        for rate in study.learning_rates
        if rate not in Range(above=0)
    ]
    problems += [
        f"measure.smallest_effect.{name}: {effect} is not above 0 and finite."
        for name, effect in study.measure.smallest_effect.items()
        if effect not in Range(above=0)
    ]
    own = {"seed": "seeds", "output": "output", "optimizer.learning_rate": "learning_rates"}
    sections = {"training": list(study.training)}
    for arm, texts in study.arms.items():
        sections[f"arms.{arm}"] = [text.partition("=")[0].strip() for text in texts]
    for section, names in sections.items():
        problems += [
            f"{section} sets {name}, which the grid sets for every run; use {own[name]}."
            for name in names
            if name in own
        ]
    return problems


def help_text() -> str:
    """Return every setting with its default and meaning, for ``--help``."""
    return schema.help_text(StudyConfig)
