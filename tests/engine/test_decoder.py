"""The decoder in the engine: the same update as from stacked gradients, tied or not."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoo import mesh, resolve_conflicts, resolved_value_and_grad, stacked_value_and_grad
from jaxmoo.blocks import choose
from jaxmoo.models import Decoder, DecoderConfig, language_loss, summed_loss, target_mask
from jaxmoo.models.attention import cudnn, plain
from jaxmoo.models.families import LayerKind
from jaxmoo.models.rope import Rope

STACKED = r"^layers\.(\d+)\."
LANGUAGES, ROWS, LENGTH = 4, 4, 10


SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
# What is odd about Gemma, and about Cohere and Apertus together.
GEMMA = {
    "num_hidden_layers": 3,
    "tie_word_embeddings": True,
    "layer_kinds": (LayerKind(4, Rope(1e4)), LayerKind(None, Rope(1e6)), LayerKind(4, Rope(1e4))),
    "norm": "rms_offset",
    "norm_places": "both",
    "hidden_act": "gelu_pytorch_tanh",
    "qk_norm": True,
    "attention_multiplier": 0.5,
    "attn_logit_softcapping": 3.0,
    "embedding_multiplier": 4.0,
    "final_logit_softcapping": 2.0,
}
COHERE = {
    "layer_kinds": (LayerKind(4, Rope(1e4)), LayerKind(None, None)),
    "norm": "layer",
    "norm_places": "parallel",
    "hidden_act": "xielu",
    "gated_mlp": False,
    "rope_interleaved": True,
    "residual_multiplier": 0.7,
    "logit_scale": 0.4,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "router_aux_loss_coef": 0.3,
}
CONFIGS = {
    True: {"tie_word_embeddings": True},
    False: {},
    "gemma": GEMMA,
    "cohere": COHERE,
    "experts": EXPERTS,
    "cohere, tied": COHERE | {"tie_word_embeddings": True},
}


def config(tied):
    return DecoderConfig(**SIZES | CONFIGS[tied])


def graph_of(tied, remat="full", implementation="xla"):
    model = Decoder.abstract(config(tied), remat=remat)
    for layers in model.layers.values():  # whether cuDNN can, it asks of the device that is there
        layers.self_attn.attention = implementation
    return nnx.split(model)[0]


@functools.cache
def params_of(tied):
    draw = np.random.default_rng(0)

    def values(path, x):
        is_matrix = {"kernel", "embedding"} & {getattr(part, "key", None) for part in path}
        return draw.normal(0 if is_matrix else 1, 0.5, x.shape).astype(np.float32)

    return jax.tree.map_with_path(values, nnx.split(Decoder.abstract(config(tied)))[1])


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 48, (LANGUAGES, ROWS, LENGTH))
    mask = rng.random((LANGUAGES, ROWS, LENGTH)) < 0.6
    return {"tokens": jnp.asarray(tokens, jnp.int32), "loss_mask": jnp.asarray(mask)}


SLICED = choose({r"embedding$": "slices:4", ".*": "layer"})
SINGLE = choose({r"embedding$": "slices:4", ".*": "expert"})
CASES = {  # whether tied, or whose; blocks, aggregator, what is recomputed
    "tied, sliced": (True, SLICED, "fairgrad", "full"),
    "untied, sliced, random numbers": (False, SLICED, "graddrop", "none"),
    "tied, whole, with state": (True, "whole", "gradvac", "dots"),
    "tied, sliced, one at a time": (True, SLICED, "pcgrad", "full"),
    "untied, sliced, one at a time": (False, SLICED, "fairgrad", "none"),
    "gemma": ("gemma", SLICED, "pcgrad", "full"),
    "cohere": ("cohere", SLICED, "fairgrad", "dots"),
    "experts": ("experts", SINGLE, "fairgrad", "full"),
    "cohere, tied, one at a time": ("cohere, tied", SLICED, "pcgrad", "full"),
}


def gram_of(case):
    return "sketch:50" if case.endswith("one at a time") else "exact"


def found(case, device_mesh, implementation="xla"):
    """Losses, update and weights that the engine gives on a mesh."""
    tied, blocks, aggregator, remat = CASES[case]
    graph, params = graph_of(tied, remat, implementation), params_of(tied)

    def loss(p, b):
        coef = config(tied).router_aux_loss_coef
        return summed_loss(nnx.merge(graph, p), b, router_coef=coef)

    engine = resolved_value_and_grad(
        loss,
        params,
        num_objectives=LANGUAGES,
        weight_fn=lambda b: target_mask(b).sum(),
        mesh=device_mesh,
        aggregator=aggregator,
        blocks=blocks,
        stacked=STACKED,
        gram=gram_of(case),
        keep="one" if case.endswith("one at a time") else "gradients",
    )
    placed = jax.device_put(params, mesh.parameter_shardings(device_mesh, params, stacked=STACKED))
    data = jax.device_put(batch(), mesh.batch_sharding(device_mesh))
    losses, update, state = jax.jit(engine)(placed, data, engine.init())
    return jax.device_get(jax.tree.leaves((losses, update, state.weights)))


@functools.cache
def wanted(case):
    """The same from stacked gradients."""
    tied, blocks, aggregator, _ = CASES[case]
    graph, params = graph_of(tied), params_of(tied)
    resolver = resolve_conflicts(
        aggregator, blocks, stacked=STACKED, num_objectives=LANGUAGES, gram=gram_of(case)
    )

    @jax.jit
    def oracle(params, batch):
        coef = config(tied).router_aux_loss_coef
        losses, stacked = stacked_value_and_grad(
            lambda p, b: language_loss(nnx.merge(graph, p), b, router_coef=coef)
        )(params, batch)
        active = jnp.ones(LANGUAGES, bool)
        update, state = resolver.update(stacked, resolver.init(params), active=active)
        return losses, update, state.weights

    return jax.device_get(jax.tree.leaves(oracle(params, batch())))


def assert_near(found, wanted):
    for x, y in zip(found, wanted, strict=True):
        assert np.abs(x - y).max() < 1e-5 * max(np.abs(y).max(), 1e-6)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in ("tied, sliced", "gemma") else pytest.mark.slow)
        for case in CASES
    ],
)
def test_the_update_is_that_of_stacked_gradients(case):
    one = mesh.make_mesh(LANGUAGES, devices=jax.devices()[:1])
    assert_near(found(case, one), wanted(case))


def on_mesh(case, axis):
    """What a case gives on 2 x 2 x 2 devices."""
    return found(case, mesh.make_mesh(LANGUAGES, language=2, fsdp=2, **{axis: 2}))


def by_heads(case):
    """The same, where a kernel that stands for cuDNN's sees some heads."""
    heads = set()

    def kernel(q, k, v, segment_ids, *, window, scale):
        heads.add((q.shape[2], k.shape[2]))
        return plain.attend_causally(q, k, v, segment_ids, window, scale)

    cudnn._cudnn = kernel
    result = found(case, mesh.make_mesh(LANGUAGES, language=2, fsdp=2, tensor=2), "cudnn")
    assert (2, 1) in heads  # of 4 and 2
    return result


@pytest.mark.slow
def test_over_a_tensor_axis_every_device_attends_with_its_heads(eight_devices):
    case = "tied, sliced"
    assert_near(eight_devices("engine.test_decoder", "by_heads", case), wanted(case))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "axis"),
    [
        ("tied, sliced", "data"),
        ("untied, sliced, random numbers", "tensor"),
        ("untied, sliced, one at a time", "data"),
        ("gemma", "data"),
        ("experts", "data"),
        ("experts", "tensor"),
        ("cohere", "tensor"),
    ],
)
def test_any_mesh_gives_the_same_update(case, axis, eight_devices):
    assert_near(eight_devices("engine.test_decoder", "on_mesh", case, axis), wanted(case))
