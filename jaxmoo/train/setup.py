"""Everything a run needs before its first step, each part checked before the next is begun."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo import mesh
from jaxmoo.data import Corpus, LanguageBatches
from jaxmoo.errors import ConfigError
from jaxmoo.hf import load_config as load_model_config
from jaxmoo.hf import load_model, resolve_source
from jaxmoo.models import Decoder, segments_for, token_nll, trainable_filter
from jaxmoo.train.config import Config
from jaxmoo.train.data import load_data
from jaxmoo.train.gradients import STACKED, GradientSource, make_gradients
from jaxmoo.train.step import TrainState, compiled_step, initial_state, make_optimizer

__all__ = ["Setup", "prepare"]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What :func:`prepare` put together.

    Attributes:
      source: directory of the model that is fine-tuned, in Hugging Face format.
      corpus: tokenised examples.
      batches: training batches by step.
      device_mesh: how the devices are arranged.
      state: the state before the first step; the first step consumes it.
      frozen: parameters that stay as they are.
      gradients: how a step comes by its gradient.
      step: the compiled training step.
      nll: compiled ``(params, frozen, batch) -> [B, S]`` per-token negative log-likelihood, which
        every process can read.
      merge: ``(params, frozen) -> Decoder``.
    """

    source: Path
    corpus: Corpus
    batches: LanguageBatches
    pad_id: int
    device_mesh: Mesh
    state: TrainState
    frozen: Any
    gradients: GradientSource
    step: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]
    nll: Callable[[Any, Any, Any], jax.Array]
    merge: Callable[[Any, Any], Decoder]


def make_run_mesh(config: Config) -> Mesh:
    """Arrange the devices as the settings say.

    Raises:
      ConfigError: the devices, or the examples of a step, cannot be divided so.
    """
    sizes = config.mesh
    device_mesh = mesh.make_mesh(
        len(config.data.seen),
        language=sizes.language,
        fsdp=sizes.fsdp,
        data=sizes.data,
        tensor=sizes.tensor,
    )
    data, fsdp = device_mesh.shape[mesh.DATA], device_mesh.shape[mesh.FSDP]
    parts = data * fsdp * config.train.microbatches
    if config.data.batch_size % parts:
        raise ConfigError(
            f"data.batch_size ({config.data.batch_size}) must be a multiple of {parts}: mesh axes "
            f"data ({data}) x fsdp ({fsdp}) x train.microbatches ({config.train.microbatches}) "
            "each take an equal share of a language's examples."
        )
    return device_mesh


def prepare(config: Config, say: Callable[[str], None] = print) -> Setup:
    """Load data and model and build the training step.

    Cheap checks come before expensive work: settings, data, then weights.

    Args:
      config: the run's settings.
      say: called with lines that tell a person what is going on.

    Raises:
      JaxmooError: anything that would make the run fail or be wrong.
    """
    data, model = config.data, config.model
    device_mesh = make_run_mesh(config)
    source = resolve_source(model.source)
    architecture = load_model_config(source)
    if data.sequence_length > architecture.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length is {data.sequence_length}, but {model.source} reads at most "
            f"{architecture.max_position_embeddings} tokens."
        )
    segments = segments_for(architecture, model.trainable)

    loaded = load_data(config, source, say)

    decoder = load_model(
        source,
        segments=segments,
        dtype=jax.numpy.dtype(model.dtype),
        param_dtype=jax.numpy.dtype(model.param_dtype),
        remat=model.remat,
        shardings=lambda state: mesh.parameter_shardings(device_mesh, state, stacked=STACKED),
    )
    graph, params, frozen = nnx.split(decoder, trainable_filter(model.trainable), ...)

    def merge(params: Any, frozen: Any) -> Decoder:
        return nnx.merge(graph, params, frozen)

    gradients = make_gradients(config, merge, params, frozen, device_mesh)
    optimizer = make_optimizer(config)
    state = initial_state(gradients, optimizer, params, device_mesh)

    return Setup(
        source=source,
        corpus=loaded.corpus,
        batches=loaded.batches,
        pad_id=loaded.batches.pad_id,
        device_mesh=device_mesh,
        state=state,
        frozen=frozen,
        gradients=gradients,
        step=compiled_step(gradients, optimizer, state, device_mesh),
        nll=jax.jit(
            lambda params, frozen, batch: token_nll(merge(params, frozen), batch),
            out_shardings=NamedSharding(device_mesh, P()),
        ),
        merge=merge,
    )
