"""Adapters to and from the directories of Hugging Face's PEFT library."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from jaxmoo.errors import CheckpointError
from jaxmoo.files.at_hand import at_hand
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.adapter_config import CONFIG_FILE, check_kind, lora_of_file, settings_of
from jaxmoo.hf.adapter_names import GATE_UP, Place, peft_tensor, place_of
from jaxmoo.hf.card import ModelCard
from jaxmoo.hf.directory import read_unchanged
from jaxmoo.hf.expert_adapter import Columns, columns_of, single_tensors, stack_experts
from jaxmoo.hf.fused_adapter import fuse_adapters, plain
from jaxmoo.hf.load import read_json
from jaxmoo.hf.save import Tensor, check_space, state_tensors, write_directory, write_file
from jaxmoo.hf.weights import DTYPES
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.families import FAMILIES
from jaxmoo.models.lora import ADAPTERS, LoRA, adapters
from jaxmoo.models.paths import logical_paths, named_leaves, stacked_axes, trainable_filter

__all__ = ["Adapters", "describe_adapter", "is_adapter", "load_adapter", "save_adapter"]

_WEIGHTS_FILE = "adapter_model.safetensors"


def save_adapter(
    model: Decoder, path: Path, *, base_model: str, card: ModelCard | None = None
) -> None:
    """Write a decoder's adapters as a directory that the ``peft`` library loads.

    It holds ``adapter_config.json`` and ``adapter_model.safetensors``, and appears when all is
    written.

    Args:
      model: the decoder, with adapters. Where they are spread over several processes, all of these
        must call; the first one writes.
      path: the directory to make; it may exist if it is empty.
      base_model: where the model without adapters is to be found: an id on a hub or a directory.
      card: what the README.md in the directory shall say; by default there is none.

    Raises:
      CheckpointError: when the model has no adapters, or is part of a larger one, ``path`` is not
        empty or the disk is full.
    """
    adapted = {path[-1]: linear for _, path, linear in adapters(model)}
    if not adapted:
        raise CheckpointError("the model has no adapters to save")
    family = model.config.family
    if FAMILIES[family].part is not None:  # whose modules PEFT knows by other names
        raise CheckpointError(
            f"adapters of the text model within a larger one ({family}) cannot be written as "
            "adapters. Merge them instead, or adapt the text model alone."
        )
    state = nnx.state(model, trainable_filter(ADAPTERS))
    layers = sorted({int(name.split(".")[1]) for name in _logical(state)})
    first = next(iter(adapted.values()))
    rank, alpha = (
        Counter(values).most_common(1)[0][0]
        for values in zip(*((one.rank, one.alpha) for one in adapted.values()), strict=True)
    )
    everywhere = len(layers) == model.config.num_hidden_layers
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": plain(alpha),
        "rank_pattern": {name: one.rank for name, one in adapted.items() if one.rank != rank},
        "alpha_pattern": {
            name: plain(one.alpha) for name, one in adapted.items() if one.alpha != alpha
        },
        "lora_dropout": 0.0,
        "use_rslora": first.rslora,
        "use_dora": first.lora_magnitude_vector is not None,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(adapted),
        "layers_to_transform": None if everywhere else layers,
        "layers_pattern": None if everywhere else "layers",
        "modules_to_save": None,
        "inference_mode": True,
    }

    def write(directory: Path, tensors: Sequence[Tensor]) -> None:
        check_space(directory, sum(tensor.nbytes for tensor in tensors))
        write_file(directory / _WEIGHTS_FILE, tensors)
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        if card is not None:
            card.write(directory)

    tensors = state_tensors(state, lambda _: np.float32, peft_tensor)
    config, tensors = fuse_adapters(config, tensors, adapted, model.config)
    config, tensors = stack_experts(config, tensors, adapted)
    write_directory(typed_path(path), tensors, write)


class Adapters(NamedTuple):
    """What a directory in PEFT format says of its adapters.

    Attributes:
      base: the model they were trained on: an id on a hub, a directory or a name; None if it is not
        said.
      lora: their kind.
      layers: the layers they are on, ascending.
    """

    base: str | None
    lora: LoRA
    layers: tuple[int, ...]


def is_adapter(path: Path) -> bool:
    """Whether a directory holds adapters in PEFT format, and no model of its own."""
    return (path / CONFIG_FILE).is_file() and not any(path.glob("model*.safetensors"))


def describe_adapter(path: Path) -> Adapters:
    """Tell which adapters are in a directory that the ``peft`` library wrote.

    Of weights, only the B of experts' gate and up are read: which of the two has which columns.

    Args:
      path: the directory.

    Raises:
      CheckpointError: when files are missing or damaged, or the adapters are of another kind.
    """
    return _described(typed_path(path))[0]


class _Contents(NamedTuple):
    """How the tensors of a directory are to be read.

    Attributes:
      places: what each belongs to, by its name.
      ranks: of each, by its name.
      columns: of the projections in experts' gate_up_proj.
    """

    places: dict[str, Place]
    ranks: dict[str, int]
    columns: Columns


def _described(path: Path) -> tuple[Adapters, _Contents]:
    config = read_json(path / CONFIG_FILE)
    check_kind(config, path)
    with _opened(path) as handle:
        names = list(handle.keys())
        places = {name: place for name in names if (place := place_of(name, config))}
        if not places or len(places) < len(names):
            other = next((name for name in names if name not in places), "no tensors")
            raise CheckpointError(
                f"{path / _WEIGHTS_FILE}: expected adapters on projections of layers alone, such "
                f"as {peft_tensor('layers.0.mlp.up_proj.lora_A.kernel').name}; found {other}"
            )
        own = settings_of(config, path, places.values())
        fused = [name for name, place in places.items() if place.projection == GATE_UP]
        columns: Columns = {}
        if fused:
            each = ((name, handle.get_tensor(name)) for name in fused if places[name].kind == "B")
            columns = columns_of(each, own[GATE_UP][0])
    lora = lora_of_file(config, path, own, columns)
    base = config.get("base_model_name_or_path")
    found = Adapters(
        base if isinstance(base, str) and base else None,
        lora,
        tuple(sorted({place.layer for place in places.values()})),
    )
    ranks = {name: own[place.projection][0] for name, place in places.items()}
    return found, _Contents(places, ranks, columns)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open file of the tensors in a directory; what the library raises on it is an error."""
    file = path / _WEIGHTS_FILE
    if not file.is_file():
        raise CheckpointError(f"{path} has no {_WEIGHTS_FILE}; save the adapters as safetensors")
    try:
        with (
            at_hand(path, [_WEIGHTS_FILE]) as directory,
            safe_open(os.path.join(directory, _WEIGHTS_FILE), framework="numpy") as handle,
        ):
            yield handle
    except (SafetensorError, OSError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def load_adapter(path: Path, abstract: nnx.State, lora: LoRA, shardings: Any = None) -> nnx.State:
    """Read adapters from a directory that the ``peft`` library wrote.

    Args:
      path: the directory.
      abstract: the adapters to be read: NNX state of their shapes.
      lora: their kind.
      shardings: where to put them; a pytree like ``abstract``. By default JAX's default device.

    Returns:
      The state with arrays.

    Raises:
      CheckpointError: when files are missing or damaged, or the adapters are of another kind,
        rank or scale, or on other projections.
    """
    path = typed_path(path)
    described, contents = _described(path)
    _check_like(lora, described.lora, path)
    found = _singly(read_unchanged(lambda: _read_tensors(path), path), contents)
    _check_tensors(found, abstract, path / _WEIGHTS_FILE)
    leaves, tree = jax.tree.flatten(abstract)
    places = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    arrays = []
    for (leaf_path, leaf), place in zip(named_leaves(abstract), places, strict=True):
        names = [peft_tensor(name).name for name in logical_paths(leaf_path, leaf.shape)]
        value = np.stack([found[name].T for name in names]).astype(leaf.dtype)
        value = value.reshape(leaf.shape)
        arrays.append(
            jax.make_array_from_callback(leaf.shape, place, value.__getitem__)
            if place is not None
            else jax.numpy.asarray(value)
        )
    return jax.tree.unflatten(tree, arrays)


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory: finite numbers, of a type that weights have."""
    file, found = path / _WEIGHTS_FILE, {}
    with _opened(path) as handle:
        for name in handle.keys():  # noqa: SIM118 -- it is no mapping
            dtype = handle.get_slice(name).get_dtype()
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{file}: {name} has dtype {dtype}; supported: {', '.join(DTYPES)}"
                )
            found[name] = handle.get_tensor(name)
    for name, value in found.items():
        if not np.isfinite(value).all():
            raise CheckpointError(
                f"{file}: {name} holds values that are not finite. The adapters are damaged, or "
                "their training failed; use others."
            )
    return found


def _singly(found: dict[str, np.ndarray], contents: _Contents) -> dict[str, np.ndarray]:
    """The tensors by our names, those of experts one by one."""
    result: dict[str, np.ndarray] = {}
    for name, value in found.items():
        place = contents.places[name]
        if place.is_stack:
            rank = contents.ranks[name]
            result |= single_tensors(name, value, place, rank, contents.columns)
        else:
            result[place.tensor()] = value
    return result


def _logical(state: nnx.State) -> list[str]:
    return [name for path, leaf in named_leaves(state) for name in logical_paths(path, leaf.shape)]


def _check_like(lora: LoRA, theirs: LoRA, path: Path) -> None:
    """Raise unless the adapters in a directory are of the kind of a run's."""
    if theirs.dora != lora.dora:
        raise CheckpointError(
            f"the adapters in {path} have {'' if theirs.dora else 'no '}magnitudes (DoRA): set "
            f"lora.dora={str(theirs.dora).lower()}"
        )
    for name in lora.targets:
        if theirs.rank_of(name) != lora.rank_of(name):
            raise CheckpointError(
                f"the adapters in {path} have rank {theirs.rank_of(name)} and alpha "
                f"{theirs.alpha_of(name):.9g} on {name}, this run's are to have rank "
                f"{lora.rank_of(name)}: set lora.rank and lora.alpha (or lora.rank_pattern and "
                "lora.alpha_pattern) to theirs"
            )
        if abs(theirs.scale_of(name) - lora.scale_of(name)) > 1e-6 * theirs.scale_of(name):
            raise CheckpointError(
                f"the adapters in {path} were trained with a scale of {theirs.scale_of(name):g} on "
                f"{name}, this run's would be {lora.scale_of(name):g}: set "
                f"lora.alpha={theirs.alpha_of(name):.9g} and "
                f"lora.rslora={str(theirs.rslora).lower()}; or, where other projections have "
                "another alpha, lora.alpha_pattern"
            )


def _check_tensors(found: dict[str, np.ndarray], abstract: nnx.State, file: Path) -> None:
    """Raise unless the file holds exactly the adapters of a run."""
    expected = {}
    for leaf_path, leaf in named_leaves(abstract):
        for name in logical_paths(leaf_path, leaf.shape):
            # Transposed, without layers and experts.
            expected[peft_tensor(name).name] = leaf.shape[stacked_axes(leaf_path) :][::-1]
    problems = [
        f"{name}: expected shape {list(shape)}, found {list(found[name].shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    problems += [f"missing: {name}" for name in expected if name not in found]
    problems += [f"not adapted by this run: {name}" for name in found if name not in expected]
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        layers = sorted({int(n) for name in found for n in re.findall(r"\.layers\.(\d+)\.", name)})
        targets = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in found})
        raise CheckpointError(
            f"the adapters in {file} are not those of this run:\n  "
            + "\n  ".join(problems[:10])
            + f"{more}\nThey are on {', '.join(targets)} of the layers {layers}: choose these with "
            "lora.targets and model.trainable."
        )
