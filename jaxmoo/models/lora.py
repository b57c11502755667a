"""Low-rank adapters (LoRA) on the projections of a decoder's layers.

An adapted projection computes ``x W + b + (alpha / rank) (x A) B`` with W and b frozen. A [in, r]
and B [r, out] are leaves like all others, stacked by layers and named after Hugging Face's PEFT:
``layers.3.self_attn.q_proj.lora_A.kernel``. What works on parameters by their paths (blocks, the
engine, shardings, checkpoints) therefore works on adapters.

Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*,
`arXiv:2106.09685 <https://arxiv.org/abs/2106.09685>`_.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoo.dtypes import at_least_float32
from jaxmoo.errors import ConfigError, did_you_mean, shown
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.layers import Linear
from jaxmoo.models.paths import compile_regex, named_leaves, parameter_paths

__all__ = [
    "ADAPTERS",
    "PROJECTIONS",
    "AdaptedLinear",
    "LoRA",
    "adapted_layers",
    "adapters",
    "add_adapters",
    "initial_adapters",
    "merge_adapters",
]

# Finds the adapters among logical paths.
ADAPTERS = r"\.lora_[AB]\.kernel$"

_MOST_ALPHA = 1e30  # kernels are float32

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which projections get adapters, and of what kind.

    Attributes:
      rank: r.
      alpha: adapters are scaled by ``alpha / rank``.
      targets: names of projections; by default all of a layer.

    Raises:
      ConfigError: on a rank or alpha that is not positive, or projections that do not exist.

    Example:
      >>> LoRA(rank=8, alpha=16.0).scale
      2.0
      >>> LoRA(rank=8, alpha=16.0, targets=("query",))
      Traceback (most recent call last):
      ...
      jaxmoo.errors.ConfigError: no projection is called 'query'. A layer has q_proj, k_proj,
      v_proj, o_proj, gate_proj, up_proj, down_proj; embeddings and the head get no adapters.
    """

    rank: int
    alpha: float
    targets: Sequence[str] = PROJECTIONS

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(
                f"the rank of adapters must be an integer of at least 1, found {shown(self.rank)}."
            )
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not (number and 0 < self.alpha < _MOST_ALPHA):
            raise ConfigError(
                f"alpha of adapters must be a number above 0 and below {_MOST_ALPHA:g}, found "
                f"{shown(self.alpha)}."
            )
        if not self.targets:
            raise ConfigError(f"no projections to adapt: name some of {', '.join(PROJECTIONS)}.")
        for name in self.targets:
            if name not in PROJECTIONS:
                raise ConfigError(
                    f"no projection is called {name!r}.{did_you_mean(name, PROJECTIONS)} A layer "
                    f"has {', '.join(PROJECTIONS)}; embeddings and the head get no adapters."
                )

    @property
    def scale(self) -> float:
        """Factor of the adapters' product."""
        return self.alpha / self.rank


