"""Training steps to compare: plain, in-backward and stacked, all made by the trainer's own code."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from jaxmoo.config.training import (
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ResolveConfig,
    TrainConfig,
)
from jaxmoo.models import DecoderConfig
from jaxmoo.train.chips import Slice
from jaxmoo.train.gradient_source import (
    GradientSource,
    make_gradients,
    ordinary,
    ordinary_gradients,
)
from jaxmoo.train.planning import AbstractStep, Plan, abstract_step, plan, shape_of

KINDS = ("layer", "module", "leaf", "bytes:25MiB", "shard")


class Kind(NamedTuple):
    """A step that is compared.

    Attributes:
      engine: "backward", "stacked", or "plain" for ordinary training on the same tokens as one
        batch, by the same code.
      aggregator: the method; of no consequence to "plain".
      blocks: kind of blocks; likewise.
      gram: how Gram matrices are formed; likewise.
    """

    engine: str
    aggregator: str
    blocks: str
    gram: str = "exact"


PLAIN = Kind("plain", "mean", "layer")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for what all compared steps have in common."""
    parser.add_argument("--model", default="SmolLM2-135M", help="published model or directory")
    parser.add_argument("--untied", action="store_true", help="a head of its own")
    parser.add_argument("--trainable", default=".*", help="which parameters learn (all)")
    parser.add_argument("--batch-size", type=int, default=1, help="examples per language (1)")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens (128)")
    parser.add_argument("--packing", action="store_true", help="four texts share a row")
    parser.add_argument("--lora", type=int, help="rank of adapters, which alone learn")
    parser.add_argument("--language", type=int, help="size of the mesh axis of this name")
    parser.add_argument("--replicas", type=int, default=1, help="size of the mesh axis data (1)")
    parser.add_argument("--dtype", default="float32", help="precision of the computation")
    parser.add_argument("--param-dtype", default="float32", help="precision of the parameters")
    parser.add_argument("--moment-dtype", default="float32", help="of AdamW's average gradient")
    parser.add_argument("--remat", default="full", help="what the backward pass computes again")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of AdamW (1e-4)")
    parser.add_argument("--attention", default="auto", help="its implementation, where it is run")
    parser.add_argument("--aggregators", nargs="*", default=["cagrad"])
    parser.add_argument("--blocks", nargs="*", default=list(KINDS))
    parser.add_argument("--grams", nargs="*", default=["exact"], help="exact, sketch:N (exact)")
    parser.add_argument("--keep", default="gradients", help="one: with sketches (gradients)")
    parser.add_argument("--no-stacked", action="store_true", help="leave out the stacked path")
    parser.add_argument("--json", help="file for the numbers")


def contestants(flags: argparse.Namespace) -> list[Kind]:
    """Every step that is compared with plain training."""
    found = [
        Kind("backward", method, kind, gram)
        for kind in flags.blocks
        for method in flags.aggregators
        for gram in flags.grams
    ]
    if not flags.no_stacked:
        found.append(Kind("stacked", flags.aggregators[0], flags.blocks[0]))
    return found


def shape(flags: argparse.Namespace, layers: int | None) -> DecoderConfig:
    """The model's sizes, with another number of layers where one is given."""
    model = shape_of(flags.model)
    return dataclasses.replace(
        model,
        num_hidden_layers=layers or model.num_hidden_layers,
        tie_word_embeddings=model.tie_word_embeddings and not flags.untied,
    )


def step(flags: argparse.Namespace, languages: int, layers: int | None, kind: Kind) -> AbstractStep:
    """Build a step to be run on the devices at hand.

    Args:
      flags: see :func:`add_flags`.
      languages: K.
      layers: another number of layers than the model's, or None.
      kind: which step.
    """
    return abstract_step(*_settings(flags, languages, layers, kind), attention=flags.attention)


def count(
    flags: argparse.Namespace,
    languages: int,
    layers: int | None,
    kind: Kind,
    place: Slice | None = None,
) -> Plan:
    """Compile a step for virtual CPU devices, or for chips, and count what it costs."""
    return plan(*_settings(flags, languages, layers, kind), place)


def _settings(
    flags: argparse.Namespace, languages: int, layers: int | None, kind: Kind
) -> tuple[Config, DecoderConfig, Callable[..., GradientSource]]:
    plain = kind.engine == "plain"
    config = Config(
        output="unused",
        model=ModelConfig(
            source=flags.model,
            trainable=flags.trainable,
            dtype=flags.dtype,
            param_dtype=flags.param_dtype,
            remat=flags.remat,
        ),
        data=DataConfig(
            source="unused",
            seen=[f"l{i}" for i in range(languages)],
            batch_size=flags.batch_size,
            sequence_length=flags.sequence_length,
            packing=flags.packing,
        ),
        lora=LoraConfig(rank=flags.lora),
        resolve=ResolveConfig(
            aggregator=kind.aggregator,
            blocks=kind.blocks,
            gram=kind.gram,
            keep="gradients" if kind.gram == "exact" else flags.keep,
            engine="backward" if plain else kind.engine,
        ),
        # A constant rate and no clipping, so that other code bases can do the same.
        optimizer=OptimizerConfig(
            learning_rate=flags.learning_rate,
            decay="constant",
            clip_norm=None,
            moment_dtype=flags.moment_dtype,
        ),
        train=TrainConfig(steps=1000),
        mesh=MeshConfig(language=flags.language, data=flags.replicas),
    )
    if plain:
        return ordinary(config), shape(flags, layers), ordinary_gradients
    return config, shape(flags, layers), make_gradients
