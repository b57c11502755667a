"""What is in a model directory, without reading any weights."""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_dtypes import bfloat16

from jaxmoo.config.training import load_config as load_run_config
from jaxmoo.convert.kinds import kind_of
from jaxmoo.convert.models import stored_tensors
from jaxmoo.data.table import plain_table
from jaxmoo.errors import ConfigError
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.adapter import describe_adapter
from jaxmoo.hf.load import load_config, read_json
from jaxmoo.hf.weights import Weights
from jaxmoo.models import LoRA
from jaxmoo.runs.directory import RunDirectory

__all__ = ["describe"]

Tensors = Mapping[str, tuple[tuple[int, ...], str]]


def describe(path: Path) -> str:
    """Describe a Hugging Face directory, adapters, a checkpoint directory or a training run.

    Args:
      path: the directory.

    Returns:
      Lines for a person to read: architecture, sizes, tensors with shapes and dtypes (the layers'
      together), files.

    Raises:
      CheckpointError: when it is none of these, or damaged.
    """
    path = typed_path(path)
    kind = kind_of(path)
    if kind == "run":
        return _run(RunDirectory(path))
    if kind == "adapter":
        return _adapter(path)
    if kind == "checkpoint":
        title, tensors = "checkpoint directory (Orbax)", stored_tensors(path)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listed = [(file.name, file.stat().st_size) for file in files if file.parent == path]
        inside = [file.stat().st_size for file in files if file.parent != path]
        listed.append((f"params/ ({len(inside)} files)", sum(inside)))
    else:
        title, weights = "Hugging Face directory", Weights(path)
        tensors = {name: (weights.shape(name), weights.dtype(name)) for name in weights.names()}
        listed = [(f.name, f.stat().st_size) for f in sorted(path.iterdir()) if f.is_file()]
    lines = [f"{path}: {title}", *_architecture(path), "", *_tensor_lines(tensors), "", "Files"]
    lines.append(_table([[f"{size:,}", name] for name, size in listed], ("right", "left")))
    return "\n".join(lines)


def _table(rows: list[list[str]], alignment: Sequence[str]) -> str:
    return textwrap.indent(plain_table(rows, alignment), "  ")


def _architecture(path: Path) -> list[str]:
    model_type = read_json(path / "config.json").get("model_type")
    try:
        sizes = dataclasses.asdict(load_config(path))
    except ConfigError as error:
        return [f"model_type {model_type}; {error}"]
    return [f"model_type {model_type}", *(f"  {name}: {value}" for name, value in sizes.items())]


def _tensor_lines(tensors: Tensors) -> list[str]:
    """A row for each kind of tensor: those that differ only in their layer count as one kind."""
    kinds: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for name, (shape, dtype) in tensors.items():
        match = re.search(r"(?<=layers\.)\d+(?=\.)", name)
        kind = name if match is None else f"{name[: match.start()]}*{name[match.end() :]}"
        kinds.setdefault((kind, shape, dtype), []).append(int(match.group()) if match else -1)
    parameters = sum(math.prod(shape) for shape, _ in tensors.values())
    lines = [f"{len(tensors)} tensors, {parameters:,} parameters"]
    totals: dict[str, list[int]] = {}
    for shape, dtype in tensors.values():
        totals.setdefault(dtype, []).append(math.prod(shape) * _itemsize(dtype))
    lines += [f"  {dtype}: {len(s)} tensors, {sum(s):,} bytes" for dtype, s in totals.items()]
    rows = [
        [
            kind,
            f"{dtype}{list(shape)}",
            "" if layers == [-1] else f"layers {_ranges(sorted(layers))}",
        ]
        for (kind, shape, dtype), layers in kinds.items()
    ]
    return [*lines, _table(rows, ("left", "left", "left"))] if rows else lines


def _itemsize(dtype: str) -> int:
    return np.dtype(bfloat16 if dtype == "bfloat16" else dtype).itemsize


def _ranges(numbers: list[int]) -> str:
    """Runs of consecutive numbers: 0-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _adapter(path: Path) -> str:
    found = describe_adapter(path)
    lora = found.lora
    rows = [
        ["of", found.base or "a model that it does not name"],
        ["kind", "DoRA" if lora.dora else "LoRA"],
        ["rank", _by_rank(lora)],
        ["on", f"{', '.join(lora.targets)} of layers {_ranges(list(found.layers))}"],
    ]
    return f"{path}: adapters in PEFT format\n{_table(rows, ('left', 'left'))}"


def _by_rank(lora: LoRA) -> str:
    """Ranks and scales, with the projections that have others than most."""
    own = [
        f"{name} {lora.rank_of(name)}, scale {lora.scale_of(name):g}"
        for name in lora.targets
        if name in lora.rank_pattern or name in lora.alpha_pattern
    ]
    return "; ".join([f"{lora.rank}, scale {lora.scale:g}", *own])


def _run(run: RunDirectory) -> str:
    config = load_run_config(run.config)
    steps = run.steps()
    lora = config.lora
    trains = config.model.trainable
    if lora.rank is not None:
        kind = "adapters with magnitudes (DoRA)" if lora.dora else "adapters"
        trains = f"{kind} of rank {lora.rank} on {', '.join(lora.targets)} of {trains}"
        if lora.quantize_base is not None:
            trains += f", on a base in {lora.quantize_base}"
    return "\n".join(
        [
            f"{run.path}: training run",
            f"  began with: {config.model.source}",
            f"  trains: {trains}",
            f"  languages: {', '.join(config.data.seen)}",
            f"  method: {config.resolve.aggregator}, blocks {config.resolve.blocks}",
            f"  steps: {config.train.steps}",
            f"  checkpoints: {', '.join(map(str, steps)) or 'none'}",
            f"  exported: {'yes' if run.export.is_dir() else 'no'}",
        ]
    )
