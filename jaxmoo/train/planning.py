"""What a run will cost, found by compiling its step for devices that need not exist.

The step is the trainer's own, compiled for arrays that are shapes only: no weights are read, no
data, and nothing is downloaded. Programs are compiled for the CPU. There, half precision is partly
computed in float32 and attention is not fused, so on an accelerator temporaries are mostly smaller.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxmoo import mesh
from jaxmoo.config import Config, validate
from jaxmoo.data.table import plain_table
from jaxmoo.engine import cost
from jaxmoo.engine.jaxprs import inner_jaxprs
from jaxmoo.hf import load_config as load_model_config
from jaxmoo.models import Decoder, DecoderConfig
from jaxmoo.models.paths import STACKED, named_leaves
from jaxmoo.models.presets import preset
from jaxmoo.platforms import platform_of
from jaxmoo.runs.trained_parameters import check_model, run_segments, split_model
from jaxmoo.sizes import format_size
from jaxmoo.train.gradient_source import GradientSource, make_gradients
from jaxmoo.train.optimizer import make_optimizer
from jaxmoo.train.setup import make_run_mesh, step_spec
from jaxmoo.train.step import TrainState, abstract_state, compiled_step

__all__ = [
    "AbstractStep",
    "Plan",
    "abstract_step",
    "bytes_sent",
    "plan",
    "shape_of",
]

PARAMETERS = "parameters"
OPTIMISER = "optimiser state"
GRADIENT = "resolved gradient"
OBJECTIVES = "per-language gradients of one block"
TAPS = "per-language gradients kept until the end of the pass"
STACK = "per-language gradients of everything"
ACTIVATIONS = "activations kept for the backward pass"
OTHER = "other temporaries"
REST = "batch and diagnostics"

# What makes each of them smaller.
_REMEDIES = {
    PARAMETERS: "use more devices, or model.param_dtype=bfloat16",
    OPTIMISER: "use more devices, or train fewer parameters (model.trainable, lora.rank)",
    GRADIENT: "use more devices, or train fewer parameters (model.trainable, lora.rank)",
    OBJECTIVES: "use smaller blocks (resolve.blocks=module, or more resolve.vocabulary_slices)",
    TAPS: "use blocks that one layer holds (resolve.blocks=layer) and "
    "train.accumulation=resolve_each",
    STACK: "use resolve.engine=backward",
    ACTIVATIONS: "use model.remat=full, more train.microbatches, or a smaller data.batch_size or "
    "data.sequence_length",
    OTHER: "use more train.microbatches, or a smaller data.batch_size or data.sequence_length",
    REST: "use a smaller data.batch_size",
}


class AbstractStep(NamedTuple):
    """A training step and the shapes of what it is called with.

    Attributes:
      function: the jitted step.
      arguments: its (state, frozen, batch): shapes, dtypes and shardings.
      gradients: where its gradient comes from.
      device_mesh: the devices.
    """

    function: Any
    arguments: tuple[TrainState, Any, Any]
    gradients: GradientSource
    device_mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step costs; per device throughout.

    Attributes:
      axes: sizes of the mesh axes.
      blocks: number of blocks.
      memory: bytes by kind; they add up to ``total``. Arguments and late gradients are exact,
        activations are what the loops over layers keep, gradients of one block are those of the
        largest call; everything else is "other".
      total: bytes at the worst moment.
      collectives: bytes sent by kind; see :func:`jaxmoo.engine.cost.collective_bytes`.
      flops: floating-point operations of a step, if every token is a target.
      late: paths and bytes of parameters whose blocks are resolved after the backward pass.
      compile_seconds: how long the compiler took.
    """

    axes: dict[str, int]
    blocks: int
    memory: dict[str, int]
    total: int
    collectives: dict[str, int]
    flops: float
    late: dict[str, int]
    compile_seconds: float

    def advice(self, device_memory: int) -> str:
        """Say whether the step fits a device, and if not what to change.

        Args:
          device_memory: bytes.
        """
        needed, there = format_size(self.total), format_size(device_memory)
        if self.total <= device_memory:
            return f"Fits: {needed} of {there} per device."
        kind, size = max(self.memory.items(), key=lambda item: item[1])
        return (
            f"Does not fit: {needed} needed, {there} there. The largest part is {kind} "
            f"({format_size(size)}): {_REMEDIES[kind]}."
        )

    def table(self) -> str:
        """Return the plan as text."""
        shape = " x ".join(f"{name} {size}" for name, size in self.axes.items())
        lines = [f"{math.prod(self.axes.values())} devices ({shape}), {self.blocks} blocks", ""]
        memory = {**self.memory, "total": self.total}
        lines += [_rows("memory per device", memory)]
        if self.late:
            lines += ["", _rows("resolved after the backward pass", self.late)]
        sent = {**self.collectives, "total": sum(self.collectives.values())}
        lines += ["", _rows("sent per device and step", sent)]
        lines += ["", f"{self.flops / 1e12:,.2f} TFLOP per device and step"]
        lines += [
            f"compiled in {self.compile_seconds:.0f} s for CPUs: elsewhere temporaries of bfloat16 "
            "and of attention are smaller"
        ]
        return "\n".join(lines)


