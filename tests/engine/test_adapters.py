"""Adapters in the engine: resolved inside the backward pass, as from stacked gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoo import mesh, resolve_conflicts, resolved_value_and_grad, stacked_value_and_grad
from jaxmoo.models import (
    Decoder,
    DecoderConfig,
    LoRA,
    add_adapters,
    language_loss,
    target_mask,
    token_nll,
    trainable_filter,
)
from jaxmoo.models.linear import Linear
from jaxmoo.models.lora import ADAPTERS, AdaptedLinear

STACKED = r"^layers\.(\d+)\."
LANGUAGES, ROWS, LENGTH = 4, 4, 10
CONFIG = DecoderConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    tie_word_embeddings=True,
    attention_bias=True,
)


def parts(remat="full"):
    """A decoder with adapters and magnitudes, B not zero, so that A learns too."""
    model = Decoder.abstract(CONFIG, remat=remat)
    lora = LoRA(2, 4, ("k_proj", "o_proj", "up_proj"), dora=True, rank_pattern={"up_proj": 3})
    add_adapters(model, lora, layers=[0, 1])
    graph, *states = nnx.split(model, trainable_filter(ADAPTERS), ...)
    rng = np.random.default_rng(0)
    return graph, *jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), states)


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 48, (LANGUAGES, ROWS, LENGTH))
    mask = rng.random((LANGUAGES, ROWS, LENGTH)) < 0.6
    return {"tokens": jnp.asarray(tokens, jnp.int32), "loss_mask": jnp.asarray(mask)}


def engine_of(graph, params, frozen, device_mesh, **options):
    return resolved_value_and_grad(
        lambda p, f, b: token_nll(nnx.merge(graph, p, f), b).sum(),
        params,
        frozen=frozen,
        stacked=STACKED,
        num_objectives=LANGUAGES,
        weight_fn=lambda b: target_mask(b).sum(),
        mesh=device_mesh,
        **options,
    )


@functools.cache
def oracle():
    """Losses, update and weights from stacked gradients."""
    graph, params, frozen = parts()
    resolver = resolve_conflicts(
        aggregator="cagrad", blocks="layer", stacked=STACKED, num_objectives=LANGUAGES
    )

    @jax.jit
    def step(params, frozen, batch):
        losses, stacked = stacked_value_and_grad(
            lambda p, b: language_loss(nnx.merge(graph, p, frozen), b)
        )(params, batch)
        active = jnp.ones(LANGUAGES, bool)
        update, state = resolver.update(stacked, resolver.init(params), active=active)
        return losses, update, state.weights

    return jax.device_get(step(params, frozen, batch()))


def difference(device_mesh):
    """Largest relative difference of the engine's update, losses and weights from the oracle's."""
    graph, params, frozen = parts()
    engine = engine_of(graph, params, frozen, device_mesh, aggregator="cagrad", blocks="layer")
    params, frozen = (
        jax.device_put(tree, mesh.parameter_shardings(device_mesh, tree, stacked=STACKED))
        for tree in (params, frozen)
    )
    data = jax.device_put(batch(), mesh.batch_sharding(device_mesh))
    losses, update, state = jax.jit(engine)(params, data, engine.init(), frozen)
    found, expected = jax.device_get((losses, update, state.weights)), oracle()
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@pytest.fixture
def one():
    return mesh.make_mesh(LANGUAGES, devices=jax.devices()[:1])


def on_mesh(axis):
    """The difference on 2 x 2 devices."""
    sizes = {"language": 2, axis: 2}
    return difference(mesh.make_mesh(LANGUAGES, devices=jax.devices()[:4], **sizes))


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_the_update_is_that_of_stacked_gradients_on_any_mesh(axis, eight_devices):
    """The rank, 2, divides among the pieces of the second mesh, not of the first."""
    assert eight_devices("engine.test_adapters", "on_mesh", axis) < 1e-5


@pytest.mark.parametrize(
    "remat", ["full", *(pytest.param(x, marks=pytest.mark.slow) for x in ("dots", "none"))]
)
def test_adapters_are_blocks_of_their_own_resolved_inside_the_pass(one, remat):
    """No gradient of an adapter outlives its layer, and none of the model's own is computed."""
    graph, params, frozen = parts(remat)
    blocks = {
        "layer": ["layers.0", "layers.1"],
        "module": [f"layers.{i}.{name}" for i in (0, 1) for name in ("mlp", "self_attn")],
        "bytes:1KiB": None,
        "leaf": None,
    }
    for rule, names in blocks.items():
        engine = engine_of(graph, params, frozen, one, aggregator="mgda", blocks=rule)
        usage = engine.usage(params, batch(), frozen)
        assert engine.deferred(usage) == frozenset()
        assert names is None or list(engine.partition.names) == names
        assert sum(engine.partition.sizes) == sum(x.size for x in jax.tree.leaves(params))


def test_magnitudes_that_bfloat16_cannot_tell_apart_count():
    """Outputs are rounded, but magnitudes are not: on average they count as they are."""
    linear = Linear(
        16, 8, platform="cpu", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    adapted = AdaptedLinear(linear, LoRA(2, 4, ("q_proj",), dora=True), "q_proj")
    adapted.lora_A.kernel = nnx.Param(jnp.ones((16, 2)))
    adapted.lora_B.kernel = nnx.Param(jnp.zeros((2, 8)))
    norms = jnp.linalg.norm(linear.kernel[...].astype(jnp.float32), axis=0)
    adapted.lora_magnitude_vector = nnx.Param(1.0117 * norms)
    x = jax.random.normal(jax.random.key(0), (4096, 16), jnp.bfloat16)
    before, after = (f(x).astype(jnp.float32) for f in (linear, adapted))
    slope = (before * after).sum() / (before * before).sum()
    np.testing.assert_allclose(slope, 1.0117, atol=1e-3)
