"""Everything a run needs before its first step, each part checked before the next is begun."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo import mesh
from jaxmoo.config import Config, DataConfig
from jaxmoo.data import Corpus, LanguageBatches, batch_spec
from jaxmoo.data.load import RunData, load_data, make_batches
from jaxmoo.data.tokenization.tokenizer import ending_token
from jaxmoo.errors import ConfigError
from jaxmoo.evaluate import Evaluator
from jaxmoo.hf import load_config as load_model_config
from jaxmoo.hf import resolve_source
from jaxmoo.models import Decoder, DecoderConfig
from jaxmoo.models.attention import choose_attention
from jaxmoo.models.lora import initial_adapters
from jaxmoo.models.paths import STACKED
from jaxmoo.platforms import platform_of
from jaxmoo.resolver_state import seeded
from jaxmoo.runs.fingerprint import fingerprint
from jaxmoo.runs.trained_parameters import (
    check_model,
    given_adapters,
    load_base,
    run_segments,
    split_model,
)
from jaxmoo.runtime.compiled import compiler_options, distrust_on_cpus
from jaxmoo.runtime.memory import check_host_memory
from jaxmoo.sketched import is_small, sketch_size
from jaxmoo.train.condition import check_finite, examine
from jaxmoo.train.gradient_source import GradientSource, make_gradients
from jaxmoo.train.kept import Kept, corpus_key, program_key, weights_key
from jaxmoo.train.optimizer import make_optimizer
from jaxmoo.train.step import TrainState, abstract_state, compiled_step, initial_state
from jaxmoo.train.throughput import model_flops

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Setup", "check_devices", "make_run_mesh", "prepare", "run_attention", "step_spec"]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What :func:`prepare` put together.

    Attributes:
      source: directory of the model that is fine-tuned, in Hugging Face format.
      model: its sizes and constants.
      base: fingerprint of its parameters that are not trained.
      corpus: tokenised examples.
      batches: training batches by step.
      tokenizer: with the chat template that is used.
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
    tokenizer: PreTrainedTokenizerFast
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
        slices=sizes.slices,
        devices=devices,
    )
    _check_examples(config, device_mesh.shape[mesh.DATA], device_mesh.shape[mesh.FSDP])
    return device_mesh


def check_devices(config: Config, devices: int) -> None:
    """Raise unless a run can be divided among so many devices; none is asked for.

    Raises:
      ConfigError: as :func:`make_run_mesh`.
    """
    sizes = config.mesh
    data, _, fsdp, _ = mesh.mesh_shape(
        config.data.step_languages,
        devices,
        language=sizes.language,
        fsdp=sizes.fsdp,
        data=sizes.data,
        tensor=sizes.tensor,
    )
    _check_examples(config, data, fsdp)


def _check_examples(config: Config, data: int, fsdp: int) -> None:
    parts = data * fsdp * config.train.microbatches
    if config.data.batch_size % parts:
        raise ConfigError(
            f"data.batch_size ({config.data.batch_size}) must be a multiple of {parts}: mesh axes "
            f"data ({data}) x fsdp ({fsdp}) x train.microbatches ({config.train.microbatches}) "
            "each take an equal share of a language's examples."
        )


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
        name,
        head_dim=architecture.head_dim,
        dtype=config.model.dtype,
        platform=platform,
        soft_cap=architecture.attn_logit_softcapping,
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


def prepare(
    config: Config, say: Callable[[str], None] = print, *, kept: Kept | None = None
) -> Setup:
    """Load data and model and build the training step.

    Cheap checks come before expensive work: settings, data, then weights.

    Args:
      config: the run's settings.
      say: called with lines that tell a person what is going on.
      kept: what earlier runs of this process had in common with this one, and later ones may have;
        memory holds a second copy of the trained parameters then. None keeps nothing.

    Raises:
      JaxmooError: anything that would make the run fail or be wrong.
    """
    data, model = config.data, config.model
    device_mesh = make_run_mesh(config)
    distrust_on_cpus(list(device_mesh.devices.flat))
    arrays = step_spec(data).values()
    size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays)
    what = "a batch of data.batch_size x data.sequence_length x languages"
    check_host_memory(size // jax.process_count(), what)
    source = resolve_source(model.source)
    architecture = load_model_config(source)
    check_model(config, architecture)

    def shardings(tree: Any) -> Any:
        return mesh.parameter_shardings(device_mesh, tree, stacked=STACKED)

    segments = run_segments(config, architecture)
    attention = run_attention(config, architecture, device_mesh)
    say(f"Attention: {attention}.")
    platform = platform_of(device_mesh.devices.flat)
    _tell_of_sketches(config, say)
    options = compiler_options(list(device_mesh.devices.flat), config.train.compiler_options)
    if options:
        named = ", ".join(f"{name}={value}" for name, value in options.items())
        say(f"Compiler options of the training step (train.compiler_options): {named}.")
    shapes = split_model(config, Decoder.abstract(architecture, segments=segments))[1]
    adapters = given_adapters(config, shapes, shardings)
    parts = Kept() if kept is None else kept
    rows = mesh.local_rows(device_mesh, data.step_languages, data.batch_size)
    reads = [code for code, mine in zip(data.seen, rows, strict=False) if mine.any()]
    loaded = _data(config, source, say, kept, reads)
    weights = parts.part(
        "weights",
        weights_key(config),
        lambda: _weights(config, source, attention, platform, device_mesh, shardings),
    )
    params, merge = weights.params, weights.merge
    if config.lora.rank is not None:
        if adapters is None:
            adapters = initial_adapters(
                params, config.seed, shardings(params), frozen=weights.frozen
            )
        params = adapters
        _check_weights(config, source, params, {}, device_mesh)
    elif kept is not None:  # a step consumes its state
        params = jax.tree.map(jnp.copy, params)
    program = parts.part(
        "programs",
        program_key(config),
        lambda: _program(config, weights, params, device_mesh, options, shared=kept is not None),
        most=64,
    )
    state = initial_state(
        program.gradients,
        program.optimizer,
        params,
        device_mesh,
        ema=config.optimizer.ema is not None,
    )
    step = program.step
    if kept is not None:
        state = state._replace(resolver=seeded(state.resolver, config.seed))
        step = functools.partial(step, rate=np.float32(config.optimizer.learning_rate))
    # About as many rows as a training step has.
    batch_size = data.batch_size * len(data.seen)
    pad_id = loaded.batches.pad_id
    evaluator = parts.part(
        "evaluators",
        (weights_key(config), batch_size, pad_id),
        lambda: Evaluator(
            lambda tree: merge(*tree), device_mesh, batch_size=batch_size, pad_id=pad_id
        ),
    )
    return Setup(
        source=source,
        model=architecture,
        base=weights.base,
        corpus=loaded.corpus,
        batches=loaded.batches,
        tokenizer=loaded.tokenizer,
        device_mesh=device_mesh,
        state=state,
        frozen=weights.frozen,
        gradients=program.gradients,
        step=step,
        evaluator=evaluator,
        merge=merge,
        ending=ending_token(loaded.tokenizer),
        date=loaded.date,
        flops=model_flops(
            architecture,
            params,
            weights.frozen,
            data.step_languages * data.batch_size * data.sequence_length,
            data.sequence_length,
        ),
    )


def _tell_of_sketches(config: Config, say: Callable[[str], None]) -> None:
    """Say that Gram matrices are estimates, and if it is likely that they are poor ones."""
    size = sketch_size(config.resolve.gram)
    if size is None:
        return
    say(
        f"Gram matrices: estimated from sketches of {size:,} numbers per language and block; how "
        "well is in metrics.jsonl (gram_error)."
    )
    languages = config.data.step_languages
    if is_small(size, languages):
        say(
            f"Note: resolve.gram={config.resolve.gram} is small for {languages} languages: the "
            f"weights of some will be noise. Take at least sketch:{100 * languages}, or exact."
        )


def _data(
    config: Config,
    source: Path,
    say: Callable[[str], None],
    kept: Kept | None,
    reads: Sequence[str],
) -> RunData:
    """The run's data; tokenised now, or for an earlier run."""
    if kept is None or config.data.streaming:
        return load_data(config, source, say, reads=reads)
    loaded = kept.part("corpus", corpus_key(config), lambda: load_data(config, source, say))
    batches = make_batches(config, loaded.corpus, loaded.batches.pad_id)
    return dataclasses.replace(loaded, batches=batches)


