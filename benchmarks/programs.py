"""Training steps to compare: plain, in-backward and stacked, all made by the trainer's own code."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from jaxmoo.train.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    ResolveConfig,
    TrainConfig,
)
from jaxmoo.train.gradients import GradientSource, engine_source, make_gradients
from jaxmoo.train.plan import AbstractStep, abstract_step, shape_of

KINDS = ("layer", "module", "leaf", "bytes:25MiB", "shard")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for what all compared steps have in common."""
    parser.add_argument("--model", default="SmolLM2-135M", help="published model or directory")
    parser.add_argument("--layers", type=int, help="another number of layers than the model's")
    parser.add_argument("--untied", action="store_true", help="a head of its own")
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices (1)")
    parser.add_argument("--batch-size", type=int, default=1, help="examples per language (1)")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens (128)")
    parser.add_argument("--language", type=int, help="size of the mesh axis of this name")
    parser.add_argument("--dtype", default="float32", help="precision of the computation")
    parser.add_argument("--remat", default="full", help="what the backward pass computes again")
    parser.add_argument("--aggregators", nargs="*", default=["cagrad"])
    parser.add_argument("--blocks", nargs="*", default=list(KINDS))
    parser.add_argument("--no-stacked", action="store_true", help="leave out the stacked path")
    parser.add_argument("--json", help="file for the numbers")


def contestants(flags: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(engine, aggregator, blocks) of every step that is compared with plain training."""
    found = [("backward", method, kind) for kind in flags.blocks for method in flags.aggregators]
    stacked = [] if flags.no_stacked else [("stacked", flags.aggregators[0], flags.blocks[0])]
    return found + stacked


def step(
    flags: argparse.Namespace, languages: int, engine: str, method: str, blocks: str
) -> AbstractStep:
    """Build a step.

    Args:
      flags: see :func:`add_flags`.
      languages: K.
      engine: "backward", "stacked", or "plain" for ordinary training on the same tokens as one
        batch, by the same code.
      method: an aggregator.
      blocks: kind of blocks.
    """
    plain = engine == "plain"
    k = 1 if plain else languages
    model = shape_of(flags.model)
    model = dataclasses.replace(
        model,
        num_hidden_layers=flags.layers or model.num_hidden_layers,
        tie_word_embeddings=model.tie_word_embeddings and not flags.untied,
    )
    config = Config(
        output="unused",
        model=ModelConfig(source=flags.model, dtype=flags.dtype, remat=flags.remat),
        data=DataConfig(
            source="unused",
            seen=[f"l{i}" for i in range(k)],
            batch_size=flags.batch_size * languages // k,
            sequence_length=flags.sequence_length,
        ),
        resolve=ResolveConfig(
            aggregator=method, blocks=blocks, engine="backward" if plain else engine
        ),
        train=TrainConfig(steps=1000),
        mesh=MeshConfig(language=None if plain else flags.language),
    )
    return abstract_step(config, model, gradients=_plain if plain else make_gradients)


def _plain(*arguments: Any) -> GradientSource:
    """The engine without per-language gradients."""
    engine = make_gradients(*arguments).engine
    assert engine is not None
    engine = dataclasses.replace(engine, rules=dataclasses.replace(engine.rules, groups=None))
    return engine_source(engine)
