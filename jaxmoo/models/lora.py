"""Low-rank adapters (LoRA) on the projections of a decoder's layers.

An adapted projection computes ``x W + b + s (x A) B`` with W and b frozen and a scale s of
``alpha / rank``, or ``alpha / sqrt(rank)`` if it is rank-stabilised. A [in, r] and B [r, out] are
leaves like all others, stacked by layers and named after Hugging Face's PEFT:
``layers.3.self_attn.q_proj.lora_A.kernel``. What works on parameters by their paths (blocks, the
engine, shardings, checkpoints) therefore works on adapters. Every expert of a mixture has adapters
of its own, stacked as its kernels are: A [E, in, r] and B [E, r, out].

With weight decomposition (DoRA), ``x (W + s A B) m / norm + b``, where m [out] is trained, too
(``lora_magnitude_vector``), and norm [out] is that of the columns of ``W + s A B``, which passes no
gradient on.

Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*,
`arXiv:2106.09685 <https://arxiv.org/abs/2106.09685>`_; Kalajdzievski, *A Rank Stabilization
Scaling Factor for Fine-Tuning with LoRA*, `arXiv:2312.03732 <https://arxiv.org/abs/2312.03732>`_;
Liu et al., *DoRA: Weight-Decomposed Low-Rank Adaptation*,
`arXiv:2402.09353 <https://arxiv.org/abs/2402.09353>`_.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoo.dtypes import at_least_float32
from jaxmoo.errors import ConfigError, did_you_mean, shown
from jaxmoo.kernels.quantized import dequantize
from jaxmoo.models.adapted_kernel import AdaptedKernel
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.linear import Linear
from jaxmoo.models.paths import compile_regex, named_leaves, parameter_paths
from jaxmoo.models.quantization import projections
from jaxmoo.models.quantized_kernel import QuantizedKernel, is_quantized_part
from jaxmoo.projections import PROJECTIONS

__all__ = [
    "ADAPTERS",
    "ALL_LINEAR",
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
ADAPTERS = r"\.lora_([AB]\.kernel|magnitude_vector)$"

_MOST_ALPHA = 1e30  # kernels are float32

ALL_LINEAR = "all-linear"  # PEFT's name for all of them

NO_DORA = (
    "adapters of experts cannot be weight-decomposed (DoRA), by peft neither. Adapt attention "
    "alone (q_proj, k_proj, v_proj, o_proj), or do without."
)


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which projections get adapters, and of what kind.

    Attributes:
      rank: r.
      alpha: adapters are scaled by ``alpha / rank``.
      targets: names of projections; by default, and with ``all-linear``, all of a layer.
      rslora: whether adapters are scaled by ``alpha / sqrt(rank)`` instead.
      dora: whether the norms of the adapted kernels' columns are trained apart.
      rank_pattern: ranks of single projections, by name, in place of `rank`.
      alpha_pattern: alphas of single projections, by name, in place of `alpha`.

    Raises:
      ConfigError: on a rank or alpha that is not positive, or projections that do not exist.

    Example:
      >>> lora = LoRA(rank=8, alpha=16.0, rank_pattern={"down_proj": 32})
      >>> lora.scale_of("q_proj"), lora.scale_of("down_proj")
      (2.0, 0.5)
      >>> LoRA(rank=8, alpha=16.0, targets=("query",))
      Traceback (most recent call last):
      ...
      jaxmoo.errors.ConfigError: no projection is called 'query'. A layer has q_proj, k_proj,
      v_proj, o_proj, gate_proj, up_proj, down_proj; embeddings, the head and routers get no
      adapters.
    """

    rank: int
    alpha: float
    targets: Sequence[str] = PROJECTIONS
    rslora: bool = False
    dora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if ALL_LINEAR in self.targets:
            if self.targets != ALL_LINEAR and set(self.targets) != {ALL_LINEAR}:
                raise ConfigError(f"{ALL_LINEAR} means all projections: name it alone.")
            object.__setattr__(self, "targets", PROJECTIONS)
        for rank in (self.rank, *self.rank_pattern.values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(
                    f"the rank of adapters must be an integer of at least 1, found {shown(rank)}."
                )
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
            if not (number and 0 < alpha < _MOST_ALPHA):
                raise ConfigError(
                    f"alpha of adapters must be a number above 0 and below {_MOST_ALPHA:g}, found "
                    f"{shown(alpha)}."
                )
        if not self.targets:
            raise ConfigError(f"no projections to adapt: name some of {', '.join(PROJECTIONS)}.")
        for name in (*self.targets, *self.rank_pattern, *self.alpha_pattern):
            if name not in PROJECTIONS:
                raise ConfigError(
                    f"no projection is called {name!r}.{did_you_mean(name, PROJECTIONS)} A layer "
                    f"has {', '.join(PROJECTIONS)}; embeddings, the head and routers get no "
                    "adapters."
                )
            if name not in self.targets:
                raise ConfigError(
                    f"{name} has a rank or an alpha of its own, but gets no adapters: it is not "
                    f"among {', '.join(self.targets)}."
                )

    def rank_of(self, projection: str) -> int:
        """The rank of a projection's adapters."""
        return self.rank_pattern.get(projection, self.rank)

    def alpha_of(self, projection: str) -> float:
        """The alpha of a projection's adapters."""
        return self.alpha_pattern.get(projection, self.alpha)

    def scale_of(self, projection: str) -> float:
        """Factor of the product of a projection's adapters."""
        return _scale(self.alpha_of(projection), self.rank_of(projection), self.rslora)

    @property
    def scale(self) -> float:
        """The same of a projection without a rank and an alpha of its own."""
        return _scale(self.alpha, self.rank, self.rslora)


def _scale(alpha: float, rank: int, rslora: bool) -> float:
    return alpha / (rank**0.5 if rslora else rank)


class AdaptedLinear(Linear):
    """A `Linear` map with an adapter; its own kernel and bias are those of the map.

    The adapter's leaves are shapes only, until `initial_adapters` or a file gives them values.
    They are float32 whatever the kernel's dtype: small updates would vanish in bfloat16.

    Args:
      linear: the map to adapt, or a stack of them.
      lora: what kind of adapter.
      projection: which of its projections the map is.
    """

    def __init__(self, linear: Linear, lora: LoRA, projection: str):
        self.dtype, self.kernel, self.bias = linear.dtype, linear.kernel, linear.bias
        self.platform = linear.platform
        self.alpha, self.rslora = float(lora.alpha_of(projection)), lora.rslora
        rank = lora.rank_of(projection)
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
                for sizes in ((size_in, rank), (rank, size_out))
            )
        )
        self.lora_magnitude_vector = (
            nnx.eval_shape(lambda: nnx.Param(jnp.ones((*stack, size_out), jnp.float32)))
            if lora.dora
            else None
        )

    @property
    def rank(self) -> int:
        """The rank of the adapter."""
        return self.lora_A.kernel.shape[-1]

    @property
    def scale(self) -> float:
        """Factor of the product of A and B."""
        return _scale(self.alpha, self.rank, self.rslora)

    def __call__(self, x: jax.Array, of: jax.Array | None = None) -> jax.Array:
        """Map the last axis by the kernel and add what the adapter says; see `Linear`."""
        change = self.scale * self.lora_B(self.lora_A(x, of), of)
        if self.lora_magnitude_vector is None:
            return super().__call__(x, of) + change
        y = self.times_kernel(x) + change
        a, b = jax.lax.stop_gradient((self.lora_A.matrix(), self.lora_B.matrix()))
        norms = _column_norms(jax.lax.stop_gradient(self.matrix()), a, b, self.scale)
        # Not rounded by itself to bfloat16, which has no number between 1 and 1.0078.
        y = (y * (self.lora_magnitude_vector[...] / norms)).astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)

    def merged(self) -> Linear:
        """Return the one map that computes the same, in the kernel's dtype and place."""
        # Its sizes do not matter: it gets this map's own leaves.
        linear = nnx.eval_shape(
            lambda: Linear(
                1,
                1,
                bias=self.bias is not None,
                platform=self.platform,
                dtype=self.dtype,
                param_dtype=self.kernel.dtype,
                rngs=nnx.Rngs(0),
            )
        )
        linear.kernel = nnx.Param(adapted_kernel(self).merged())
        if self.bias is not None:
            linear.bias = self.bias
        return linear