def plan(
    config: Config,
    architecture: DecoderConfig | None = None,
    gradients: Callable[..., GradientSource] = make_gradients,
) -> Plan:
    """Compile the step of a run and count what it costs.

    It is planned for the devices that JAX has; ``jax.config.update("jax_num_cpu_devices", n)``,
    before JAX is used, makes as many as one likes.

    Args:
      config: the run's settings.
      architecture: the model's sizes; by default those of ``config.model.source``, as
        :func:`shape_of` finds them.
      gradients: where the step's gradient comes from.

    Returns:
      What a step needs, per device; :meth:`Plan.table` shows it.

    Raises:
      ConfigError: the settings contradict each other, the model or the devices.
    """
    validate(config)
    if architecture is None:
        architecture = shape_of(config.model.source)
    step = abstract_step(config, architecture, gradients)
    begun = time.perf_counter()
    traced = step.function.trace(*step.arguments)
    compiled = cost.compile_to_count(traced.lower())
    seconds = time.perf_counter() - begun
    memory = cost.memory(compiled)
    late = _late(step)
    counted = cost.flops(traced.jaxpr, step.device_mesh.size)
    return Plan(
        axes=dict(step.device_mesh.shape),
        blocks=len(step.gradients.partition),
        memory=_memory_by_kind(step, traced.jaxpr.jaxpr, memory, sum(late.values())),
        total=memory["peak"],
        collectives=bytes_sent(step, traced, compiled),
        flops=counted["total"] + _head_flops(architecture, step),
        late=late,
        compile_seconds=seconds,
    )


def shape_of(source: str) -> DecoderConfig:
    """Return a model's sizes without downloading anything.

    Args:
      source: a directory with a ``config.json``, or a name that
        :func:`jaxmoo.models.presets.preset` knows.

    Raises:
      ConfigError, CheckpointError: it is neither, or cannot be read.
    """
    return load_model_config(Path(source)) if Path(source).is_dir() else preset(source)


def abstract_step(
    config: Config,
    architecture: DecoderConfig,
    gradients: Callable[..., GradientSource] = make_gradients,
    attention: str = "xla",
) -> AbstractStep:
    """Build the trainer's step around shapes in the place of arrays.

    Args:
      config: the run's settings.
      architecture: the model's sizes.
      gradients: where the step's gradient comes from.
      attention: implementation of attention; by default the one that can be compiled for the CPU.

    Raises:
      ConfigError: the settings contradict each other, the model or the devices.
    """
    check_model(config, architecture)
    device_mesh = make_run_mesh(config)
    model = config.model
    decoder = Decoder.abstract(
        architecture,
        segments=run_segments(config, architecture),
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.dtype(model.param_dtype),
        remat=model.remat,
        attention=attention,
        platform=platform_of(device_mesh.devices.flat),
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
    function = compiled_step(source, optimizer, state, device_mesh, ema=config.optimizer.ema)
    return AbstractStep(function, (state, frozen, batch), source, device_mesh)


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
        return cost.traced_collective_bytes(traced.jaxpr)
    return cost.collective_bytes(compiled)


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


def _rows(title: str, items: dict[str, int]) -> str:
    rows = [[name, format_size(count)] for name, count in items.items()]
    return f"{title}\n{textwrap.indent(plain_table(rows, ('left', 'right')), '  ')}"
