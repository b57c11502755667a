"""A Hugging Face directory becomes a `Decoder`."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from jaxmoo.errors import CheckpointError, ConfigError, did_you_mean, shown
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.directory import read_unchanged
from jaxmoo.hf.names import constant_tensors, hf_tensor
from jaxmoo.hf.placing import parameter_of, read_parameter
from jaxmoo.hf.weights import Weights
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.families import FAMILIES
from jaxmoo.models.paths import logical_paths, named_leaves, stacked_axes
from jaxmoo.models.quantization import quantize_base

__all__ = [
    "check_tensors",
    "load_config",
    "load_model",
    "progress",
    "read_json",
    "with_dtypes",
]

# Buffers of old checkpoints, computed from the config today.
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


def load_config(path: Path) -> DecoderConfig:
    """Read the sizes of the model in a Hugging Face directory.

    Args:
      path: the directory.

    Returns:
      What its ``config.json`` says.

    Raises:
      CheckpointError: when there is no readable ``config.json``, or a token that ends replies,
        there or in ``generation_config.json``, is none of the model's.
      ConfigError: when the architecture is not supported, or a size or number is of another type
        or out of range.
    """
    file = typed_path(path) / "config.json"
    content = read_json(file)
    try:
        config = DecoderConfig.from_hf(content)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    _check_end_tokens(content, config, file)
    generation = typed_path(path) / "generation_config.json"
    if generation.is_file():
        _check_end_tokens(read_json(generation), config, generation)
    return config


def _check_end_tokens(content: dict[str, Any], config: DecoderConfig, file: Path) -> None:
    found = content.get("eos_token_id")
    for token in found if isinstance(found, list) else [found]:
        if token is None and not isinstance(found, list):
            continue
        if (
            isinstance(token, bool)
            or not isinstance(token, int)
            or not (0 <= token < config.vocab_size)
        ):
            raise CheckpointError(
                f"{file}: eos_token_id must be a token's number, or a list of them, from 0 to "
                f"{config.vocab_size - 1}, found {shown(found)}"
            )


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      CheckpointError: when the file is missing or holds anything else.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    # RecursionError: brackets nested by the thousand.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return content


def load_model(
    path: Path,
    *,
    segments: tuple[int, ...] = (0,),
    dtype: Any = jnp.float32,
    param_dtype: Any | None = jnp.float32,
    remat: str = "full",
    attention: str = "auto",
    platform: str | None = None,
    shardings: Any = None,
    quantize: str | None = None,
) -> Decoder:
    """Load a model with its weights.

    Every tensor is checked by name and shape before the first one is read. Each device receives
    only its own slices, and only those are read from the files, one layer of one parameter at a
    time: beyond the parameters themselves, the host never holds more than twice the largest
    tensor, or one projection of all of a layer's experts.

    Args:
      path: a Hugging Face directory; see `resolve_source`.
      segments: see `Decoder`.
      dtype: see `Decoder`.
      param_dtype: see `Decoder`; the files' values are converted to it. None keeps the dtype
        that each parameter has in the files; where the layers of a stack differ, one that holds
        them all exactly.
      remat: see `Decoder`.
      attention: see `Decoder`.
      platform: see `Decoder`.
      shardings: a pytree of `jax.sharding.Sharding` matching the model's NNX state, or a function
        that makes one from the abstract state. By default everything goes to JAX's default
        device.
      quantize: holds the kernels of layers in few bits; see
        :func:`jaxmoo.models.quantization.quantize_base`. The files' own values are quantised, on
        the host, one layer of one kernel at a time; nothing else of them goes to a device.

    Returns:
      The model.

    Raises:
      CheckpointError: when files are missing or damaged, or tensors are missing, left over or of
        another shape; all of them are named at once.
      ConfigError: when the architecture is not supported, or cannot be quantised so.
    """
    path = typed_path(path)
    config = load_config(path)
    model = Decoder.abstract(
        config,
        segments=segments,
        dtype=dtype,
        param_dtype=jnp.float32 if param_dtype is None else param_dtype,
        remat=remat,
        attention=attention,
        platform=platform,
    )
    weights = Weights(path)
    graphdef, state = nnx.split(model)
    _check(weights, state, config, path)
    if param_dtype is None:
        state = with_dtypes(state, weights.dtype, config)
    if quantize is not None:
        model = nnx.merge(graphdef, state)
        quantize_base(model, quantize)
        graphdef, state = nnx.split(model)
    if callable(shardings):
        shardings = shardings(state)
    leaves, treedef = jax.tree.flatten(state)
    placements = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    if len(placements) != len(leaves):
        raise CheckpointError(
            f"shardings has {len(placements)} leaves, the model's state {len(leaves)}"
        )

    def read() -> list[jax.Array]:
        with progress(sum(x.size * x.dtype.itemsize for x in leaves), "Loading weights") as bar:
            return [
                array
                for kernel, parts in itertools.groupby(
                    zip(named_leaves(state), placements, strict=True), parameter_of
                )
                for array in read_parameter(weights, config, kernel, list(parts), bar.update)
            ]

    arrays = read_unchanged(read, path)
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, arrays))


def progress(total: int, description: str) -> tqdm:
    """Make a progress bar in bytes; on a terminal, if the work takes more than a moment."""
    return tqdm(
        total=total,
        desc=description,
        unit="B",
        unit_scale=True,
        delay=2,
        leave=False,
        disable=None,  # only on a terminal
    )


def with_dtypes(
    state: nnx.State, dtype_of: Callable[[str], Any], config: DecoderConfig
) -> nnx.State:
    """Give the abstract state of a `Decoder` other dtypes.

    Args:
      state: the state.
      dtype_of: gives a tensor's dtype by its Hugging Face name; a stack of layers gets one that
        holds those of all its layers exactly.
      config: of the model.

    Returns:
      The state, its leaves `jax.ShapeDtypeStruct`.

    Raises:
      CheckpointError: on float64 where JAX would make it float32.
    """
    leaves = []
    for path, leaf in named_leaves(state):
        dtypes = [
            dtype_of(hf_tensor(name, config).name) for name in logical_paths(path, leaf.shape)
        ]
        dtype = functools.reduce(jnp.promote_types, dtypes)
        if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
            raise CheckpointError(
                f"{'.'.join(path)} is float64; set the environment variable JAX_ENABLE_X64=1 to "
                "keep it so"
            )
        leaves.append(jax.ShapeDtypeStruct(leaf.shape, dtype))
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def check_tensors(
    found: Mapping[str, tuple[int, ...]], state: nnx.State, config: DecoderConfig, path: Path
) -> None:
    """Raise unless tensors are exactly those of a model.

    Args:
      found: their shapes by Hugging Face name.
      state: abstract state of the model.
      config: its sizes.
      path: file or directory with all of that.

    Raises:
      CheckpointError: some are missing, left over or of another shape; it names all of them.
    """
    if config.num_hidden_layers > len(found):
        raise CheckpointError(
            f"the config in {path} says num_hidden_layers={config.num_hidden_layers}, but its "
            f"weights are only {len(found)} tensors"
        )
    expected: dict[str, tuple[int, ...]] = {}
    for leaf_path, leaf in named_leaves(state):
        shape = leaf.shape[stacked_axes(leaf_path) :]
        for logical in logical_paths(leaf_path, leaf.shape):
            tensor = hf_tensor(logical, config)
            stored = shape[::-1] if tensor.transposed else shape
            if tensor.rows is not None:  # one of several, below those before it
                stored = (sum(tensor.rows), *stored[1:])
                stored = max(stored, expected.get(tensor.name, stored))
            expected[tensor.name] = stored
    constant = constant_tensors(config)
    found = {name: shape for name, shape in found.items() if name not in constant}
    missing = [name for name in expected if name not in found]
    extra = sorted(set(found) - set(expected))
    for start, what in FAMILIES[config.family].names.others.items():
        if any(name.startswith(start) for name in extra):
            raise CheckpointError(
                f"the weights in {path} have a {what} ({start}*), which is not supported. Save "
                "the text model alone with transformers, as the documentation of models shows, "
                "and use that."
            )
    misshapen = [
        f"{name}: expected shape {list(shape)}, found {list(found[name])}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        *_listed(misshapen, str),
        *_listed(missing, lambda name: f"missing: {name}"),
        *_listed(
            extra, lambda name: f"not part of this architecture: {name}{_near(name, missing)}"
        ),
    ]
    if problems:
        raise CheckpointError(
            f"the weights in {path} do not fit its config:\n  " + "\n  ".join(problems)
        )


def _check(weights: Weights, state: nnx.State, config: DecoderConfig, path: Path) -> None:
    """Raise unless the files hold exactly the tensors of the model."""
    found = {name: weights.shape(name) for name in weights.names() if not _IGNORED.search(name)}
    # Some tied models ship a copy of the embedding as their head.
    head, table = (hf_tensor(f"{x}.embedding", config).name for x in ("lm_head", "embed_tokens"))
    copied = config.tie_word_embeddings and found.pop(head, None) is not None
    for name, value in constant_tensors(config).items():
        if name in found:
            _check_constant(weights, name, value)
    check_tensors(found, state, config, path)
    if copied and not _equal(weights, head, table):
        raise CheckpointError(
            f"{path}: config.json says tie_word_embeddings, but {head} differs from "
            f"{table}. Set tie_word_embeddings to false or drop the tensor."
        )
    for name in found:
        weights.dtype(name)


def _check_constant(weights: Weights, name: str, value: float) -> None:
    """Raise unless a tensor holds a number, rounded to a dtype that it has or may have had."""
    own = jnp.dtype(weights.dtype(name))
    rounded = [np.asarray(value, x).astype(own) for x in (own, jnp.bfloat16, np.float16)]
    if weights.shape(name) != () or np.asarray(weights.read(name)) not in rounded:
        raise CheckpointError(f"{name} must be {value}; other values are not supported")


def _listed(items: list[str], describe: Callable[[str], str], most: int = 20) -> list[str]:
    """Descriptions of the first items, and how many there are beyond those."""
    more = [f"... and {len(items) - most} more"] if len(items) > most else []
    return [describe(item) for item in items[:most]] + more


def _near(name: str, missing: list[str]) -> str:
    """Which missing tensor a left-over one may be, misnamed."""
    if len(missing) > 1000:  # nothing matches, and comparing all with all takes long
        return ""
    hint = did_you_mean(name, missing)
    return hint and f".{hint}"


def _equal(weights: Weights, a: str, b: str) -> bool:
    if weights.shape(a) != weights.shape(b):
        return False
    rows = weights.shape(a)[0]
    bands = [(slice(i, min(i + 1024, rows)), slice(None)) for i in range(0, rows, 1024)]
    return all(np.array_equal(weights.read(a, band), weights.read(b, band)) for band in bands)
