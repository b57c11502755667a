"""Every implementation of attention against the definition, under the language vmap."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from closeness import relative_error
from jaxmoo import mesh
from jaxmoo.errors import ConfigError
from jaxmoo.models import Decoder, DecoderConfig, language_loss
from jaxmoo.models.attention import Windows, attend, choose_attention
from jaxmoo.models.families import LayerKind
from jaxmoo.models.rope import Rope

LANGUAGES, ROWS, LENGTH, HEADS, GROUPS, WIDTH = 3, 2, 150, 4, 2, 24


def by_definition(q, k, v, segment_ids, window, scale=None, cap=None):
    """One softmax per head and token, over the tokens it may see."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) * (scale or 1 / np.sqrt(q.shape[-1]))
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    i, j = np.indices(scores.shape[-2:])
    seen = (j <= i) & (i - j < (window or i.size))
    if segment_ids is not None:
        seen = seen & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnqk,bknh->bqnh", weights, v)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    q, k, v, weight = (
        rng.normal(size=(LANGUAGES, ROWS, LENGTH, heads, WIDTH)).astype(np.float32)
        for heads in (HEADS, GROUPS, GROUPS, HEADS)
    )
    segments = np.sort(rng.integers(0, 4, (LANGUAGES, ROWS, LENGTH)), -1).astype(np.int32)
    return q, k, v, segments, weight


def value_and_gradients(function, q, k, v, segments, weight, in_axes=0):
    """Of every language, by vmap; the weights make every output count differently."""

    def loss(q, k, v, segments, weight):
        return (function(q, k, v, segments) * weight).sum()

    mapped = jax.vmap(jax.value_and_grad(loss, (0, 1, 2)), in_axes)
    return jax.tree.leaves(jax.jit(mapped)(q, k, v, segments, weight))


WINDOWS = (None, 37)


def for_every_window(function, inputs):
    """Values and gradients where a token sees all before it, and where it sees 37."""
    return [
        value_and_gradients(lambda *a, w=window: function(*a, w), *inputs) for window in WINDOWS
    ]


@pytest.fixture(scope="module")
def expected(inputs):
    with jax.enable_x64(True):
        double = [x.astype(np.float64) if x.dtype == np.float32 else x for x in inputs]
        return for_every_window(by_definition, double)


# On a CPU the TPU's kernel is interpreted.
@pytest.mark.parametrize("implementation", ["xla", pytest.param("tpu", marks=pytest.mark.slow)])
def test_values_and_gradients_of_packed_rows_are_those_of_the_definition(
    inputs, expected, implementation
):
    found = for_every_window(
        lambda q, k, v, s, window: attend(
            q, k, v, segment_ids=s, window=window, implementation=implementation
        ),
        inputs,
    )
    for window, ours, wanted in zip(WINDOWS, found, expected, strict=True):
        for x, y in zip(ours, wanted, strict=True):
            assert relative_error(x, y) < 3e-6, window


@pytest.mark.parametrize("implementation", ["xla", pytest.param("tpu", marks=pytest.mark.slow)])
def test_a_layer_may_learn_when_it_runs_which_window_it_has(inputs, implementation):
    """And scores may be scaled otherwise, and capped."""
    form = {"scale": 0.3, "soft_cap": 2.0}

    @jax.jit
    def function(which, *arguments):
        windows = Windows(WINDOWS, which)
        return value_and_gradients(
            lambda *a: attend(
                *a[:3], segment_ids=a[3], window=windows, implementation=implementation, **form
            ),
            *arguments,
        )

    with jax.enable_x64(True):
        double = [x.astype(np.float64) if x.dtype == np.float32 else x for x in inputs]
        expected = for_every_window(lambda *a: by_definition(*a, *form.values()), double)
    for which, wanted in enumerate(expected):
        for x, y in zip(function(jnp.int32(which), *inputs), wanted, strict=True):
            assert relative_error(x, y) < 5e-6, which


