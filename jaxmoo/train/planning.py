"""What a run will cost, found by compiling its step for devices that need not exist.

The step is the trainer's own, compiled for arrays that are shapes only: no weights are read, no
data, and nothing is downloaded. It is compiled for virtual CPUs, where half precision is partly
computed in float32 and attention is not fused, so that on an accelerator temporaries are mostly
smaller; or, by its own compiler, for a chip that need not be here either.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxmoo import mesh
from jaxmoo.config import Config, validate
from jaxmoo.engine import cost
from jaxmoo.engine.jaxprs import inner_jaxprs
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf import load_config as load_model_config
from jaxmoo.models import Decoder, DecoderConfig
from jaxmoo.models.paths import STACKED, named_leaves, parameter_counts
from jaxmoo.models.presets import preset
from jaxmoo.platforms import platform_of
from jaxmoo.runs.trained_parameters import check_model, run_segments, split_model
from jaxmoo.runtime.compiled import compiler_options
from jaxmoo.slices import by_slice
from jaxmoo.train.chip_plan import ChipPlan
from jaxmoo.train.chips import Slice, answering_for, compile_for
from jaxmoo.train.gradient_source import GradientSource, make_gradients
from jaxmoo.train.optimizer import make_optimizer
from jaxmoo.train.plan_table import (
    ACTIVATIONS,
    GRADIENT,
    OBJECTIVES,
    OPTIMISER,
    OTHER,
    PARAMETERS,
    REST,
    STACK,
    TAPS,
    Plan,
)
from jaxmoo.train.setup import make_run_mesh, run_attention, step_spec
from jaxmoo.train.step import TrainState, abstract_state, compiled_step

__all__ = [
    "AbstractStep",
    "Plan",
    "abstract_step",
    "bytes_sent",
    "plan",
    "shape_of",
]


class AbstractStep(NamedTuple):
    """A training step and the shapes of what it is called with.

    Attributes:
      function: the jitted step.
      arguments: its (state, frozen, batch): shapes, dtypes and shardings.
      gradients: where its gradient comes from.
      device_mesh: the devices.
      slices: among how many slices they are divided.
      attention: its implementation.
    """

    function: Any
    arguments: tuple[TrainState, Any, Any]
    gradients: GradientSource
    device_mesh: Mesh
    slices: int
    attention: str


def plan(
    config: Config,
    architecture: DecoderConfig | None = None,
    gradients: Callable[..., GradientSource] = make_gradients,
    place: Slice | None = None,
) -> Plan:
    """Compile the step of a run and count what it costs.

    It is planned for the devices that JAX has; ``jax.config.update("jax_num_cpu_devices", n)``,
    before JAX is used, makes as many as one likes. With ``place`` it is planned for chips, by their
    own compiler.

    Args:
      config: the run's settings.
      architecture: the model's sizes; by default those of ``config.model.source``, as
        :func:`shape_of` finds them.
      gradients: where the step's gradient comes from.
      place: chips that need not be here, from :func:`jaxmoo.train.chips.slice_of`.

    Returns:
      What a step needs, per device; :meth:`Plan.table` shows it.

    Raises:
      ConfigError: the settings contradict each other, the model or the devices, or the compiler
        for the chips is not installed.
      ChipFullError: the program does not fit the chips, and their compiler makes none.
    """
    validate(config)
    if architecture is None:
        architecture = shape_of(config.model.source)
    with contextlib.nullcontext() if place is None else answering_for(place.chip):
        devices = None if place is None else place.devices()
        step = abstract_step(config, architecture, gradients, devices=devices)
        traced = step.function.trace(*step.arguments)
    begun = time.perf_counter()
    with _partitioned(step):
        if place is None:
            compiled = cost.compile_to_count(traced.lower())
        else:
            compiled = compile_for(place, traced)
    seconds = time.perf_counter() - begun
    chip = None
    if place is not None:
        chip = ChipPlan.of(place, list(step.device_mesh.devices.flat), compiled, step.slices)
        collectives = {kind: sent.bytes for kind, sent in chip.sent.items()}
    else:
        collectives = bytes_sent(step, traced, compiled)
    memory = cost.memory(compiled)
    late = _late(step)
    counted = cost.flops(traced.jaxpr, step.device_mesh.size)
    return Plan(
        axes=dict(step.device_mesh.shape),
        blocks=len(step.gradients.partition),
        memory=_memory_by_kind(step, traced.jaxpr.jaxpr, memory, sum(late.values())),
        total=memory["peak"],
        collectives=collectives,
        flops=counted["total"] + _head_flops(architecture, step),
        late=late,
        compile_seconds=seconds,
        attention=step.attention,
        parameters=parameter_counts(architecture),
        chip=chip,
    )


@contextlib.contextmanager
def _partitioned(step: AbstractStep) -> Iterator[None]:
    """Choose a partitioner that survives the step.

    That of jaxlib 0.11, Shardy, ends its process with a segmentation fault on ordinary training of
    several devices; 0.10 and 0.12 do not.
    """
    engine = step.gradients.engine
    ordinary = engine is not None and engine.rules.groups is None
    platform = platform_of(step.device_mesh.devices.flat)
    if not ordinary or jax.__version_info__[:2] != (0, 11) or platform == "tpu":
        yield
        return
    settings: Any = jax.config  # whose names are made when JAX is imported
    before = settings.jax_use_shardy_partitioner
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        yield
    finally:
        jax.config.update("jax_use_shardy_partitioner", before)


def shape_of(source: str) -> DecoderConfig:
    """Return a model's sizes without downloading anything.

    Args:
      source: a directory with a ``config.json``, or a name that
        :func:`jaxmoo.models.presets.preset` knows.

    Raises:
      ConfigError, CheckpointError: it is neither, or cannot be read.
    """
    return load_model_config(typed_path(source)) if typed_path(source).is_dir() else preset(source)


def abstract_step(
    config: Config,
    architecture: DecoderConfig,
    gradients: Callable[..., GradientSource] = make_gradients,
    attention: str | None = None,
    devices: Sequence[Any] | None = None,
) -> AbstractStep:
    """Build the trainer's step around shapes in the place of arrays.

    Args:
      config: the run's settings.
      architecture: the model's sizes.
      gradients: where the step's gradient comes from.
      attention: implementation of attention; by default the run's own, and on a CPU the one that
        can be compiled for it.
      devices: the devices; see :func:`jaxmoo.mesh.make_mesh`.

    Raises:
      ConfigError: the settings contradict each other, the model or the devices.
    """
    check_model(config, architecture)
    device_mesh = make_run_mesh(config, devices)
    model, platform = config.model, platform_of(device_mesh.devices.flat)
    if attention is None:
        # A plan for CPUs stands in for that of a device that has what the settings name.
        on_cpu = platform == "cpu"
        attention = "xla" if on_cpu else run_attention(config, architecture, device_mesh)
    decoder = Decoder.abstract(
        architecture,
        segments=run_segments(config, architecture),
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.dtype(model.param_dtype),
        remat=model.remat,
        attention=attention,
        platform=platform,
    )
    graph, params, frozen = split_model(config, decoder)

    def place(tree: Any) -> Any:
        return _with_sharding(tree, mesh.parameter_shardings(device_mesh, tree, stacked=STACKED))

    params, frozen = place(params), place(frozen)
    source = gradients(config, lambda p, f: nnx.merge(graph, p, f), params, frozen, device_mesh)
    optimizer = make_optimizer(config)
    state = abstract_state(
        source, optimizer, params, device_mesh, ema=config.optimizer.ema is not None
    )
    rows = mesh.batch_sharding(device_mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for name, (shape, dtype) in step_spec(config.data).items()
    }
    function = compiled_step(
        source,
        optimizer,
        state,
        device_mesh,
        ema=config.optimizer.ema,
        options=compiler_options(list(device_mesh.devices.flat), config.train.compiler_options),
    )
    return AbstractStep(
        function,
        (state, frozen, batch),
        source,
        device_mesh,
        len(by_slice(list(device_mesh.devices.flat), config.mesh.slices)),
        decoder.attention,
    )


def _with_sharding(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _nbytes(tree: Any) -> int:
    """Bytes of one device's pieces."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _memory_by_kind(
    step: AbstractStep, jaxpr: Any, memory: dict[str, int], late: int
) -> dict[str, int]:
    state, frozen, batch = step.arguments
    kinds = {
        PARAMETERS: _nbytes(state.params) + _nbytes(frozen),
        OPTIMISER: _nbytes((state.opt_state, state.ema)),
        GRADIENT: _nbytes(state.params),
    }
    engine = step.gradients.engine
    if engine is None:
        k = len(batch["tokens"])
        shardings = mesh.objective_shardings(step.device_mesh, state.params, stacked=STACKED)
        stack = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct((k, *x.shape), x.dtype, sharding=s),
            state.params,
            shardings,
        )
        kinds[STACK] = _nbytes(stack)
    else:
        size, _ = engine.usage(state.params, batch, frozen).largest_call()
        trained = [layout for layout in engine.layouts if layout.labels is not None]
        itemsize = max(trained, key=lambda layout: layout.size).gathered_dtype.itemsize
        top = engine.topology
        # Whole arrays of this device's languages, then its pieces of all languages.
        held = top.local_objectives + top.objectives / top.pieces
        held /= step.device_mesh.shape[mesh.TENSOR]
        kinds[OBJECTIVES] = round(size * itemsize * held) if engine.rules.groups else 0
        kinds[TAPS] = late
    kinds[ACTIVATIONS] = round(_kept(jaxpr, step.device_mesh))
    kinds[REST] = memory["arguments"] - kinds[PARAMETERS] - kinds[OPTIMISER]
    # What does not exist at the worst moment, such as during the optimiser's update, is left out.
    for kind in (OBJECTIVES, ACTIVATIONS):
        excess = max(0, sum(kinds.values()) - memory["peak"])
        kinds[kind] = max(0, kinds.get(kind, 0) - excess)
    kinds[OTHER] = max(0, memory["peak"] - sum(kinds.values()))
    return {kind: size for kind, size in kinds.items() if size}


