"""A Hugging Face directory becomes a `Decoder`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from jaxmoo.errors import CheckpointError
from jaxmoo.hf.names import HFTensor, hf_tensor
from jaxmoo.hf.weights import Weights
from jaxmoo.models.config import DecoderConfig
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.paths import logical_paths, named_leaves

__all__ = ["load_config", "load_model"]

# Buffers of old checkpoints, computed from the config today.
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


def load_config(path: Path) -> DecoderConfig:
    """Read the sizes of the model in a Hugging Face directory.

    Args:
      path: the directory.

    Returns:
      What its ``config.json`` says.

    Raises:
      CheckpointError: when there is no readable ``config.json``.
      ConfigError: when the architecture is not supported.
    """
    return DecoderConfig.from_hf(read_json(Path(path) / "config.json"))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      CheckpointError: when the file is missing or holds anything else.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return content


def load_model(
    path: Path,
    *,
    segments: tuple[int, ...] = (0,),
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: str = "full",
    attention: str = "auto",
    shardings: Any = None,
) -> Decoder:
    """Load a model with its weights.

    Every tensor is checked by name and shape before the first one is read. Each device receives
    only its own slices, and only those are read from the files.

    Args:
      path: a Hugging Face directory; see `resolve_source`.
      segments: see `Decoder`.
      dtype: see `Decoder`.
      param_dtype: see `Decoder`; the files' values are converted to it.
      remat: see `Decoder`.
      attention: see `Decoder`.
      shardings: a pytree of `jax.sharding.Sharding` matching the model's NNX state, or a function
        that makes one from the abstract state. By default everything goes to JAX's default
        device.

    Returns:
      The model.

    Raises:
      CheckpointError: when files are missing or damaged, or tensors are missing, left over or of
        another shape; all of them are named at once.
      ConfigError: when the architecture is not supported.
    """
    path = Path(path)
    config = load_config(path)
    model = Decoder.abstract(
        config,
        segments=segments,
        dtype=dtype,
        param_dtype=param_dtype,
        remat=remat,
        attention=attention,
    )
    weights = Weights(path)
    graphdef, state = nnx.split(model)
    _check(weights, state, config, path)
    if callable(shardings):
        shardings = shardings(state)
    leaves, treedef = jax.tree.flatten(state)
    placements = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    if len(placements) != len(leaves):
        raise CheckpointError(
            f"shardings has {len(placements)} leaves, the model's state {len(leaves)}"
        )
    arrays = []
    with progress(sum(x.size * x.dtype.itemsize for x in leaves), "Loading weights") as bar:
        for (leaf_path, leaf), placement in zip(named_leaves(state), placements, strict=True):
            arrays.append(_read_leaf(weights, leaf_path, leaf, placement))
            bar.update(leaf.size * leaf.dtype.itemsize)
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, arrays))


def progress(total: int, description: str) -> tqdm:
    """Make a progress bar in bytes; it appears only if the work takes more than a moment."""
    return tqdm(total=total, desc=description, unit="B", unit_scale=True, delay=2, leave=False)


def _check(weights: Weights, state: nnx.State, config: DecoderConfig, path: Path) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for leaf_path, leaf in named_leaves(state):
        shape = leaf.shape[1:] if leaf_path[0] == "layers" else leaf.shape
        for logical in logical_paths(leaf_path, leaf.shape):
            tensor = hf_tensor(logical)
            expected[tensor.name] = shape[::-1] if tensor.transposed else shape
    found = {name for name in weights.names() if not _IGNORED.search(name)}
    if config.tie_word_embeddings and "lm_head.weight" in found:
        # Some tied models ship a copy of the embedding as their head.
        found.remove("lm_head.weight")
        if not _equal(weights, "lm_head.weight", "model.embed_tokens.weight"):
            raise CheckpointError(
                f"{path}: config.json says tie_word_embeddings, but lm_head.weight differs from "
                "model.embed_tokens.weight. Set tie_word_embeddings to false or drop the tensor."
            )
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [f"not part of this architecture: {name}" for name in sorted(found - set(expected))]
    problems += [
        f"{name}: expected shape {list(shape)}, found {list(weights.shape(name))}"
        for name, shape in expected.items()
        if name in found and weights.shape(name) != shape
    ]
    if problems:
        more = f"\n  ... and {len(problems) - 30} more" if len(problems) > 30 else ""
        raise CheckpointError(
            f"the weights in {path} do not fit its config.json:\n  "
            + "\n  ".join(problems[:30])
            + more
        )
    for name in expected:
        weights.dtype(name)


def _equal(weights: Weights, a: str, b: str) -> bool:
    if b not in weights.names() or weights.shape(a) != weights.shape(b):
        return False
    return np.array_equal(weights.read(a), weights.read(b))


def _read_leaf(
    weights: Weights, path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, placement: Any
) -> jax.Array:
    tensors = [hf_tensor(name) for name in logical_paths(path, leaf.shape)]

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        if index is None:  # the whole array
            index = tuple(slice(None) for _ in leaf.shape)
        if path[0] != "layers":
            return _read_slice(weights, tensors[0], index).astype(leaf.dtype)
        wanted = tensors[index[0]]
        shape = [len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True)]
        stack = np.empty(shape, leaf.dtype)
        for row, tensor in zip(stack, wanted, strict=True):
            row[...] = _read_slice(weights, tensor, index[1:])
        return stack

    if placement is None:
        return jnp.asarray(read(None))
    return jax.make_array_from_callback(leaf.shape, placement, read)


def _read_slice(weights: Weights, tensor: HFTensor, index: tuple[slice, ...]) -> np.ndarray:
    if tensor.transposed:
        return weights.read(tensor.name, index[::-1]).T
    return weights.read(tensor.name, index)