def test_what_vmap_leaves_unmapped_may_be_anything_also_the_cotangent(inputs):
    q, k, v, _, weight = inputs
    arguments = (q, k[0], v[0], None, weight[0])
    axes = (0, None, None, None, None)
    found, expected = (
        value_and_gradients(
            lambda q, k, v, _, name=name: attend(q, k, v, implementation=name), *arguments, axes
        )
        for name in ("tpu", "xla")
    )
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) < 3e-6


CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    sliding_window=100,
)


TWO_KINDS = dataclasses.replace(
    CONFIG,
    sliding_window=None,
    layer_kinds=(LayerKind(100, Rope(1e4)), LayerKind(None, None)),
)


def lowered_step(
    implementation: str,
    platform: str,
    *,
    packed: bool,
    remat: str = "full",
    config: DecoderConfig = CONFIG,
) -> str:
    """The gradients of a bfloat16 decoder on three languages, as a program for another device."""
    kind = {"cuda": "gpu"}.get(platform, platform)
    model = Decoder.abstract(
        config, dtype=jnp.bfloat16, platform=kind, attention="xla", remat=remat
    )
    for layers in model.layers.values():  # whether cuDNN can, it asks of the device that is there
        layers.self_attn.attention = implementation
    graphdef, state = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((LANGUAGES, 2, 256), jnp.int32)
    batch = {"tokens": tokens, "loss_mask": jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)}
    if packed:
        batch |= {"segment_ids": tokens, "positions": tokens}
    step = jax.vmap(
        jax.grad(lambda s, b: language_loss(nnx.merge(graphdef, s), b)), in_axes=(None, 0)
    )
    return jax.jit(step).trace(state, batch).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("packed", [False, True])
def test_a_decoders_gradients_become_cudnns_calls(monkeypatch, packed):
    # What JAX asks of the machine it compiles for is not there where programs are only lowered.
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )
    text = lowered_step("cudnn", "cuda", packed=packed)
    calls = re.findall(
        r"@(__cudnn\$\w+)\((.*?)\).*?backend_config = \"(.*?[^\\])\".*? : \((.*)", text
    )
    name = "ScaleBiasSoftmax" if packed else "Softmax"
    assert {call[0] for call in calls} == {f"__cudnn$fmha{name}", f"__cudnn$fmha{name}Backward"}
    for _, _, settings, types in calls:
        settings = json.loads(settings.replace("\\22", '"'))["cudnn_fmha_backend_config"]
        # Languages are part of the batch, and the mask is one for all heads.
        assert settings["intermediate_tensor_shape"]["dimensions"] == ["6", "8", "256", "256"]
        assert settings["mask_type"] == "CAUSAL"
        assert settings["sliding_window_length"] == 100
        assert ("tensor<6x1x256x256xbf16>" in types) == packed
        assert "tensor<6x256x2x16xbf16>" in types


@pytest.mark.parametrize(("implementation", "platform"), [("cudnn", "cuda"), ("tpu", "tpu")])
def test_layers_of_two_kinds_are_one_body_with_two_kernels(monkeypatch, implementation, platform):
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )
    text = lowered_step(implementation, platform, packed=True, config=TWO_KINDS)
    if implementation == "tpu":  # forward; keys and values; queries: once for every kind
        assert len(re.findall(r"stablehlo.custom_call @tpu_custom_call", text)) == 2 * 3
        return
    settings = [
        json.loads(found.replace("\\22", '"'))["cudnn_fmha_backend_config"]
        for found in re.findall(r'@__cudnn.*?backend_config = "(.*?[^\\])"', text)
    ]
    assert {one["sliding_window_length"] for one in settings} == {0, 100}


@pytest.mark.parametrize(("remat", "times"), [("full", 2), ("dots", 1)])
def test_what_cudnn_gives_is_kept_beside_products(monkeypatch, remat, times):
    """Its softmax's normalisers too: attention's forward pass is run no second time."""
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )
    text = lowered_step("cudnn", "cuda", packed=False, remat=remat)
    assert len(re.findall(r"@__cudnn\$fmhaSoftmax\(", text)) == times
    assert len(re.findall(r"@__cudnn\$fmhaSoftmaxBackward\(", text)) == 1