class _Weights(NamedTuple):
    """A model as its files have it.

    Attributes:
      merge: ``(params, frozen) -> Decoder``.
      params: what is trained; of adapters, shapes only.
      frozen: the others.
      base: fingerprint of `frozen`.
    """

    merge: Callable[[Any, Any], Decoder]
    params: Any
    frozen: Any
    base: str


def _weights(
    config: Config,
    source: Path,
    attention: str,
    platform: str,
    device_mesh: Mesh,
    shardings: Callable[[Any], Any],
) -> _Weights:
    model = config.model
    decoder = load_base(
        config,
        source,
        shardings=shardings,
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.dtype(model.param_dtype),
        remat=model.remat,
        attention=attention,
        platform=platform,
    )
    graph, params, frozen = split_model(config, decoder)
    trained = {} if config.lora.rank is not None else params
    _check_weights(config, source, trained, frozen, device_mesh)
    base = fingerprint(frozen, NamedSharding(device_mesh, P()))
    return _Weights(functools.partial(nnx.merge, graph), params, frozen, base)


class _Program(NamedTuple):
    """What turns batches into updates."""

    gradients: GradientSource
    optimizer: Any
    step: Callable[..., Any]


def _program(
    config: Config,
    weights: _Weights,
    params: Any,
    device_mesh: Mesh,
    options: Mapping[str, Any],
    *,
    shared: bool,
) -> _Program:
    """The training step, compiled with options; `shared`, it is told the learning rate."""
    gradients = make_gradients(config, weights.merge, params, weights.frozen, device_mesh)
    if shared:
        config = dataclasses.replace(
            config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1.0)
        )
    optimizer, ema = make_optimizer(config), config.optimizer.ema
    state = abstract_state(gradients, optimizer, params, device_mesh, ema=ema is not None)
    step = compiled_step(gradients, optimizer, state, device_mesh, ema=ema, options=options)
    return _Program(gradients, optimizer, step)


def _check_weights(
    config: Config, source: Path, params: Any, frozen: Any, device_mesh: Mesh
) -> None:
    """Raise where weights are no numbers: no loss of theirs would be finite."""
    adapter = config.lora.adapter
    for tree, where in ((frozen, source), (params, adapter or source)):
        check_finite(
            examine(tree, NamedSharding(device_mesh, P())),
            f"The weights in {where}",
            "The files are damaged, or what made them had diverged; take them from their source "
            "again.",
        )
