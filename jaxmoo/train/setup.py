"""Everything a run needs before its first step, each part checked before the next is begun."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo import mesh
from jaxmoo.config import Config, DataConfig, lora_of
from jaxmoo.data import Corpus, LanguageBatches, batch_spec
from jaxmoo.data.load import load_data
from jaxmoo.data.tokenization.tokenizer import ending_token
from jaxmoo.errors import ConfigError
from jaxmoo.evaluate import Evaluator
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf import load_adapter, load_model, resolve_source
from jaxmoo.hf import load_config as load_model_config
from jaxmoo.models import Decoder, DecoderConfig
from jaxmoo.models.attention import choose_attention
from jaxmoo.models.lora import initial_adapters
from jaxmoo.models.paths import STACKED
from jaxmoo.platforms import platform_of
from jaxmoo.runs.fingerprint import fingerprint
from jaxmoo.runs.trained_parameters import check_model, run_segments, split_model
from jaxmoo.runtime.compiled import compiler_options, distrust_on_cpus
from jaxmoo.runtime.memory import check_host_memory
from jaxmoo.train.condition import check_finite, examine
from jaxmoo.train.gradient_source import GradientSource, make_gradients
from jaxmoo.train.optimizer import make_optimizer
from jaxmoo.train.step import TrainState, compiled_step, initial_state
from jaxmoo.train.throughput import model_flops

__all__ = ["Setup", "make_run_mesh", "prepare", "run_attention", "step_spec"]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What :func:`prepare` put together.

    Attributes:
      source: directory of the model that is fine-tuned, in Hugging Face format.
      model: its sizes and constants.
      base: fingerprint of its parameters that are not trained.
      corpus: tokenised examples.
      batches: training batches by step.
      device_mesh: how the devices are arranged.
      state: the state before the first step; the first step consumes it.
      frozen: parameters that stay as they are.
      gradients: how a step comes by its gradient.
      step: the compiled training step.
      evaluator: scores held-out examples by weights ``(params, frozen)``.
      merge: ``(params, frozen) -> Decoder``.
      ending: the token that ends a reply, or None.
      date: the date that the chat template sees; None where it reads no clock.
      flops: model FLOPs of a step; see :mod:`jaxmoo.train.throughput`.
    """

    source: Path
    model: DecoderConfig
    base: str
    corpus: Corpus
    batches: LanguageBatches
    device_mesh: Mesh
    state: TrainState
    frozen: Any
    gradients: GradientSource
    step: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]
    evaluator: Evaluator
    merge: Callable[[Any, Any], Decoder]
    ending: int | None
    date: str | None
    flops: float

    @property
    def everywhere(self) -> NamedSharding:
        """The sharding of what lies on all devices."""
        return NamedSharding(self.device_mesh, P())


