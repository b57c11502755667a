"""The settings of a training run.

The dataclasses below are the only place where a setting is declared. What each one means, the
values it takes and whether a run may be resumed after changing it stand beside it; everything
else is derived from that by :mod:`jaxmoo.config.schema`: reading, checking, the page of
:func:`schema_markdown` and the text of :func:`help_text`.
"""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field, with a factory for lists and mappings.

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxmoo.config import reading, schema
from jaxmoo.config.data_section import ColumnsConfig, DataConfig, SamplingConfig, check_data
from jaxmoo.config.interval import parse_interval
from jaxmoo.config.lora_section import LoraConfig, check_lora
from jaxmoo.config.optimizer_section import (
    OptimizerConfig,
    check_optimizer,
    planned_from,
)
from jaxmoo.config.resolve_section import ResolveConfig
from jaxmoo.config.schema import MISSING, Range, setting
from jaxmoo.config.yaml_text import dump, flow
from jaxmoo.errors import ConfigError

__all__ = [
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ResolveConfig",
    "SamplingConfig",
    "TrainConfig",
    "dated",
    "differences",
    "differences_from_yaml",
    "help_text",
    "load_config",
    "schema_markdown",
    "to_yaml",
    "validate",
]

_AT_LEAST_0 = Range(least=0)
_AT_LEAST_1 = Range(least=1)
_POSITIVE = Range(above=0)
_MOST_POSITIONS = 2**31 - 1
_PRECISIONS = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model that is fine-tuned."""

    source: str = setting(
        MISSING,
        "Where the weights come from: a built-in name (`smollm2-135m-instruct`), a directory in "
        "Hugging Face format, or the id of a model on a Hugging Face hub.",
    )
    trainable: str = setting(
        ".*",
        "Regular expression searched for in parameter paths such as "
        "`layers.25.mlp.up_proj.kernel`; what does not match stays as it is. Freezing the first "
        "layers also saves their share of the backward pass. With `lora.rank` it chooses the "
        "layers that get adapters, and must match whole layers, such as "
        "`^layers\\.(2[2-9])\\.`, or everything.",
    )
    dtype: str = setting("float32", "Precision of the computation.", choices=_PRECISIONS)
    param_dtype: str = setting(
        "float32",
        "Precision in which parameters are kept and updated; adapters are float32 in any case.",
        choices=_PRECISIONS,
    )
    remat: str = setting(
        "full",
        "What the backward pass computes again instead of keeping it: whole layers (`full`), all "
        "but their matrix products and cuDNN's attention (`dots`), or nothing (`none`: fastest, "
        "most memory).",
        choices=("full", "dots", "none"),
        free=True,
    )
    attention: str = setting(
        "auto",
        "Implementation of attention: `xla` (anywhere), `cudnn` (NVIDIA GPUs, with "
        "`model.dtype=bfloat16`), `tpu`, or the fastest that can run on the devices at hand "
        "(`auto`).",
        choices=("auto", "xla", "cudnn", "tpu"),
        free=True,
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long the run is, and what happens along the way."""

    steps: int = setting(
        MISSING,
        "Optimiser steps. A run may be resumed with another number as long as its learning rates "
        "so far do not depend on it: with `optimizer.decay=constant`, or with `wsd` before the "
        "learning rate falls.",
        within=_AT_LEAST_1,
    )
    microbatches: int = setting(
        1,
        "Parts into which a language's examples of a step are split, one after the other.",
        within=_AT_LEAST_1,
    )
    accumulation: str = setting(
        "resolve_each",
        "With several microbatches: `resolve_each` resolves each, weighted by its share of the "
        "step's target tokens, and averages, at no cost in memory; `accumulate_first` adds up each "
        "language's gradients and resolves once, exactly as one large batch would, and holds every "
        "language's gradient until then.",
        choices=("resolve_each", "accumulate_first"),
    )
    router_aux_loss_coef: float | None = setting(
        None,
        "Of a mixture of experts, how much of the router's loss is added to each language's loss: "
        "it grows as the language's tokens are spread unevenly over the experts. null takes what "
        "the model's config.json asks for: its own coefficient where it has "
        "`output_router_logits`, else none.",
        within=_AT_LEAST_0,
    )
    evaluate_every: int = setting(
        0,
        "Steps between evaluations; 0 evaluates only before and after.",
        within=_AT_LEAST_0,
        free=True,
    )
    score: str = setting(
        "seen_mean",
        "What makes an evaluation better than another: a lower `seen_mean` of the seen languages' "
        "held-out NLL, or a lower NLL of the `worst` of them.",
        choices=("seen_mean", "worst"),
        free=True,
    )
    patience: int | None = setting(
        None,
        "Evaluations without a better score after which the run ends early; null never does.",
        within=_AT_LEAST_1,
        free=True,
    )
    select: str = setting(
        "last",
        "Which weights are exported and compared with the beginning: those after the `last` step, "
        "or the `best` of those evaluated.",
        choices=("last", "best"),
        free=True,
    )
    checkpoint_every: int | str = setting(
        "10min",
        "Between checkpoints: a time such as `90s`, `10min` or `2h`, by the clock of the first "
        "process, or a number of steps; 0 saves only at the end.",
        free=True,
    )
    keep_checkpoints: int = setting(
        2, "Newest checkpoints to keep; older ones are deleted.", within=_AT_LEAST_1, free=True
    )
    stop_file: str | None = setting(
        None,
        "A file whose appearance, on any host, stops the run as SIGTERM does; it must not be there "
        "at the start. null watches for none.",
        free=True,
    )
    hang_timeout: float = setting(
        1800.0,
        "Seconds without progress (a step, a batch of the evaluation, a checkpoint) after which "
        "the run shows what it is doing and ends; 0 waits for ever. The first step includes its "
        "compilation.",
        within=Range(least=0, most=10**9),
        free=True,
    )
    compiler_options: dict[str, Any] = setting(
        {},
        "Options of XLA's compiler for the training step, besides those that a run sets by itself "
        "on its kind of devices and prints; null leaves one to the compiler.",
        free=True,
    )
    log_every: int = setting(
        1, "Steps between metrics of single blocks.", within=_AT_LEAST_1, free=True
    )
    gram_every: int = setting(
        10,
        "Steps between records of all inner products of the languages' gradients, per block, in "
        "`grams/`, from which conflict maps are drawn; the first and the last step are always "
        "among them. 0 records none.",
        within=_AT_LEAST_0,
        free=True,
    )
    profile_from: int | None = setting(
        None,
        "First step, counted from 1, of a profile of devices and host in `profile/`; null records "
        "none. The very first step includes compilation.",
        within=_AT_LEAST_1,
        free=True,
    )
    profile_steps: int = setting(3, "Steps in the profile.", within=_AT_LEAST_1, free=True)
    peak_tflops: float | None = setting(
        None,
        "Peak of one device in 10^12 operations per second, for the utilisation (`mfu`) in the "
        "metrics; null takes the data sheet's for bfloat16, where the device is known.",
        within=_POSITIVE,
        free=True,
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged: data x language x fsdp x tensor is their number."""

    language: int | None = setting(
        None,
        "Groups of devices among which the languages are divided; null chooses.",
        within=_AT_LEAST_1,
        free=True,
    )
    fsdp: int | None = setting(
        None,
        "Devices per group, among which a language's examples are divided; null chooses.",
        within=_AT_LEAST_1,
        free=True,
    )
    data: int = setting(
        1,
        "Replicas of everything, among which a language's examples are divided further.",
        within=_AT_LEAST_1,
    )
    tensor: int = setting(
        1,
        "Devices that share every matrix product; how is left to the compiler.",
        within=_AT_LEAST_1,
        free=True,
    )
    slices: int | None = setting(
        None,
        "Slices of TPUs among which the devices are divided; only `data`, which must be a multiple "
        "of it, goes from one to another. null counts them. On GPUs, where null is 1, a slice is "
        "what shares fast links, mostly a host.",
        within=_AT_LEAST_1,
        free=True,
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    output: str = setting(
        MISSING,
        "Directory of the run: metrics, checkpoints, report, exported model. The same command "
        "with the same directory resumes.",
        free=True,
    )
    seed: int = setting(
        0,
        "Seed of every random choice.",
        within=Range(least=0, most=2**32 - 1),  # of JAX's keys
    )
    export: bool = setting(
        True, "Write the trained model to `export/`, in Hugging Face format.", free=True
    )
    report: bool = setting(
        True,
        "Draw the plots of `report/` at the end; the exported model gets a copy of its page.",
        free=True,
    )
    report_samples: int = setting(
        1,
        "Held-out prompts of each language whose replies, before and after training, are in the "
        "report.",
        within=Range(least=0),
        free=True,
    )
    tensorboard: bool = setting(
        True, "Write TensorBoard events to `tensorboard/`, besides `metrics.jsonl`.", free=True
    )
    wandb: str | None = setting(
        None,
        "Project of Weights & Biases to which metrics are also sent (extra `wandb`); the run is "
        "named after the output directory.",
        free=True,
    )
    trackio: str | None = setting(
        None, "Project of Trackio to which metrics are also sent (extra `trackio`).", free=True
    )
    mlflow: str | None = setting(
        None,
        "Experiment of MLflow to which metrics are also sent (extra `mlflow`); where to, "
        "`MLFLOW_TRACKING_URI` says.",
        free=True,
    )
    push_to_hub: str | None = setting(
        None,
        "Repository, such as `me/model`, on a Hugging Face hub, to which the export is uploaded at "
        "the end, with its card; made at the start, so that a missing token is known before "
        "training. Of `lora.export=both`, the merged model.",
        free=True,
    )
    hub_private: bool | None = setting(
        None,
        "Whether `push_to_hub` makes a private repository; null leaves it to the hub (public, "
        "unless the organisation says otherwise).",
        free=True,
    )
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    resolve: ResolveConfig = dataclasses.field(default_factory=ResolveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a run's settings from a YAML file and overrides, and check them all.

    Only ``true`` and ``false`` are truth values, so the language ``no`` is Norwegian.
    ``${section.key}`` in a value stands for another setting.

    Args:
      path: the YAML file, or the name of an example config.
      overrides: texts ``section.key=value``, applied in order after the file; the value is
        written as in YAML. A mapping is replaced whole (``resolve.options={}``) or changed by
        entry (``resolve.options.c=0.3``).

    Returns:
      The settings.

    Raises:
      ConfigError: the file is missing or not YAML; or settings are unknown, missing, of the
        wrong type, out of range or contradict each other: the message lists them.
    """
    config = reading.load(Config, path, overrides)
    try:
        validate(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config


def validate(config: Config) -> None:
    """Check settings that were put together by hand as strictly as those read from a file.

    Args:
      config: the settings.

    Raises:
      ConfigError: lists every value that is out of range, unknown or contradicts another.
    """
    problems = [text for _, text in schema.check_values(config)]
    if not problems:
        # Methods are looked at only now: their library takes a second to import.
        from jaxmoo.config.resolve_checks import check_gram, check_resolve, check_sampled

        problems = [*check_data(config.data), *check_resolve(config.resolve, config.data.seen)]
        if config.data.samples:
            problems += check_sampled(config.resolve)
        positions = (
            config.data.step_languages * config.data.batch_size * config.data.sequence_length
        )
        if positions > _MOST_POSITIONS:
            problems.append(
                f"data.batch_size x data.sequence_length x languages of a step is {positions}, "
                f"more tokens than an array can number, {_MOST_POSITIONS}."
            )
        if config.resolve.engine == "stacked" and config.train.microbatches > 1:
            problems.append("train.microbatches above 1 needs resolve.engine=backward.")
        problems += check_gram(
            config.resolve,
            accumulated=config.train.microbatches > 1
            and config.train.accumulation == "accumulate_first",
            tensor=config.mesh.tensor,
        )
        if config.model.attention == "tpu" and config.mesh.tensor > 1:
            problems.append(
                "mesh.tensor above 1 needs model.attention=xla or cudnn (or auto), not tpu."
            )
        try:
            re.compile(config.model.trainable)
        except re.error as error:
            problems.append(f"model.trainable is not a regular expression: {error}.")
        problems += check_lora(config.lora)
        for name, wanted in (
            ("patience", config.train.patience is not None),
            ("select=best", config.train.select == "best"),
        ):
            if wanted and not config.train.evaluate_every:
                problems.append(f"train.{name} needs evaluations: set train.evaluate_every.")
        problems += check_optimizer(config.optimizer, config.train.steps)
        if config.push_to_hub and not config.export:
            problems.append("push_to_hub needs export=true.")
        try:
            parse_interval(config.train.checkpoint_every, "train.checkpoint_every")
        except ConfigError as error:
            problems.append(str(error))
    schema.raise_problems(problems)


def differences(old: Config, new: Config, done: float = math.inf) -> list[str]:
    """Return how settings differ in a way that makes it wrong to resume one run as the other.

    Settings that only change what is watched, written or recomputed, or where, are left out. So
    is ``train.steps`` when the learning rates of the steps that are done do not depend on it, and
    ``data.date`` of a run that noted none: whether its prompts are still the same is told by its
    batches.

    Args:
      old: the settings the run was started with.
      new: those it is to go on with.
      done: steps that are done; by default all of them.

    Returns:
      One text ``"section.key: old -> new"`` per difference, in the order of declaration.
    """
    return _differences(schema.values(old), schema.values(new), done)


def differences_from_yaml(old: str, new: Config, done: float = math.inf) -> list[str]:
    """Return how settings differ from those that :func:`to_yaml` wrote, as :func:`differences`.

    Settings that there were not yet when it wrote them are left out.
    """
    return _differences(_written(old), _written(to_yaml(new)), done)


def _written(text: str) -> dict[str, Any]:
    """Settings by name, as YAML holds them."""
    tree, found = yaml.safe_load(text), {}
    for name in schema.leaves(Config):
        value = tree
        for part in name.split("."):
            value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
        if value is not MISSING:
            found[name] = value
    return found


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], done: float) -> list[str]:
    steps_free = done <= min(_planned_from(before), _planned_from(after))
    return [
        f"{name}: {flow(before[name])} -> {flow(after[name])}"
        for name, leaf in schema.leaves(Config).items()
        if name in before
        and before[name] != after[name]
        and not leaf.free
        and not (name == "train.steps" and steps_free)
        and not (name == "data.date" and before[name] is None)
    ]


def _planned_from(found: Mapping[str, Any]) -> float:
    """As :func:`planned_from`, of settings by name."""
    section = "optimizer."
    own = {name.removeprefix(section): x for name, x in found.items() if name.startswith(section)}
    return planned_from(OptimizerConfig(**own), found.get("train.steps", 0))


def dated(config: Config, date: str | None) -> Config:
    """Return settings with a date, where they give none."""
    data = dataclasses.replace(config.data, date=config.data.date or date)
    return dataclasses.replace(config, data=data)


def to_yaml(config: Config) -> str:
    """Return settings as YAML that :func:`load_config` reads back to equal settings."""
    return dump(dataclasses.asdict(config))


def schema_markdown() -> str:
    """Return the page that documents every setting, in Markdown."""
    return (
        "# Settings\n\n"
        "A run is described by one YAML file; on the command line every setting can be given "
        "another value as `section.key=value`. `${section.key}` in a value stands for another "
        "setting. Settings marked *must stay* cannot change between the start of a run and its "
        "resumption.\n\n" + schema.markdown(Config)
    )


def help_text() -> str:
    """Return every setting with its default and meaning, for ``--help``."""
    return schema.help_text(Config)
