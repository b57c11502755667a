"""How well a step uses its devices: model FLOPs, and their share of what the devices could do.

*Model FLOPs* are those a step needs by its mathematics, whoever computes it: two per weight and
token in the forward pass; in the backward pass two more for the gradient with respect to the
activations, from the first trained layer on, and two more for every trained weight. Of a mixture of
experts, those weights count that a token reads. Attention adds 4 S H per token, layer and
direction, for S positions and H = heads times head width, halved because it is causal, and less by
what a window leaves out; its backward pass needs twice its forward pass.
What is computed twice to save memory, the resolution of conflicts and the optimiser do not count,
and neither do the embedding's lookup, norms and elementwise operations. Every position of a batch
counts, padding too.

*MFU*, model FLOPs utilisation, is model FLOPs per second over the devices' peak (Chowdhery et al.
2022, appendix B).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxmoo.models import DecoderConfig
from jaxmoo.models.paths import named_leaves

__all__ = ["model_flops", "peak_flops"]

# Dense bfloat16 FLOP/s of one device, from its maker's data sheet, by what JAX calls it.
_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 150e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


def peak_flops(device: Any) -> float | None:
    """Return the peak of a device of JAX in dense bfloat16 FLOP/s; None where it is not known.

    Example:
      >>> import jax
      >>> peak_flops(jax.devices("cpu")[0]) is None
      True
    """
    kind = device.device_kind
    # The longest name first: an "H100 PCIe" is no "H100".
    names = sorted(_PEAKS, key=len, reverse=True)
    return next((_PEAKS[name] for name in names if name.lower() in kind.lower()), None)


def model_flops(
    architecture: DecoderConfig, params: Any, frozen: Any, positions: int, length: int
) -> float:
    """Count the model FLOPs of a training step.

    Args:
      architecture: the model's sizes.
      params: the trained part of a :class:`~jaxmoo.models.Decoder`'s state, or its shapes.
      frozen: the rest of it.
      positions: tokens of the step over all languages, padding included.
      length: S, positions of a row, over which attention reaches.

    Returns:
      Floating-point operations, by the formula at the head of this module.

    Example:
      >>> from flax import nnx
      >>> from jaxmoo.models import Decoder
      >>> config = DecoderConfig(
      ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
      ...     num_attention_heads=4, num_key_value_heads=2, head_dim=8,
      ...     max_position_embeddings=128)
      >>> state = nnx.state(Decoder.abstract(config))
      >>> weights = 2 * (16 * (32 + 16 + 16) + 32 * 16 + 3 * 16 * 32) + 16 * 64
      >>> attention = 2 * 4 * 8 * 100 * 2 * 3  # layers, heads, width, S, halved 4, three passes
      >>> nothing = nnx.State({})
      >>> model_flops(config, state, nothing, 10, 100) == 10 * (6 * weights + attention)
      True
    """
    layers = architecture.num_hidden_layers
    weights, trained = np.zeros(layers), np.zeros(layers)
    head = architecture.vocab_size * architecture.hidden_size
    table = "embed_tokens" if architecture.tie_word_embeddings else "lm_head"
    head_trained = passed = 0  # passed: by gradients, to something that learns before the head
    first = layers  # that learns: the backward pass ends there
    for tree, learns in ((params, True), (frozen, False)):
        for path, leaf in named_leaves(tree):
            if learns and path[0] == table:
                head_trained = head
            if learns and path[0] != "lm_head":
                passed = head
            if learns and path[0] == "embed_tokens":
                first = 0
            if path[0] != "layers":
                continue
            begin, count = int(path[1]), leaf.shape[0]
            first = min(first, begin) if learns else first
            size = math.prod(leaf.shape[1:])
            if len(leaf.shape) == 4:  # of the experts, a token reads some
                size = size // architecture.num_experts * architecture.num_experts_per_tok
            if len(leaf.shape) >= 3:  # a stack of matrices
                weights[begin : begin + count] += size
                trained[begin : begin + count] += learns * size
    forward = 2 * (weights.sum() + head)
    backward = 2 * (weights[first:].sum() + passed) + 2 * (trained.sum() + head_trained)
    seen = np.array([_seen(kind.window, length) for kind in architecture.kinds])
    attention = 4 * architecture.num_attention_heads * architecture.head_dim * seen
    return float(positions * (forward + backward + attention.sum() + 2 * attention[first:].sum()))


def _seen(window: int | None, length: int) -> float:
    """How many positions one attends to, on average over a row; each counts half itself."""
    reach = min(length, window or length)
    return reach * (1 - reach / (2 * length))
