"""Adapters in the engine: resolved inside the backward pass, as from stacked gradients."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoo import mesh, resolve_conflicts, resolved_value_and_grad, stacked_value_and_grad
from jaxmoo.engine.layout import Layout
from jaxmoo.kernels.quantized import dequantize
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
from jaxmoo.models.lora import ADAPTERS, AdaptedLinear, quantized_kernels
from jaxmoo.models.quantization import quantize_base

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
# Blocks of nf4 fill its inputs.
WIDE = dataclasses.replace(CONFIG, hidden_size=128, intermediate_size=64, head_dim=32)
# So many that a language reaches some of them alone.
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2}
CONFIGS = {
    None: CONFIG,
    "nf4": WIDE,
    "int8": WIDE,
    "experts": dataclasses.replace(CONFIG, moe_intermediate_size=12, **EXPERTS),
    "experts, int8": dataclasses.replace(CONFIG, moe_intermediate_size=12, **EXPERTS),
}
LORA = LoRA(2, 4, ("k_proj", "o_proj", "up_proj"), dora=True, rank_pattern={"up_proj": 3})
OF_EXPERTS = LoRA(2, 4, ("o_proj", "gate_proj", "down_proj"), rank_pattern={"down_proj": 3})


def parts(remat="full", kind=None):
    """A decoder with adapters, B not zero, so that A learns too; and magnitudes without experts."""
    model = Decoder.abstract(CONFIGS[kind], remat=remat)
    add_adapters(model, OF_EXPERTS if model.config.num_experts else LORA, layers=[0, 1])
    graph, *states = nnx.split(model, trainable_filter(ADAPTERS), ...)
    rng = np.random.default_rng(0)
    return graph, *jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), states)


@functools.cache
def quantized_parts(kind, remat="full"):
    """The same on a quantised base, and the frozen part of an ordinary model that equals it."""
    graph, params, frozen = parts(remat, kind)
    model = nnx.merge(graph, params, frozen)
    quantize_base(model, kind.removeprefix("experts, "))
    graph, params, quantized = nnx.split(model, trainable_filter(ADAPTERS), ...)
    kernels = {path: adapted.kernel for path, adapted in quantized_kernels(model)}
    for path, variable in nnx.to_flat_state(frozen):
        if path[-1] == "kernel" and path[:-1] in kernels:
            variable.set_value(dequantize(*kernels[path[:-1]]))
    return graph, params, quantized, frozen


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


def quantized(kind):
    return kind is not None and kind != "experts"


@functools.cache
def oracle(kind=None, blocks="layer"):
    """Losses, update and weights from stacked gradients, of the model without quantised kernels.

    Also the shares of experts that languages do not reach.
    """
    graph, params, frozen = parts(kind=kind)
    if quantized(kind):
        frozen = quantized_parts(kind)[-1]
    resolver = resolve_conflicts(
        aggregator="fairgrad", blocks=blocks, stacked=STACKED, num_objectives=LANGUAGES
    )

    @jax.jit
    def step(params, frozen, batch):
        losses, stacked = stacked_value_and_grad(
            lambda p, b: language_loss(nnx.merge(graph, p, frozen), b)
        )(params, batch)
        active = jnp.ones(LANGUAGES, bool)
        update, state = resolver.update(stacked, resolver.init(params), active=active)
        missed = [  # [K, layers, E, in, out]
            (gradient == 0).all((-2, -1)).mean()
            for gradient in jax.tree.leaves(stacked)
            if gradient.ndim == 5
        ]
        return (losses, update, state.weights), missed

    return jax.device_get(step(params, frozen, batch()))


def difference(device_mesh, kind=None, remat="full", **options):
    """Largest relative difference of the engine's update, losses and weights from the oracle's."""
    made = quantized_parts(kind, remat) if quantized(kind) else parts(kind=kind)
    graph, params, frozen = made[:3]
    options = {"aggregator": "fairgrad", "blocks": "layer"} | options
    engine = engine_of(graph, params, frozen, device_mesh, **options)
    params, frozen = (
        jax.device_put(tree, mesh.parameter_shardings(device_mesh, tree, stacked=STACKED))
        for tree in (params, frozen)
    )
    data = jax.device_put(batch(), mesh.batch_sharding(device_mesh))
    losses, update, state = jax.jit(engine)(params, data, engine.init(), frozen)
    found, expected = (
        jax.device_get((losses, update, state.weights)),
        oracle(kind, options["blocks"])[0],
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@pytest.fixture
def one():
    return mesh.make_mesh(LANGUAGES, devices=jax.devices()[:1])


def on_mesh(axis, kind=None):
    """The difference on 2 x 2 devices."""
    sizes = {"language": 2, axis: 2}
    return difference(mesh.make_mesh(LANGUAGES, devices=jax.devices()[:4], **sizes), kind)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_the_update_is_that_of_stacked_gradients_on_any_mesh(axis, eight_devices):
    """The rank, 2, divides among the pieces of the second mesh, not of the first."""
    assert eight_devices("engine.test_adapters", "on_mesh", axis) < 1e-5


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_on_a_quantised_base_the_update_is_that_on_what_it_stands_for(one, kind):
    assert difference(one, kind) < 1e-5


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [
        ("experts", "expert"),
        pytest.param("experts", "layer", marks=pytest.mark.slow),
        pytest.param("experts, int8", "expert", marks=pytest.mark.slow),
    ],
)
def test_so_it_is_of_experts_some_of_which_a_language_does_not_reach(one, kind, blocks):
    missed = oracle(kind, blocks)[1]
    assert len(missed) == 4 and all(0.05 < share < 0.5 for share in missed)
    assert difference(one, kind, blocks=blocks) < 1e-5


def four_by_two(kind, blocks):
    """The difference on 4 x 2 devices."""
    return difference(mesh.make_mesh(LANGUAGES, language=4, fsdp=2), kind, blocks=blocks)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "blocks"), [("experts", "expert"), ("experts", "layer")])
def test_so_it_is_of_experts_on_eight_devices(kind, blocks, eight_devices):
    assert eight_devices("engine.test_adapters", "four_by_two", kind, blocks) < 1e-5


@pytest.mark.slow
def test_scales_are_exact_whatever_matrices_are_gathered_in(one):
    """Gathering in bfloat16 changes nothing if all else is numbers of bfloat16.

    Scales are those that it would round most, all the same way.
    """
    graph, params, frozen = quantized_parts("nf4")[:3]

    def value(path, x):
        if path[-2:] == ("kernel", "scales"):
            return 2 ** jnp.round(jnp.log2(x)) * (1 + 0.49 / 128)
        narrow = jnp.issubdtype(x.dtype, jnp.floating)
        return (2 * x).astype(jnp.bfloat16).astype(x.dtype) if narrow else x

    params, frozen = (
        nnx.from_flat_state([(p, v.replace(value(p, v[...]))) for p, v in nnx.to_flat_state(x)])
        for x in (params, frozen)
    )
    engine = engine_of(graph, params, frozen, one, aggregator="mean", dtype=jnp.bfloat16)
    losses = jax.jit(engine)(params, batch(), engine.init(), frozen)[0]
    model = nnx.merge(graph, *jax.tree.map(jnp.asarray, (params, frozen)))
    expected = jax.jit(jax.vmap(lambda b: language_loss(model, b)))(batch())
    np.testing.assert_allclose(losses, expected, rtol=3e-6)


def test_only_what_is_frozen_keeps_its_dtype_by_its_name():
    """A trainable matrix of the user's may be called so, too."""
    array = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    found = {
        (path, labels is None): Layout.of(
            path, array, stacked=False, pieces=1, labels=labels, dtype=jnp.bfloat16
        ).gathered_dtype
        for path in ("up_proj.kernel.scales", "up_proj.scales")
        for labels in (None, np.zeros(1, int))
    }
    assert [key for key, dtype in found.items() if dtype == jnp.float32] == [
        ("up_proj.kernel.scales", True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "kind"), [("fsdp", "nf4"), ("tensor", "nf4"), ("fsdp", "int8")])
def test_so_it_is_on_any_mesh(axis, kind, eight_devices):
    assert eight_devices("engine.test_adapters", "on_mesh", axis, kind) < 1e-5


@pytest.mark.slow
def test_so_it_is_one_language_at_a_time(one):
    """Losses and activations; sketched weights are estimates."""
    graph, params, frozen = quantized_parts("nf4")[:3]
    found = []
    for keep in ("gradients", "one"):
        engine = engine_of(
            graph, params, frozen, one, aggregator="mean", gram="sketch:64", keep=keep
        )
        found.append(jax.jit(engine)(params, batch(), engine.init(), frozen)[:2])
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())


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
        engine = engine_of(graph, params, frozen, one, aggregator="mean", blocks=rule)
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
