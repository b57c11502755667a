"""Model FLOPs are those of the compiled program where nothing is computed twice."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxmoo.engine import cost
from jaxmoo.models import Decoder, DecoderConfig, segments_for, trainable_filter
from jaxmoo.models.families import LayerKind
from jaxmoo.models.paths import parameter_counts
from jaxmoo.models.rope import Rope
from jaxmoo.train.throughput import model_flops, peak_flops

CONFIG = DecoderConfig(
    vocab_size=96,
    hidden_size=16,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
ROWS, LENGTH = 3, 24


@pytest.mark.parametrize("pattern", [".*", r"^layers\.[23]\.", r"^lm_head", r"mlp"])
def test_they_equal_the_products_of_a_traced_step(pattern):
    """The traced step multiplies the whole square of scores, of which the formula counts half."""
    segments = segments_for(CONFIG, pattern)
    model = Decoder(CONFIG, segments=segments, remat="none", rngs=nnx.Rngs(0))
    graph, params, frozen = nnx.split(model, trainable_filter(pattern), ...)

    def loss(params, frozen, tokens):
        return jax.nn.logsumexp(nnx.merge(graph, params, frozen)(tokens)).sum()

    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)
    traced = jax.jit(jax.grad(loss)).trace(params, frozen, tokens)
    counted = cost.flops(traced.jaxpr)["total"]
    formula = model_flops(CONFIG, params, frozen, ROWS * LENGTH, LENGTH)
    whole_square = model_flops(CONFIG, params, frozen, ROWS * LENGTH, 2 * LENGTH)
    assert whole_square == pytest.approx(counted, rel=0.01)
    assert formula < whole_square


def test_of_experts_those_count_that_read_a_token():
    """Two of eight, half as wide as an MLP: the work of that MLP, and of the router."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    mixed = dataclasses.replace(CONFIG, **experts)
    dense, found = (
        model_flops(c, nnx.state(Decoder.abstract(c)), nnx.State({}), ROWS * LENGTH, LENGTH)
        for c in (CONFIG, mixed)
    )
    assert found - dense == 6 * ROWS * LENGTH * 4 * 16 * 8
    total, read = parameter_counts(mixed)
    assert total - read == 4 * 6 * 3 * 16 * 20  # layers, experts left out, their kernels


def test_a_window_counts_only_what_it_lets_through():
    """Of a row, in layers that learn thrice; a position itself counts half."""
    kinds = (LayerKind(5, Rope()), *[LayerKind(None, Rope())] * 2, LayerKind(LENGTH, Rope()))
    windows = dataclasses.replace(CONFIG, layer_kinds=kinds)
    state = nnx.state(Decoder.abstract(CONFIG))
    plain, near = (
        model_flops(config, state, nnx.State({}), ROWS * LENGTH, LENGTH)
        for config in (CONFIG, windows)
    )
    left_out = sum(max(0, i - 5 + 0.5) for i in range(LENGTH) if i >= 5)
    assert plain - near == ROWS * 3 * 4 * 4 * 8 * left_out


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_name(kind, peak):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == peak