class AdaptedLinear(Linear):
    """A `Linear` map with an adapter; its own kernel and bias are those of the map.

    The adapter's leaves are shapes only, until `initial_adapters` or a file gives them values.
    They are float32 whatever the kernel's dtype: small updates would vanish in bfloat16.

    Args:
      linear: the map to adapt, or a stack of them.
      lora: what kind of adapter.
    """

    def __init__(self, linear: Linear, lora: LoRA):
        self.dtype, self.kernel, self.bias = linear.dtype, linear.kernel, linear.bias
        self.platform = linear.platform
        self.scale = lora.scale
        *stack, size_in, size_out = self.kernel.shape
        # Linear maps themselves, so that they are named, stacked, sharded and decayed as such.
        self.lora_A, self.lora_B = nnx.eval_shape(
            lambda: tuple(
                Linear(
                    *sizes,
                    stack=tuple(stack),
                    platform=self.platform,
                    dtype=self.dtype,
                    param_dtype=jnp.float32,
                    rngs=nnx.Rngs(0),
                )
                for sizes in ((size_in, lora.rank), (lora.rank, size_out))
            )
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map the last axis by the kernel and add what the adapter says: ``[..., out]``."""
        return super().__call__(x) + self.scale * self.lora_B(self.lora_A(x))

    def merged(self) -> Linear:
        """Return the one map that computes the same, in the kernel's dtype and place."""
        kernel = self.kernel.get_value()
        # Its sizes do not matter: it gets this map's own leaves.
        linear = nnx.eval_shape(
            lambda: Linear(
                1,
                1,
                bias=self.bias is not None,
                platform=self.platform,
                dtype=self.dtype,
                param_dtype=kernel.dtype,
                rngs=nnx.Rngs(0),
            )
        )
        merge = jax.jit(_merged, out_shardings=kernel.sharding)
        a, b = self.lora_A.kernel.get_value(), self.lora_B.kernel.get_value()
        linear.kernel = nnx.Param(merge(kernel, a, b, self.scale))
        if self.bias is not None:
            linear.bias = self.bias
        return linear


def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    wide = at_least_float32(kernel.dtype)
    product = jnp.matmul(a, b, precision="highest").astype(wide)
    return (kernel.astype(wide) + scale * product).astype(kernel.dtype)


def adapted_layers(config: DecoderConfig, pattern: str) -> tuple[int, ...]:
    """Return the layers that a regular expression over parameters' paths means.

    Args:
      config: the model's sizes.
      pattern: regular expression, searched for in logical paths. Of each layer it must match all
        parameters or none; outside of the layers too.

    Raises:
      ConfigError: it matches part of a layer, no layer, or some parameters outside of layers.

    Example:
      >>> config = DecoderConfig(
      ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
      ...     num_attention_heads=4, num_key_value_heads=2, head_dim=8,
      ...     max_position_embeddings=128)
      >>> adapted_layers(config, r"^layers\\.[23]\\."), adapted_layers(config, ".*")
      ((2, 3), (0, 1, 2, 3))
    """
    regex = compile_regex(pattern)
    groups: dict[str, dict[str, bool]] = {}
    for path in parameter_paths(config):
        first, *rest = path.split(".")
        group = f"layer {rest[0]}" if first == "layers" else "what lies outside of the layers"
        groups.setdefault(group, {})[path] = regex.search(path) is not None
    for group, matches in groups.items():
        if any(matches.values()) and not all(matches.values()):
            matched = sorted(path for path, match in matches.items() if match)
            raise ConfigError(
                f"{pattern!r} matches part of {group} ({', '.join(matched[:3])}"
                f"{', ...' if len(matched) > 3 else ''}). With adapters it chooses whole layers, "
                r"such as ^layers\.(2[0-9])\. or, for all of them, .*; which projections of these "
                "are adapted is chosen by name."
            )
    layers = [i for i in range(config.num_hidden_layers) if all(groups[f"layer {i}"].values())]
    if not layers:
        raise ConfigError(
            f"{pattern!r} matches no layer, and adapters are put on layers only. The model has "
            f"layers.0 to layers.{config.num_hidden_layers - 1}."
        )
    return tuple(layers)


def add_adapters(model: Decoder, lora: LoRA, layers: Sequence[int]) -> None:
    """Put adapters on a decoder's projections; their leaves are shapes only.

    Args:
      model: the decoder, changed in place. Each of its segments must lie within the layers to be
        adapted or outside of them; see `jaxmoo.models.segments_for`.
      lora: which projections, and what kind of adapters.
      layers: numbers of the layers to adapt.

    Raises:
      ConfigError: a segment holds both kinds of layers.

    Example:
      >>> config = DecoderConfig(
      ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
      ...     num_attention_heads=4, num_key_value_heads=2, head_dim=8,
      ...     max_position_embeddings=128)
      >>> model = Decoder(config, segments=(0, 2), rngs=nnx.Rngs(0))
      >>> add_adapters(model, LoRA(rank=4, alpha=8.0, targets=("q_proj",)), layers=[2])
      >>> [(".".join(path), leaf.shape) for path, leaf in named_leaves(nnx.state(model))
      ...  if "lora_A" in path]
      [('layers.2.self_attn.q_proj.lora_A.kernel', (1, 16, 4))]
    """
    for first, end in model.spans:
        chosen = [i for i in range(first, end) if i in layers]
        if chosen and len(chosen) < end - first:
            raise ConfigError(
                f"layers {first} to {end - 1} are one segment, of which only {chosen} are to be "
                "adapted; build the model with segments=segments_for(config, pattern)"
            )
        if chosen:
            for parent, name, linear in _projections(model, str(first)):
                if name in lora.targets:
                    setattr(parent, name, AdaptedLinear(linear, lora))


def merge_adapters(model: Decoder) -> None:
    """Add a decoder's adapters to the kernels they adapt; there are none afterwards.

    Products are formed and added in float32, then rounded to the kernel's dtype. While it works,
    one stack of kernels exists twice.

    Args:
      model: the decoder, changed in place; its arrays are not.
    """
    for parent, name, adapted in adapters(model):
        setattr(parent, name, adapted.merged())


def adapters(model: Decoder) -> Iterator[tuple[nnx.Module, str, AdaptedLinear]]:
    """Yield a decoder's adapted projections, each with its parent and name."""
    for first in model.layers:
        for parent, name, linear in _projections(model, first):
            if isinstance(linear, AdaptedLinear):
                yield parent, name, linear


def initial_adapters(abstract: Any, seed: int, shardings: Any = None) -> Any:
    """Make adapters that change nothing yet: A random, B zero.

    A is uniform in ±1 / sqrt(in), which is PEFT's (Kaiming uniform with a = sqrt(5)).

    Args:
      abstract: their shapes: the NNX state of `add_adapters`' leaves.
      seed: of the random numbers.
      shardings: where to put them; a pytree like ``abstract``.

    Returns:
      A pytree like ``abstract``, of arrays.
    """
    paths = [path for path, _ in named_leaves(abstract)]
    leaves, tree = jax.tree.flatten(abstract)

    def make() -> Any:
        key = jax.random.key(seed)
        values = []
        for number, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
            if "lora_B" in path:
                values.append(jnp.zeros(leaf.shape, leaf.dtype))
                continue
            bound = leaf.shape[-2] ** -0.5
            mine = jax.random.fold_in(key, number)
            values.append(jax.random.uniform(mine, leaf.shape, leaf.dtype, -bound, bound))
        return jax.tree.unflatten(tree, values)

    return jax.jit(make, out_shardings=shardings)()


def _projections(model: Decoder, segment: str) -> Iterator[tuple[nnx.Module, str, Linear]]:
    layer = model.layers[segment]
    for parent in (layer.self_attn, layer.mlp):
        for name in PROJECTIONS:
            if isinstance(linear := getattr(parent, name, None), Linear):
                yield parent, name, linear
