"""Adapters to and from the directories of Hugging Face's PEFT library."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from jaxmoo.errors import CheckpointError, ConfigError, shown
from jaxmoo.hf.card import ModelCard
from jaxmoo.hf.directory import read_unchanged
from jaxmoo.hf.load import read_json
from jaxmoo.hf.names import HFTensor, hf_tensor
from jaxmoo.hf.save import Tensor, check_space, state_tensors, write_directory, write_file
from jaxmoo.hf.weights import DTYPES
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.lora import ADAPTERS, LoRA, adapters
from jaxmoo.models.paths import logical_paths, named_leaves, trainable_filter

__all__ = ["Adapters", "describe_adapter", "is_adapter", "load_adapter", "save_adapter"]

_PLACE = re.compile(
    r"base_model\.model\.model\.layers\.([0-9]{1,6})\.\w+\.(\w+)\.lora_[AB]\.weight"
)
_CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILE = "adapter_model.safetensors"

# What makes an adapter compute something else than ours, where it is set.
_OTHER_KINDS = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# Ways of starting that leave the base model as it is; others change it.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


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
      CheckpointError: when the model has no adapters, ``path`` is not empty or the disk is full.
    """
    adapted = [linear for _, _, linear in adapters(model)]
    if not adapted:
        raise CheckpointError("the model has no adapters to save")
    state = nnx.state(model, trainable_filter(ADAPTERS))
    paths = [name.split(".") for name in _logical(state)]
    layers = sorted({int(parts[1]) for parts in paths})
    rank = adapted[0].lora_A.kernel.shape[-1]
    alpha = round(adapted[0].scale * rank, 9)  # the scale is alpha / rank, rounded
    everywhere = len(layers) == model.config.num_hidden_layers
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({parts[-3] for parts in paths}),
        "layers_to_transform": None if everywhere else layers,
        "layers_pattern": None if everywhere else "layers",
        "modules_to_save": None,
        "inference_mode": True,
    }

    def write(directory: Path, tensors: Sequence[Tensor]) -> None:
        check_space(directory, sum(tensor.nbytes for tensor in tensors))
        write_file(directory / _WEIGHTS_FILE, tensors)
        (directory / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        if card is not None:
            (directory / "README.md").write_text(card.text(), "utf-8")

    write_directory(Path(path), state_tensors(state, lambda _: np.float32, peft_tensor), write)


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
    return (path / _CONFIG_FILE).is_file() and not any(path.glob("model*.safetensors"))


def describe_adapter(path: Path) -> Adapters:
    """Tell which adapters are in a directory that the ``peft`` library wrote; reads no weights.

    Args:
      path: the directory.

    Raises:
      CheckpointError: when files are missing or damaged, or the adapters are of another kind.
    """
    path = Path(path)
    config = read_json(path / _CONFIG_FILE)
    rank, alpha = _rank_and_alpha(config, path)
    with _opened(path) as handle:
        names = list(handle.keys())
    found = [match for name in names if (match := _PLACE.fullmatch(name))]
    if not found or len(found) < len(names):
        raise CheckpointError(
            f"{path / _WEIGHTS_FILE}: expected adapters on projections of layers alone, such as "
            f"{peft_tensor('layers.0.mlp.up_proj.lora_A.kernel').name}"
        )
    try:
        lora = LoRA(rank, alpha, tuple(sorted({match[2] for match in found})))
    except ConfigError as error:
        raise CheckpointError(f"the adapters in {path} cannot be used: {error}") from error
    base = config.get("base_model_name_or_path")
    layers = tuple(sorted({int(match[1]) for match in found}))
    return Adapters(base if isinstance(base, str) and base else None, lora, layers)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open file of the tensors in a directory; what the library raises on it is an error."""
    file = path / _WEIGHTS_FILE
    if not file.is_file():
        raise CheckpointError(f"{path} has no {_WEIGHTS_FILE}; save the adapters as safetensors")
    try:
        with safe_open(file, framework="numpy") as handle:
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
    path = Path(path)
    _check_like(lora, path)
    found = read_unchanged(lambda: _read_tensors(path), path)
    _check_tensors(found, abstract, path / _WEIGHTS_FILE)
    leaves, tree = jax.tree.flatten(abstract)
    places = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    arrays = []
    for (leaf_path, leaf), place in zip(named_leaves(abstract), places, strict=True):
        names = [peft_tensor(name).name for name in logical_paths(leaf_path, leaf.shape)]
        value = np.stack([found[name].T for name in names]).astype(leaf.dtype)
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


def peft_tensor(path: str) -> HFTensor:
    """Find the tensor that holds an adapter, by the adapter's logical path.

    Example:
      >>> peft_tensor("layers.25.mlp.up_proj.lora_A.kernel")
      HFTensor(name='base_model.model.model.layers.25.mlp.up_proj.lora_A.weight', transposed=True,
               rows=None)
    """
    projection, adapter, leaf = path.rsplit(".", 2)
    adapted = hf_tensor(f"{projection}.{leaf}")
    module, weight = adapted.name.rsplit(".", 1)
    return adapted._replace(name=f"base_model.model.{module}.{adapter}.{weight}")


def _logical(state: nnx.State) -> list[str]:
    return [name for path, leaf in named_leaves(state) for name in logical_paths(path, leaf.shape)]


def _rank_and_alpha(config: dict[str, Any], path: Path) -> tuple[int, float]:
    """The rank of adapters and their alpha, as ours; raises unless they are of our kind."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {shown(config.get('peft_type'))}, expected 'LORA'")
    problems += [f"{name} is set" for name in _OTHER_KINDS if config.get(name)]
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {shown(config['bias'])}, expected 'none'")
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        problems.append(f"init_lora_weights={shown(start)} changes the base model")
    if problems:
        raise CheckpointError(
            f"the adapters in {path} are of a kind that is not supported: {'; '.join(problems)}"
        )
    given: dict[str, Any] = {"rank": config.get("r"), "alpha": config.get("lora_alpha")}
    try:
        lora = LoRA(**given)  # type and range of both
    except ConfigError as error:
        raise CheckpointError(
            f"the adapters in {path} have rank {shown(given['rank'])} and alpha "
            f"{shown(given['alpha'])}: {error}"
        ) from error
    rooted = config.get("use_rslora", False)
    if not isinstance(rooted, bool):
        raise CheckpointError(
            f"{path / _CONFIG_FILE}: use_rslora must be true or false, found {shown(rooted)}"
        )
    # Ours is divided by the rank, theirs then by its root.
    return lora.rank, lora.alpha * lora.rank**0.5 if rooted else lora.alpha