def make_run_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange the devices as the settings say.

    Args:
      config: the run's settings.
      devices: the devices; see :func:`jaxmoo.mesh.make_mesh`.

    Raises:
      ConfigError: the devices, or the examples of a step, cannot be divided so.
    """
    sizes = config.mesh
    device_mesh = mesh.make_mesh(
        config.data.step_languages,
        language=sizes.language,
        fsdp=sizes.fsdp,
        data=sizes.data,
        tensor=sizes.tensor,
        devices=devices,
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


def run_attention(config: Config, architecture: DecoderConfig, device_mesh: Mesh) -> str:
    """Choose the implementation of attention that a run uses on its devices.

    Raises:
      ConfigError: the one that the settings name cannot run on them.
    """
    name, tensor = config.model.attention, config.mesh.tensor
    platform = platform_of(device_mesh.devices.flat)
    # Over the tensor axis only cuDNN's kernel is divided, by heads.
    divided = platform == "gpu" and architecture.num_key_value_heads % tensor == 0
    if name == "auto" and tensor > 1 and not divided:
        name = "xla"
    return choose_attention(
        name, head_dim=architecture.head_dim, dtype=config.model.dtype, platform=platform
    )


def step_spec(data: DataConfig) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return the arrays of a step's batch, as :func:`~jaxmoo.data.batch_spec` does."""
    return batch_spec(
        data.step_languages,
        data.batch_size,
        data.sequence_length,
        packing=data.packing,
        sampled=data.samples,
    )


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
    distrust_on_cpus(list(device_mesh.devices.flat))
    everywhere = NamedSharding(device_mesh, P())
    arrays = step_spec(data).values()
    size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays)
    what = "a batch of data.batch_size x data.sequence_length x languages"
    check_host_memory(size // jax.process_count(), what)
    source = resolve_source(model.source)
    architecture = load_model_config(source)
    check_model(config, architecture)
    segments = run_segments(config, architecture)
    attention = run_attention(config, architecture, device_mesh)
    say(f"Attention: {attention}.")
    platform = platform_of(device_mesh.devices.flat)
    options = compiler_options(platform, config.train.compiler_options)
    if options:
        named = ", ".join(f"{name}={value}" for name, value in options.items())
        say(f"Compiler options of the training step (train.compiler_options): {named}.")

    def shardings(tree: Any) -> Any:
        return mesh.parameter_shardings(device_mesh, tree, stacked=STACKED)

    adapters = _adapters(config, Decoder.abstract(architecture, segments=segments), shardings)

    loaded = load_data(config, source, say)

    decoder = load_model(
        source,
        segments=segments,
        dtype=jax.numpy.dtype(model.dtype),
        param_dtype=jax.numpy.dtype(model.param_dtype),
        remat=model.remat,
        attention=attention,
        platform=platform,
        shardings=shardings,
    )
    graph, params, frozen = split_model(config, decoder)
    if adapters is not None:
        params = adapters

    _check_weights(config, source, params, frozen, everywhere)

    def merge(params: Any, frozen: Any) -> Decoder:
        return nnx.merge(graph, params, frozen)

    gradients = make_gradients(config, merge, params, frozen, device_mesh)
    optimizer = make_optimizer(config)
    state = initial_state(
        gradients, optimizer, params, device_mesh, ema=config.optimizer.ema is not None
    )

    return Setup(
        source=source,
        model=architecture,
        base=fingerprint(frozen, everywhere),
        corpus=loaded.corpus,
        batches=loaded.batches,
        device_mesh=device_mesh,
        state=state,
        frozen=frozen,
        gradients=gradients,
        step=compiled_step(
            gradients,
            optimizer,
            state,
            device_mesh,
            ema=config.optimizer.ema,
            options=options,
        ),
        evaluator=Evaluator(
            lambda weights: merge(*weights),
            device_mesh,
            # About as many rows as a training step has.
            batch_size=data.batch_size * len(data.seen),
            pad_id=loaded.batches.pad_id,
        ),
        merge=merge,
        ending=ending_token(loaded.tokenizer),
        date=loaded.date,
        flops=model_flops(
            architecture,
            params,
            frozen,
            data.step_languages * data.batch_size * data.sequence_length,
            data.sequence_length,
        ),
    )


def _check_weights(
    config: Config, source: Path, params: Any, frozen: Any, everywhere: NamedSharding
) -> None:
    """Raise where weights are no numbers: no loss of theirs would be finite."""
    adapter = config.lora.adapter
    for tree, where in ((frozen, source), (params, adapter or source)):
        check_finite(
            examine(tree, everywhere),
            f"The weights in {where}",
            "The files are damaged, or what made them had diverged; take them from their source "
            "again.",
        )


def _adapters(
    config: Config, abstract: Decoder, shardings: Callable[[Any], Any]
) -> nnx.State | None:
    """The adapters a run begins with, or None when it trains parameters themselves."""
    lora = lora_of(config.lora)
    if lora is None:
        return None
    shapes = split_model(config, abstract)[1]
    if config.lora.adapter is None:
        return initial_adapters(shapes, config.seed, shardings(shapes))
    return load_adapter(typed_path(config.lora.adapter), shapes, lora, shardings(shapes))