def bytes_sent(step: AbstractStep, traced: Any, compiled: Any) -> dict[str, int]:
    """Count the bytes that a step sends; see :func:`jaxmoo.engine.cost.collective_bytes`.

    Args:
      step: from :func:`abstract_step`.
      traced: ``step.function.trace(*step.arguments)``.
      compiled: ``traced.lower().compile()``.
    """
    engine = step.gradients.engine
    layouts = () if engine is None or step.device_mesh.shape[mesh.TENSOR] > 1 else engine.layouts
    if any(layout.gathered_dtype == jnp.bfloat16 for layout in layouts):
        # Programs compiled for the CPU send bfloat16 as float32.
        return cost.traced_collective_bytes(traced.jaxpr, step.slices)
    return cost.collective_bytes(compiled, step.slices)


def _late(step: AbstractStep) -> dict[str, int]:
    """Paths of arrays whose gradients [K, piece] are kept until the end of the pass, and bytes."""
    engine = step.gradients.engine
    state, frozen, batch = step.arguments
    return {} if engine is None else engine.kept_bytes(engine.usage(state.params, batch, frozen))


def _kept(jaxpr: Any, device_mesh: Mesh, divided: int = 1) -> float:
    """Bytes per device that loops over layers stack up in the forward pass."""
    total = 0.0
    for equation in jaxpr.eqns:
        stack = str(equation.source_info.name_stack)
        if equation.primitive.name == "scan" and "jvp" in stack and "transpose" not in stack:
            (body,) = inner_jaxprs(equation)
            # What is stacked up has one axis more than a round's; what is carried has not.
            stacked = [
                x.aval
                for x, one in zip(equation.outvars, body.outvars, strict=True)
                if x.aval.ndim > one.aval.ndim
            ]
            nbytes = sum(x.size * x.dtype.itemsize for x in stacked)
            total += nbytes * divided / device_mesh.size
            continue
        if equation.primitive.name == "shard_map":
            divided = math.prod(cost.divided_axes(equation).values())
        total += sum(_kept(sub, device_mesh, divided) for sub in inner_jaxprs(equation))
    return total


def _head_flops(architecture: DecoderConfig, step: AbstractStep) -> float:
    """Work of the head, whose loops end with a row's last target: here, with its last token."""
    state, _, batch = step.arguments
    module = "embed_tokens" if architecture.tie_word_embeddings else "lm_head"
    trained = (module, "embedding") in [path for path, _ in named_leaves(state.params)]
    # Scores and the hidden states' gradient; where the table is trained, scores once more and its
    # gradient.
    products = 4 if trained else 2
    tokens = batch["tokens"].size / step.device_mesh.size
    return products * 2.0 * tokens * architecture.vocab_size * architecture.hidden_size