def _column_norms(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """The norms [..., out] of the columns of ``kernel + scale a b``, which is not formed.

    The square of a sum: that of the kernel, twice the product of both, and that of the change, of
    which the last two need only matrices as small as a and b.
    """
    wide = at_least_float32(kernel.dtype)
    kernel, a, b = (x.astype(wide) for x in (kernel, a, scale * b))
    both = jnp.einsum("...ir,...io->...ro", a, kernel, precision="highest")
    own = jnp.einsum("...ir,...is,...so->...ro", a, a, b, precision="highest")
    squares = (kernel * kernel).sum(-2) + (b * (2 * both + own)).sum(-2)
    # Not below what rounding leaves of a column that the change cancels.
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(wide).tiny))


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

    In a model with experts, layers with one MLP instead get them on attention alone.

    Args:
      model: the decoder, changed in place. Each of its segments must lie within the layers to be
        adapted or outside of them; see `jaxmoo.models.segments_for`.
      lora: which projections, and what kind of adapters.
      layers: numbers of the layers to adapt.

    Raises:
      ConfigError: a segment holds both kinds of layers, or experts' kernels are to be decomposed.

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
            for parent, path, linear in projections(model, str(first)):
                # Where there are experts, PEFT means them by the names of an MLP's projections.
                others = model.config.num_experts and path[-2] == "mlp"
                if others or path[-1] not in lora.targets:
                    continue
                if lora.dora and "experts" in path:
                    raise ConfigError(NO_DORA)
                setattr(parent, path[-1], AdaptedLinear(linear, lora, path[-1]))