def test_a_decoders_gradients_become_the_tpus_kernel():
    text = lowered_step("tpu", "tpu", packed=True)
    assert text.count("tpu_custom_call") == 3  # forward, keys and values, queries
    assert "tensor<6x8x256x128xbf16>" in text  # languages in the batch, heads padded to 128


def test_compilers_do_not_keep_a_mask_per_language_and_head():
    model = Decoder.abstract(CONFIG, attention="xla")
    graphdef, state = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((4, 2, 256), jnp.int32)
    batch = {"tokens": tokens, "loss_mask": tokens}
    step = jax.vmap(
        jax.grad(lambda s, b: language_loss(nnx.merge(graphdef, s), b)), in_axes=(None, 0)
    )
    text = jax.jit(step).lower(state, batch).compile().as_text()
    loops = [line.split(" while(")[0] for line in text.splitlines() if " while(" in line]
    assert len(loops) >= 2
    for shape in re.findall(r"\[([\d,]*256,256[\d,]*)\]", " ".join(loops)):
        assert np.prod([int(n) for n in shape.split(",")]) <= 256 * 256, shape


def on_eight_devices() -> str:
    """Compare attention of rows that lie on eight devices with the same on one; the program."""
    rows = mesh.rows_sharding(mesh.make_mesh(8))
    rng = np.random.default_rng(0)
    q, kv = (rng.normal(size=(8, 60, n, 16)).astype("f4") for n in (4, 2))
    segments = np.sort(rng.integers(0, 3, (8, 60)), -1).astype("i4")

    def function(implementation):
        def loss(q, k, v, s):
            out = attend(q, k, v, segment_ids=s, implementation=implementation)
            return (out**2).sum((1, 2, 3))

        return jax.jit(lambda *a: jax.vjp(lambda *qkv: loss(*qkv, a[3]), *a[:3])[1](jnp.ones(8)))

    expected = function("xla")(q, kv, kv, segments)
    placed = jax.device_put((q, kv, kv, segments), rows)
    compiled = function("tpu").lower(*placed).compile()
    for x, y in zip(compiled(*placed), expected, strict=True):
        assert x.sharding.is_equivalent_to(rows, x.ndim)
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    return compiled.as_text()


def test_rows_are_divided_over_devices_without_communication(eight_devices):
    assert "all-gather" not in eight_devices("models.test_attention", "on_eight_devices")


def test_without_an_accelerator_the_others_say_why_they_cannot_run():
    assert choose_attention("auto", head_dim=64, dtype=jnp.bfloat16, platform="cpu") == "xla"
    for name, missing in (("cudnn", "NVIDIA GPU"), ("tpu", "TPU")):
        with pytest.raises(ConfigError, match=f"'{name}' cannot run here: it needs an? {missing}"):
            choose_attention(name, head_dim=64, dtype=jnp.bfloat16, platform="cpu")
    with pytest.raises(ConfigError, match=r"auto, xla, cudnn, tpu, got 'cudn'\. Did you mean"):
        choose_attention("cudn", head_dim=64, dtype=jnp.float32)


def test_cudnn_says_what_it_lacks(inputs):
    q, k, v, *_ = inputs
    with pytest.raises(ConfigError, match="cuDNN has no attention for float32 heads of width 24"):
        attend(q[0], k[0], v[0], implementation="cudnn")


def test_on_a_tpu_its_kernel_is_chosen_where_it_can_run():
    on_tpu = functools.partial(choose_attention, head_dim=96, platform="tpu")
    assert on_tpu("auto", dtype=jnp.bfloat16) == "tpu"
    assert on_tpu("auto", dtype=jnp.float16) == "xla"
    with pytest.raises(ConfigError, match=r"bfloat16 or float32.*dtype is float16"):
        on_tpu("tpu", dtype=jnp.float16)
