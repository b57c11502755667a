"""A decoder on a base in few bits: what it computes, and what it holds meanwhile."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxmoo.models import Decoder, DecoderConfig, LoRA, add_adapters, token_nll, trainable_filter
from jaxmoo.models.lora import ADAPTERS, quantized_kernels
from jaxmoo.models.quantization import count_parameters, quantize_base
from jaxmoo.train.throughput import model_flops

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=16,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=32,
)
WEIGHTS = 16 * (4 * 128 * 128 + 3 * 128 * 256)  # of all projections


def parts(kind, remat="full", **lora):
    """Shapes of the adapters of a decoder in bfloat16, and of the rest."""
    model = Decoder.abstract(CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat=remat)
    if kind is not None:
        quantize_base(model, kind)
    assert any(quantized_kernels(model)) == (kind is not None)
    add_adapters(model, LoRA(2, 4, **lora), layers=range(16))
    return nnx.split(model, trainable_filter(ADAPTERS), ...)


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(("remat", "dora"), [("full", False), ("none", False), ("none", True)])
def test_no_matrix_outlives_its_product(remat, dora):
    """A weight takes 4.5 bits, and what a gradient needs beside it half of a stack in bfloat16."""
    graph, adapters, frozen = parts("nf4", remat, dora=dora)
    kept = size(parts(None)[2]) - size(frozen)
    assert kept * 8 == WEIGHTS * (16 - 4.5)
    batch = {
        "tokens": jax.ShapeDtypeStruct((1, 8), jnp.int32),
        "loss_mask": jax.ShapeDtypeStruct((1, 8), bool),
    }
    gradient = jax.grad(lambda p, f, b: token_nll(nnx.merge(graph, p, f), b).sum())
    memory = jax.jit(gradient).lower(adapters, frozen, batch).compile().memory_analysis()
    assert memory.argument_size_in_bytes <= size((adapters, frozen, batch))
    # With DoRA, what the norms are applied to is kept in float32: activations, no matrices.
    assert memory.temp_size_in_bytes * 8 < (9 if dora else 8) * WEIGHTS


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_and_work_are_counted_as_without(kind):
    ordinary, quantized = parts(None), parts(kind)
    assert count_parameters(quantized[2]) == count_parameters(ordinary[2])
    work = {
        model_flops(CONFIG, params, frozen, 10, 8) for _, params, frozen in (ordinary, quantized)
    }
    assert len(work) == 1


@pytest.mark.parametrize("dora", [False, True])
def test_matrices_are_formed_as_their_devices_want(dora):
    """For a TPU without looking numbers up, for products and norms of columns alike."""
    text = {}
    for platform in ("cpu", "tpu"):
        model = Decoder.abstract(CONFIG, platform=platform)
        quantize_base(model, "nf4")
        add_adapters(model, LoRA(2, 4, dora=dora), layers=range(16))
        graph, state = nnx.split(model.layers["0"].mlp.up_proj)
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state)
        x = jax.ShapeDtypeStruct((4, 128), jnp.float32)
        traced = jax.make_jaxpr(lambda s, x, graph=graph: nnx.merge(graph, s)(x))(one, x)
        text[platform] = str(traced)
    assert "gather" in text["cpu"] and "gather" not in text["tpu"]