def merge_adapters(model: Decoder) -> None:
    """Add a decoder's adapters to the kernels they adapt; there are none afterwards.

    Products are formed and added in float32, then rounded to the kernel's dtype. While it works,
    one stack of kernels exists twice. Quantised kernels become what they stand for.

    Args:
      model: the decoder, changed in place; its arrays are not.
    """
    for parent, path, adapted in adapters(model):
        setattr(parent, path[-1], adapted.merged())
    for first in model.layers:
        for _, _, linear in projections(model, first):
            if isinstance(linear.kernel, QuantizedKernel):
                linear.kernel = nnx.Param(adapted_kernel(linear).merged())


def adapted_kernel(linear: Linear) -> AdaptedKernel:
    """A projection's kernels with what adapters add to them, if it has any.

    Args:
      linear: the projection, or a stack of them, with or without adapters.
    """
    kernel, a, b, scale, m = linear.kernel, None, None, None, None
    if isinstance(linear, AdaptedLinear):
        a, b = linear.lora_A.matrix(), linear.lora_B.matrix()
        scale, m = linear.scale, linear.lora_magnitude_vector
    return AdaptedKernel(
        kernel.parts if isinstance(kernel, QuantizedKernel) else kernel.get_value(),
        a,
        b,
        scale,
        None if m is None else m.get_value(),
        jnp.dtype(kernel.dtype),
    )


def quantized_kernels(model: Decoder) -> Iterator[tuple[tuple[str, ...], AdaptedKernel]]:
    """Yield a decoder's quantised kernels with their adapters, each by its projection's path."""
    for first in model.layers:
        for _, path, linear in projections(model, first):
            if isinstance(linear.kernel, QuantizedKernel):
                yield path, adapted_kernel(linear)


def adapters(model: Decoder) -> Iterator[tuple[nnx.Module, tuple[str, ...], AdaptedLinear]]:
    """Yield a decoder's adapted projections, each with its parent and path; see `projections`."""
    for first in model.layers:
        for parent, path, linear in projections(model, first):
            if isinstance(linear, AdaptedLinear):
                yield parent, path, linear


def initial_adapters(abstract: Any, seed: int, shardings: Any = None, *, frozen: Any = None) -> Any:
    """Make adapters that change nothing yet: A random, B zero, m the norms of the columns.

    A is uniform in ±1 / sqrt(in), which is PEFT's (Kaiming uniform with a = sqrt(5)).

    Args:
      abstract: their shapes: the NNX state of `add_adapters`' leaves.
      seed: of the random numbers.
      shardings: where to put them; a pytree like ``abstract``.
      frozen: the NNX state of the model's own leaves; needed with `LoRA.dora`.

    Returns:
      A pytree like ``abstract``, of arrays.

    Raises:
      ConfigError: there are magnitudes to be made, and no kernels to tell them.
    """
    paths = [path for path, _ in named_leaves(abstract)]
    leaves, tree = jax.tree.flatten(abstract)
    adapted = [path[:-1] for path in paths if path[-1] == "lora_magnitude_vector"]
    if adapted and frozen is None:
        raise ConfigError("adapters with magnitudes (DoRA) need the model's own kernels: frozen=")
    kernels: dict[tuple[str, ...], Any] = {}
    for path, leaf in named_leaves(frozen):
        if path[-1] == "kernel":
            kernels[path[:-1]] = leaf
        elif is_quantized_part(path):  # codes, then scales
            kernels[path[:-2]] = (*kernels.get(path[:-2], ()), leaf)

    def make(kernels: list[Any]) -> Any:
        key = jax.random.key(seed)
        values, norms = [], iter(kernels)
        for number, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
            if path[-1] == "lora_magnitude_vector":
                kernel = next(norms)
                kernel = dequantize(*kernel) if isinstance(kernel, tuple) else kernel
                wide = kernel.astype(at_least_float32(kernel.dtype))
                values.append(jnp.linalg.norm(wide, axis=-2).astype(leaf.dtype))
                continue
            if "lora_B" in path:
                values.append(jnp.zeros(leaf.shape, leaf.dtype))
                continue
            bound = leaf.shape[-2] ** -0.5
            mine = jax.random.fold_in(key, number)
            values.append(jax.random.uniform(mine, leaf.shape, leaf.dtype, -bound, bound))
        return jax.tree.unflatten(tree, values)

    return jax.jit(make, out_shardings=shardings)([kernels[path] for path in adapted])
