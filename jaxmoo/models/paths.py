"""Parameters by name: which layers a regular expression means, and how to split them off.

The *logical path* of a parameter has the true number of its layer, whatever the model's segments:
``layers.25.mlp.up_proj.kernel``; of a mixture of experts, also the expert's:
``layers.25.mlp.experts.7.up_proj.kernel``. Users' expressions are searched for in logical paths.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from jaxmoo.errors import ConfigError
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.decoder import Decoder

__all__ = [
    "STACKED",
    "compile_regex",
    "logical_paths",
    "named_leaves",
    "parameter_counts",
    "parameter_paths",
    "segments_for",
    "stacked_axes",
    "trainable_filter",
]

# Layers are stacked by segment; a segment carries the number of its first layer.
STACKED = r"^layers\.(\d+)\."
_EXPERTS = "experts"  # below which an axis of every leaf numbers the experts


def logical_paths(path: Sequence[Any], shape: Sequence[int]) -> list[str]:
    """Names of the parameters held by one leaf of a `Decoder`.

    Args:
      path: the leaf's path in the NNX state.
      shape: the leaf's shape; a stack of n layers holds n parameters, or n times E of E experts.

    Returns:
      Dotted names, one per layer of a stack and expert, in the order of the leaf's first axes.

    Example:
      >>> logical_paths(("layers", "22", "mlp", "up_proj", "kernel"), (2, 16, 32))
      ['layers.22.mlp.up_proj.kernel', 'layers.23.mlp.up_proj.kernel']
      >>> logical_paths(("layers", "0", "mlp", "experts", "up_proj", "kernel"), (1, 2, 16, 32))
      ['layers.0.mlp.experts.0.up_proj.kernel', 'layers.0.mlp.experts.1.up_proj.kernel']
      >>> logical_paths(("norm", "scale"), (16,))
      ['norm.scale']
    """
    if path[0] != "layers":
        return [".".join(map(str, path))]
    rest = [".".join(map(str, path[2:]))]
    if _EXPERTS in path:
        before, after = rest[0].split(f"{_EXPERTS}.")
        rest = [f"{before}{_EXPERTS}.{e}.{after}" for e in range(shape[1])]
    return [f"layers.{int(path[1]) + i}.{name}" for i in range(shape[0]) for name in rest]


def stacked_axes(path: Sequence[Any]) -> int:
    """How many of a leaf's first axes number the parameters in it: layers, and their experts.

    Args:
      path: the leaf's path in the NNX state.

    Example:
      >>> stacked_axes(("norm", "scale")), stacked_axes(("layers", "22", "mlp", "gate", "kernel"))
      (0, 1)
    """
    return (path[0] == "layers") * (1 + (_EXPERTS in path))


def named_leaves(state: nnx.State) -> list[tuple[tuple[str, ...], Any]]:
    """Paths and values of a state's leaves, in the order of `jax.tree.leaves`.

    Args:
      state: NNX state of a `Decoder`, or part of one; its leaves may be abstract.

    Returns:
      Pairs of a path, as `logical_paths` takes it, and a value with a shape.
    """
    return [
        # An NNX variable adds a key of its own, which is no part of the path.
        (tuple(str(key.key) for key in path if hasattr(key, "key")), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    ]


def parameter_paths(config: DecoderConfig) -> list[str]:
    """Logical paths of all parameters of a model, in no particular order."""
    return [
        name
        for path, leaf in named_leaves(nnx.state(Decoder.abstract(config)))
        for name in logical_paths(path, leaf.shape)
    ]


def parameter_counts(config: DecoderConfig) -> tuple[int, int]:
    """Count the parameters of a model: all of them, and those that are read for one token.

    They differ by the experts that do not read it. Of the embedding all is counted.

    Example:
      >>> from jaxmoo.models.presets import preset
      >>> [round(count / 1e9, 1) for count in parameter_counts(preset("Mixtral-8x7B"))]
      [46.7, 12.9]
    """
    total = unread = 0
    for path, leaf in named_leaves(nnx.state(Decoder.abstract(config))):
        size = math.prod(leaf.shape)
        total += size
        if stacked_axes(path) == 2:
            unread += size - size // config.num_experts * config.num_experts_per_tok
    return total, total - unread


def segments_for(config: DecoderConfig, pattern: str) -> tuple[int, ...]:
    """Choose the segments that let an expression's parameters be split from the others.

    Args:
      config: the model's sizes.
      pattern: regular expression, searched for in logical paths.

    Returns:
      First layers of maximal runs of layers of which the same parameters match; give them to
      `Decoder`, and the expression to `trainable_filter`.

    Raises:
      ConfigError: when the expression is invalid or matches no parameter.

    Example:
      >>> config = DecoderConfig(
      ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=30,
      ...     num_attention_heads=4, num_key_value_heads=2, head_dim=8,
      ...     max_position_embeddings=128)
      >>> segments_for(config, r"^layers\\.(2[2-9])\\.")
      (0, 22)
    """
    regex = compile_regex(pattern)
    names = parameter_paths(config)
    matched = [name for name in names if regex.search(name)]
    if not matched:
        shown = sorted({re.sub(r"^layers\.\d+\.", "layers.0.", name) for name in names})
        raise ConfigError(
            f"no parameter's path matches {pattern!r}. Paths are, for layers 0 to "
            f"{config.num_hidden_layers - 1}: {', '.join(shown)}"
        )
    per_layer: list[set[str]] = [set() for _ in range(config.num_hidden_layers)]
    for name in matched:
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            per_layer[int(number)].add(rest)
    return tuple(
        i for i in range(config.num_hidden_layers) if i == 0 or per_layer[i] != per_layer[i - 1]
    )


def trainable_filter(pattern: str) -> Callable[[tuple[Any, ...], Any], bool]:
    """Make an NNX filter that selects the parameters an expression matches.

    Args:
      pattern: regular expression, searched for in logical paths.

    Returns:
      A filter for `nnx.split` and `nnx.state` of a `Decoder` built with the segments that
      `segments_for` chooses. Used on other segments, it raises ConfigError when a stack holds
      both matching and other layers.

    Raises:
      ConfigError: when the expression is invalid.

    Example:
      >>> config = DecoderConfig(
      ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
      ...     num_attention_heads=4, num_key_value_heads=2, head_dim=8,
      ...     max_position_embeddings=128)
      >>> pattern = r"layers\\.2\\..*norm"
      >>> model = Decoder(config, segments=segments_for(config, pattern), rngs=nnx.Rngs(0))
      >>> graph, trainable, frozen = nnx.split(model, trainable_filter(pattern), ...)
      >>> [".".join(path) for path, _ in nnx.to_flat_state(trainable)]
      ['layers.2.input_layernorm.scale', 'layers.2.post_attention_layernorm.scale']
    """
    regex = compile_regex(pattern)

    def select(path: tuple[Any, ...], leaf: Any) -> bool:
        names = logical_paths(path, leaf.shape)
        matches = [bool(regex.search(name)) for name in names]
        if any(matches) and not all(matches):
            size = leaf.shape[1] if _EXPERTS in path else 1  # one behind the other, of a layer
            layers = [matches[i : i + size] for i in range(0, len(matches), size)]
            apart = [layer for layer in layers if any(layer) and not all(layer)]
            if apart:
                found = f"{sum(apart[0])} of the {size} experts of a layer"
                remedy = "the experts of a layer are trained together, or not at all"
            else:
                found = f"{sum(map(any, layers))} of the {len(layers)} layers"
                remedy = "build the model with segments=segments_for(config, pattern)"
            raise ConfigError(
                f"{pattern!r} matches {found} stacked in {'.'.join(map(str, path))}; {remedy}"
            )
        return all(matches)

    return select


def compile_regex(pattern: str) -> re.Pattern[str]:
    """Compile a user's regular expression.

    Raises:
      ConfigError: it is none.
    """
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(f"invalid regular expression {pattern!r}: {error}") from None
