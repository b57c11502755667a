"""The settings of a training run.

The dataclasses below are the only place where a setting is declared. What each one means, the
values it takes and whether a run may be resumed after changing it stand beside it; everything
else is derived from that by :mod:`jaxmoo.train.schema`: reading, checking, the page of
:func:`schema_markdown` and the text of :func:`help_text`.
"""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field, with a factory for lists and mappings.

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxmoo import aggregators, blocks
from jaxmoo.errors import ConfigError, did_you_mean
from jaxmoo.train import schema
from jaxmoo.train.schema import MISSING, Range, setting
from jaxmoo.train.yaml_text import dump, flow

__all__ = [
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ResolveConfig",
    "TrainConfig",
    "differences",
    "help_text",
    "load_config",
    "schema_markdown",
    "to_yaml",
    "validate",
]

_AT_LEAST_0 = Range(least=0)
_AT_LEAST_1 = Range(least=1)
_POSITIVE = Range(above=0)
_FRACTION = Range(least=0, below=1)
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
        "layers also saves their share of the backward pass.",
    )
    dtype: str = setting("float32", "Precision of the computation.", choices=_PRECISIONS)
    param_dtype: str = setting(
        "float32", "Precision in which parameters are kept and updated.", choices=_PRECISIONS
    )
    remat: str = setting(
        "full",
        "What the backward pass computes again instead of keeping it: whole layers (`full`), all "
        "but their matrix products (`dots`), or nothing (`none`: fastest, most memory).",
        choices=("full", "dots", "none"),
        free=True,
    )


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """Columns of the data, where they are not called `messages`, or `prompt` and `completion`."""

    messages: str | None = setting(
        None, "Column with the conversation, a list of `{role, content}`."
    )
    prompt: str | None = setting(None, "Column with what the user says.")
    completion: str | None = setting(None, "Column with the reply that is learnt.")
    group: str | None = setting(
        None,
        "Column that names what belongs together, such as translations of one text: a group is "
        "held out as a whole.",
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The examples of every language."""

    source: str = setting(
        MISSING,
        "Where the examples come from: `chatterbot` (built in), a file pattern such as "
        "`data/{language}.jsonl` (also .json, .parquet, .csv), a directory of such files, or the "
        "id of a data set on a Hugging Face hub.",
    )
    seen: list[str] = setting(
        MISSING, "Languages to train on, by their code in the data. Each gives one gradient."
    )
    unseen: list[str] = setting(
        [], "Languages that are only evaluated, before and after, to see what transfers."
    )
    batch_size: int = setting(4, "Examples per language and step.", within=_AT_LEAST_1)
    sequence_length: int = setting(
        512, "Tokens per example; what is longer is cut.", within=Range(least=2)
    )
    held_out: float = setting(
        0.1,
        "Share of a seen language's examples that is kept from training, for evaluation.",
        within=Range(above=0, below=1),
    )
    max_held_out: int | None = setting(
        None, "Most examples evaluated per language; null evaluates all.", within=_AT_LEAST_1
    )
    disjoint_replies: bool = setting(
        False,
        "Hold out every example that shares its reply with a held-out one. Right where prompts "
        "paraphrase one another, wrong where replies are labels.",
    )
    codes: dict[str, str] = setting(
        {}, "The data's own names of languages where they differ, such as `{pt: por_Latn}`."
    )
    language_column: str | None = setting(
        None, "Column that names the language, where one table holds them all."
    )
    subset: str | None = setting(
        None,
        "Subset (configuration) of a hub data set; `{language}` stands for the language. null "
        "takes the one named as the language, unless a column or split tells languages apart.",
    )
    split: str = setting("train", "Split of a hub data set; `{language}` stands for the language.")
    columns: ColumnsConfig = dataclasses.field(default_factory=ColumnsConfig)


@dataclasses.dataclass(frozen=True)
class ResolveConfig:
    """How the languages' gradients become one update."""

    aggregator: str = setting(
        "cagrad", "Method that resolves conflicts; `mean` is plain fine-tuning."
    )
    options: dict[str, Any] = setting({}, "Options of the method, such as `{c: 0.5}` for `cagrad`.")
    blocks: str = setting(
        "layer",
        "How the parameters are cut into blocks that are resolved one by one: `whole`, `layer`, "
        "`module`, `leaf`, `bytes:25MiB` (buckets of that size), `shard` (each device's own piece: "
        "the result depends on the mesh) or `random:32` (a control).",
    )
    vocabulary_slices: int | None = setting(
        None,
        "Into how many slices the embedding and the head are cut where blocks are layers, modules, "
        "leaves or shards; each slice is a block. null takes the fewest that are no larger than a "
        "layer.",
        within=_AT_LEAST_1,
    )
    engine: str = setting(
        "backward",
        "Where conflicts are resolved: `backward` resolves each block inside the backward pass and "
        "drops its gradients, so that memory stays near plain fine-tuning; `stacked` first "
        "computes every language's whole gradient.",
        choices=("backward", "stacked"),
    )
    replicas: str = setting(
        "mean_then_resolve",
        "Order over the replicas of `mesh.data`: average each language's gradients first (exact), "
        "resolve in each replica and average (least traffic), or average Gram matrices only.",
        choices=("mean_then_resolve", "resolve_then_mean", "pooled_gram"),
    )
    nonfinite: str = setting(
        "skip",
        "When a language's loss or gradient is not finite: `skip` leaves it out of the blocks "
        "concerned and counts the step, `raise` stops. A run stops in any case when no language's "
        "loss is finite.",
        choices=("skip", "raise"),
        free=True,
    )
    match_norm: bool = setting(
        False,
        "Give every block's resolved gradient the length of its mean gradient, to compare methods "
        "and block sizes by direction alone.",
    )
    preference: dict[str, float] | None = setting(
        None,
        "Weights of languages that matter more or less, such as `{ja: 2}`; a language not named "
        "weighs 1. null treats all alike.",
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW on the resolved gradient, and its schedule."""

    learning_rate: float = setting(1e-4, "Learning rate after the warm-up.", within=_POSITIVE)
    warmup_steps: int = setting(
        0, "Steps over which the learning rate rises to that value.", within=_AT_LEAST_0
    )
    decay: str = setting(
        "cosine",
        "How the learning rate falls to 0 over the steps after the warm-up; `constant` keeps it.",
        choices=("cosine", "linear", "constant"),
    )
    weight_decay: float = setting(
        0.0, "Decoupled weight decay of matrices; norms have none.", within=_AT_LEAST_0
    )
    b1: float = setting(0.9, "Decay of the average gradient.", within=_FRACTION)
    b2: float = setting(0.999, "Decay of the average squared gradient.", within=_FRACTION)
    eps: float = setting(1e-8, "Added to the root of the average square.", within=_POSITIVE)
    clip_norm: float | None = setting(
        1.0,
        "Largest norm of the resolved gradient, all blocks together; null never clips.",
        within=_POSITIVE,
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long the run is, and what happens along the way."""

    steps: int = setting(
        MISSING,
        "Optimiser steps. A run may be resumed with another number only when `optimizer.decay` is "
        "`constant`; otherwise the schedule depends on it.",
        within=_AT_LEAST_1,
    )
    microbatches: int = setting(
        1,
        "Parts into which a language's examples of a step are split, one after the other.",
        within=_AT_LEAST_1,
    )
    accumulation: str = setting(
        "resolve_each",
        "With several microbatches: `resolve_each` resolves every one and averages, at no cost in "
        "memory; `accumulate_first` adds up each language's gradients and resolves once, exactly "
        "as one large batch would, and holds every language's gradient meanwhile.",
        choices=("resolve_each", "accumulate_first"),
    )
    evaluate_every: int = setting(
        0,
        "Steps between evaluations; 0 evaluates only before and after.",
        within=_AT_LEAST_0,
        free=True,
    )
    checkpoint_every: int = setting(
        0, "Steps between checkpoints; 0 saves only at the end.", within=_AT_LEAST_0, free=True
    )
    keep_checkpoints: int = setting(
        2, "Newest checkpoints to keep; older ones are deleted.", within=_AT_LEAST_1, free=True
    )
    hang_timeout: float = setting(
        1800.0,
        "Seconds without progress (a step, a batch of the evaluation, a checkpoint) after which "
        "the run shows what it is doing and ends; 0 waits for ever. The first step includes its "
        "compilation.",
        within=_AT_LEAST_0,
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


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged: the product of the four is their number."""

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


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    output: str = setting(
        MISSING,
        "Directory of the run: metrics, checkpoints, report, exported model. The same command "
        "with the same directory resumes.",
        free=True,
    )
    seed: int = setting(0, "Seed of every random choice.", within=_AT_LEAST_0)
    export: bool = setting(
        True, "Write the trained model to `export/`, in Hugging Face format.", free=True
    )
    report: bool = setting(True, "Draw the plots of `report/` at the end.", free=True)
    tensorboard: bool = setting(
        True, "Write TensorBoard events to `tensorboard/`, besides `metrics.jsonl`.", free=True
    )
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
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
      path: the YAML file.
      overrides: texts ``section.key=value``, applied in order after the file; the value is
        written as in YAML. A mapping is replaced whole (``resolve.options={}``) or changed by
        entry (``resolve.options.c=0.3``).

    Returns:
      The settings.

    Raises:
      ConfigError: the file is missing or not YAML; or settings are unknown, missing, of the
        wrong type, out of range or contradict each other: the message lists them.
    """
    config = schema.load(Config, path, overrides)
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
        problems = [*_check_data(config.data), *_check_resolve(config.resolve, config.data.seen)]
        if config.resolve.engine == "stacked" and config.train.microbatches > 1:
            problems.append("train.microbatches above 1 needs resolve.engine=backward.")
        try:
            re.compile(config.model.trainable)
        except re.error as error:
            problems.append(f"model.trainable is not a regular expression: {error}.")
        if config.optimizer.warmup_steps > config.train.steps:
            problems.append(
                f"optimizer.warmup_steps is {config.optimizer.warmup_steps}, more than the "
                f"{config.train.steps} of train.steps."
            )
    schema.raise_problems(problems)


# Languages name files, metrics and plots.
_CODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def _check_data(data: DataConfig) -> list[str]:
    problems = []
    if not data.seen:
        problems.append("data.seen is empty: name at least one language to train on.")
    for name, codes in (("seen", data.seen), ("unseen", data.unseen)):
        twice = sorted({code for code in codes if codes.count(code) > 1})
        if twice:
            problems.append(f"data.{name} names {', '.join(twice)} more than once.")
        odd = [code for code in codes if not _CODE.fullmatch(code)]
        if odd:
            problems.append(
                f"data.{name}: expected language codes of letters, digits, - and _, found "
                f"{', '.join(map(repr, odd))}."
            )
    both = sorted(set(data.seen) & set(data.unseen))
    if both:
        problems.append(
            f"{', '.join(both)} in both data.seen and data.unseen: a language is one or the other."
        )
    columns = data.columns
    if columns.messages is not None and (columns.prompt, columns.completion) != (None, None):
        problems.append("data.columns takes either messages or prompt and completion, not both.")
    return problems


def _check_resolve(resolve: ResolveConfig, seen: list[str]) -> list[str]:
    problems = []
    methods = aggregators.names()
    if resolve.aggregator not in methods:
        problems.append(
            f"resolve.aggregator: unknown method {resolve.aggregator!r}."
            f"{did_you_mean(resolve.aggregator, methods)} There are {', '.join(methods)}."
        )
    else:
        try:
            method = aggregators.get(resolve.aggregator, **resolve.options)
        except (TypeError, ValueError) as error:
            problems.append(f"resolve.options do not suit {resolve.aggregator}: {error}")
        else:
            if method.cross_gram:
                problems.append(
                    f"resolve.aggregator: {method.name} needs gradients of two batches per step, "
                    "which a training run does not compute. Use it in your own optax chain."
                )
    if resolve.aggregator == "moco" and resolve.engine != "stacked":
        problems.append(
            "resolve.aggregator: moco follows every language's whole gradient; it needs "
            "resolve.engine=stacked."
        )
    try:
        if resolve.blocks != "shard":
            blocks.get(resolve.blocks)
    except ConfigError as error:
        problems.append(f"resolve.blocks: {error}")
    for code, weight in (resolve.preference or {}).items():
        if code not in seen:
            problems.append(
                f"resolve.preference names {code!r}, which is not in data.seen."
                f"{did_you_mean(code, seen)}"
            )
        if weight not in _POSITIVE:
            problems.append(f"resolve.preference.{code} must be above 0, found {weight}.")
    return problems


def differences(old: Config, new: Config) -> list[str]:
    """Return how settings differ in a way that makes it wrong to resume one run as the other.

    Settings that only change what is watched, written or recomputed, or where, are left out. So
    is ``train.steps`` when the learning rate does not depend on it.

    Args:
      old: the settings the run was started with.
      new: those it is to go on with.

    Returns:
      One text ``"section.key: old -> new"`` per difference, in the order of declaration.
    """
    before, after = schema.values(old), schema.values(new)
    steps_free = old.optimizer.decay == new.optimizer.decay == "constant"
    return [
        f"{name}: {flow(before[name])} -> {flow(after[name])}"
        for name, leaf in schema.leaves(Config).items()
        if before[name] != after[name]
        and not leaf.free
        and not (name == "train.steps" and steps_free)
    ]


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
