"""The frozen base of adapters in few bits (QLoRA): the kernels of all projections of all layers.

Embeddings, head, norms and biases stay as they are. Each kernel becomes a
:class:`~jaxmoo.models.quantized_kernel.QuantizedKernel`, whose leaves are named, stacked, sharded
and gathered like all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoo.errors import ConfigError
from jaxmoo.kernels.quantized import quantize, quantized_spec
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.experts import Experts
from jaxmoo.models.linear import Linear
from jaxmoo.models.paths import named_leaves
from jaxmoo.models.quantized_kernel import QuantizedKernel, parameters_in
from jaxmoo.projections import PROJECTIONS

__all__ = ["count_parameters", "projections", "quantize_base"]


def quantize_base(model: Decoder, kind: str) -> None:
    """Hold the kernels of a decoder's projections in few bits.

    Args:
      model: the decoder, changed in place; of an abstract one, the shapes change. What is quantised
        already stays as it is. To load a model so, and never hold all of it, see
        :func:`jaxmoo.hf.load_model`.
      kind: one of :data:`jaxmoo.kernels.quantized.KINDS`.

    Raises:
      ConfigError: there is no such kind, or it cannot hold one of the kernels.

    Example:
      >>> from jaxmoo.models import DecoderConfig
      >>> config = DecoderConfig(
      ...     vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
      ...     num_attention_heads=4, num_key_value_heads=2, head_dim=16,
      ...     max_position_embeddings=128)
      >>> model = Decoder.abstract(config)
      >>> quantize_base(model, "nf4")
      >>> [(".".join(path), leaf.shape) for path, leaf in named_leaves(nnx.state(model))
      ...  if "up_proj" in path]
      [('layers.0.mlp.up_proj.kernel.codes', (2, 1, 32, 128)),
       ('layers.0.mlp.up_proj.kernel.scales', (2, 1, 128))]
    """
    for first in model.layers:
        for _, path, linear in projections(model, first):
            if isinstance(linear.kernel, QuantizedKernel):
                continue
            try:
                linear.kernel = _quantized(linear.kernel.get_value(), kind)
            except ConfigError as error:
                raise ConfigError(f"{path[-1]}: {error}") from None


def projections(
    model: Decoder, segment: str
) -> Iterator[tuple[nnx.Module, tuple[str, ...], Linear]]:
    """Yield a segment's projections that may be adapted, each with its parent and path.

    Those of experts are stacked once more, by their experts. The last part of the path, which is
    that of the model's state, is a projection's name in its parent.
    """
    layer = model.layers[segment]
    parents: dict[tuple[str, ...], nnx.Module] = {("self_attn",): layer.self_attn}
    if isinstance(layer.mlp, Experts):
        parents["mlp", "experts"] = layer.mlp.experts
    else:
        parents["mlp",] = layer.mlp
    for path, parent in parents.items():
        for name in PROJECTIONS:
            if isinstance(linear := getattr(parent, name, None), Linear):
                yield parent, ("layers", segment, *path, name), linear


def count_parameters(state: Any) -> int:
    """Count the parameters of a model that its state, or a part of it, holds."""
    return sum(parameters_in(path, leaf) for path, leaf in named_leaves(state))


def _quantized(kernel: Any, kind: str) -> QuantizedKernel:
    """Quantise a stack of kernels, or the shape of one."""
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return QuantizedKernel(*quantized_spec(kernel.shape, kind), kernel.dtype)
    *stack, size_in, size_out = kernel.shape
    each = [quantize(one, kind) for one in np.asarray(kernel).reshape(-1, size_in, size_out)]
    parts = (np.stack(part) for part in zip(*each, strict=True))
    codes, scales = (jnp.asarray(x.reshape(*stack, *x.shape[1:])) for x in parts)
    return QuantizedKernel(codes, scales, kernel.dtype)