def _check_like(lora: LoRA, path: Path) -> None:
    """Raise unless the adapters in a directory have the rank and scale of a run's."""
    rank, alpha = _rank_and_alpha(read_json(path / _CONFIG_FILE), path)
    if rank != lora.rank:
        raise CheckpointError(
            f"the adapters in {path} have rank {rank} and alpha {alpha:.9g}, this run's are to "
            f"have rank {lora.rank}: set lora.rank and lora.alpha to theirs"
        )
    if abs(alpha - lora.alpha) > 1e-6 * alpha:
        raise CheckpointError(
            f"the adapters in {path} were trained with a scale of {alpha / rank:g}, this run's "
            f"would be {lora.scale:g}: set lora.alpha={alpha:.9g}"
        )


def _check_tensors(found: dict[str, np.ndarray], abstract: nnx.State, file: Path) -> None:
    """Raise unless the file holds exactly the adapters of a run."""
    expected = {}
    for leaf_path, leaf in named_leaves(abstract):
        for name in logical_paths(leaf_path, leaf.shape):
            expected[peft_tensor(name).name] = leaf.shape[:0:-1]
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
        targets = sorted({name.split(".")[-3] for name in found if name.count(".") > 2})
        raise CheckpointError(
            f"the adapters in {file} are not those of this run:\n  "
            + "\n  ".join(problems[:10])
            + f"{more}\nThey are on {', '.join(targets)} of the layers {layers}: choose these with "
            "lora.targets and model.trainable."
        )
