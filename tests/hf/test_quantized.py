"""A base in few bits: read from files as it is, and written as what adapters are merged onto."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import tiny_models
from jaxmoo import mesh
from jaxmoo.errors import ConfigError
from jaxmoo.hf import load_model, save_model
from jaxmoo.hf.names import hf_tensor
from jaxmoo.hf.weights import Weights
from jaxmoo.kernels.quantized import dequantize, quantize
from jaxmoo.models import LoRA, add_adapters, merge_adapters, named_leaves, trainable_filter
from jaxmoo.models.lora import ADAPTERS, quantized_kernels

# Inputs of whole blocks, and matrices that hold several projections.
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 16, "head_dim": 8}
PROJECTIONS = 7


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_models.save("phi3", path, **SIZES)
    return path


def file_kernel(weights, path, layer, config):
    """A kernel [in, out] as the files have it."""
    name, transposed, rows = hf_tensor(f"layers.{layer}.{'.'.join(path[2:])}.kernel", config)
    assert transposed
    matrix = weights.read(name)
    return (matrix if rows is None else matrix[rows[0] : sum(rows)]).T


def check_loaded(path, kind, shardings=None):
    """Every kernel is the quantised one of the file's; return all leaves of the model."""
    model, weights = load_model(path, quantize=kind, shardings=shardings), Weights(path)
    kernels = dict(quantized_kernels(model))
    assert len(kernels) == PROJECTIONS
    for place, adapted in kernels.items():
        for layer in range(model.config.num_hidden_layers):
            expected = quantize(file_kernel(weights, place, layer, model.config), kind)
            for part, one in zip(adapted.kernel, expected, strict=True):
                assert part.dtype == one.dtype
                np.testing.assert_array_equal(part[layer], one)
    return {".".join(path): leaf for path, leaf in named_leaves(nnx.state(model))}


def on_mesh(path, kind):
    """Shapes of what one of four devices holds."""
    grid = mesh.make_mesh(2, language=2, fsdp=2, devices=jax.devices()[:4])

    def shardings(state):
        return mesh.parameter_shardings(grid, state, stacked=r"^layers\.")

    leaves = check_loaded(path, kind, shardings)
    return {name: x.sharding.shard_shape(x.shape) for name, x in leaves.items()}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_files_are_quantised_as_they_are_read_and_the_rest_is_as_without(saved, kind):
    found = check_loaded(saved, kind)
    for path, leaf in named_leaves(nnx.state(load_model(saved))):
        if path[-1] != "kernel":
            np.testing.assert_array_equal(found[".".join(path)], leaf)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_devices_hold_pieces_of_codes_and_scales(saved, kind, eight_devices):
    """Blocks divide among 4 devices only if there are so many: else what lies within them does."""
    found = eight_devices("hf.test_quantized", "on_mesh", saved, kind)
    up = "layers.0.mlp.up_proj.kernel"
    codes, scales = found[f"{up}.codes"], found[f"{up}.scales"]
    assert (codes, scales) == {
        "nf4": ((3, 2, 8, 192), (3, 2, 48)),
        "int8": ((3, 1, 32, 192), (3, 1, 48)),
    }[kind]


def adapted(path):
    """A model with random adapters on a base in nf4."""
    model = load_model(path, quantize="nf4")
    add_adapters(model, LoRA(2, 4, ("q_proj", "down_proj"), dora=True), range(3))
    graph, shapes, frozen = nnx.split(model, trainable_filter(ADAPTERS), ...)
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), shapes)
    return nnx.merge(graph, values, frozen)


def by_hand(model, weights, onto):
    """Merged kernels [out, in] by their definition, in float64, by projection and layer."""
    merged = {}
    for path, kernel in quantized_kernels(model):
        for layer in range(3):
            if onto == "base":
                matrix = file_kernel(weights, path, layer, model.config)
            else:
                matrix = dequantize(*(x[layer] for x in kernel.kernel))
            changed = np.asarray(matrix, np.float64)
            if kernel.a is not None:
                a, b, m = (np.float64(x[layer]) for x in (kernel.a, kernel.b, kernel.magnitude))
                changed = changed + kernel.scale * a @ b
                changed *= m / np.linalg.norm(changed, axis=0)
            merged[path[-1], layer] = changed.T
    return merged


@pytest.mark.parametrize("onto", ["base", "quantized"])
def test_adapters_are_merged_into_what_is_asked_for_as_they_are_written(saved, onto, tmp_path):
    model = adapted(saved)
    expected = by_hand(model, Weights(saved), onto)
    save_model(model, tmp_path / "out", source=saved, merge_onto=onto)
    found, before = (load_file(x / "model.safetensors") for x in (tmp_path / "out", saved))
    assert found.keys() == before.keys()
    for layer in range(3):
        start = f"model.layers.{layer}"
        wholes = {
            f"{start}.self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
            f"{start}.self_attn.o_proj": ("o_proj",),
            f"{start}.mlp.gate_up_proj": ("gate_proj", "up_proj"),
            f"{start}.mlp.down_proj": ("down_proj",),
        }
        for name, parts in wholes.items():
            whole = np.concatenate([expected[part, layer] for part in parts])
            np.testing.assert_allclose(found[f"{name}.weight"], whole, rtol=1e-5, atol=1e-6)
    # What nothing is added to is as it was, to the byte, and so is all that was never quantised.
    same = {name for name in found if np.array_equal(found[name], before[name])}
    untouched = {name for name in found if "norm" in name or "embed" in name or "head" in name}
    if onto == "base":
        untouched |= {name for name in found if "o_proj" in name or "gate_up" in name}
    assert same == untouched
    # A model in memory that they are merged into computes the same.
    if onto == "quantized":
        base = load_model(saved)
        tokens = jnp.arange(8)[None]
        before = model(tokens)
        merge_adapters(model)
        paths, ordinary = ([p for p, _ in named_leaves(nnx.state(x))] for x in (model, base))
        assert paths == ordinary
        after = load_model(tmp_path / "out")(tokens)
        for logits in (model(tokens), after):
            np.testing.assert_allclose(logits, before, atol=1e-5 * np.abs(before).max())


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Three layers, of which the second has no experts."""
    path = tmp_path_factory.mktemp("mixture")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 128}
    tiny_models.save("qwen3_moe", path, **sizes, num_attention_heads=8, head_dim=8)
    return path


def check_experts(path, kind, shardings=None):
    """Every expert's kernels are the quantised ones of the file's; return the model."""
    model, weights = load_model(path, quantize=kind, shardings=shardings), Weights(path)
    kernels = dict(quantized_kernels(model))
    assert len(kernels) == 3 * PROJECTIONS  # in segments of one layer
    for place in [place for place in kernels if "experts" in place]:
        codes, scales = kernels[place].kernel
        for expert in range(4):
            name = f"model.layers.{place[1]}.mlp.experts.{expert}.{place[-1]}.weight"
            expected = quantize(weights.read(name).T, kind)
            np.testing.assert_array_equal(codes[0, expert], expected[0])
            np.testing.assert_array_equal(scales[0, expert], expected[1])
    return model


def experts_on_mesh(path, kind):
    """Shape of what one of four devices holds of an expert's codes."""
    grid = mesh.make_mesh(2, language=2, fsdp=2, devices=jax.devices()[:4])
    place = functools.partial(mesh.parameter_shardings, grid, stacked=r"^layers\.")
    codes = check_experts(path, kind, place).layers["0"].mlp.experts.up_proj.kernel.codes[...]
    return codes.sharding.shard_shape(codes.shape)


@pytest.mark.slow
def test_devices_hold_pieces_of_experts(mixture, eight_devices):
    found = eight_devices("hf.test_quantized", "experts_on_mesh", mixture, "nf4")
    assert found == (1, 1, 1, 32, 128)  # of (1, 4, 1, 32, 128)


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_experts_are_quantised_one_by_one_and_merged_as_they_are_written(mixture, kind, tmp_path):
    """What training saw is what is merged, and the base that was read is the one merged onto."""
    model = check_experts(mixture, kind)
    lora = LoRA(2, 4, ("q_proj", "gate_proj", "down_proj"))
    add_adapters(model, lora, range(3))
    graph, shapes, frozen = nnx.split(model, trainable_filter(ADAPTERS), ...)
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), shapes)
    model, ordinary = nnx.merge(graph, values, frozen), load_model(mixture)
    for onto in ("quantized", "base"):
        save_model(model, tmp_path / onto, source=mixture, merge_onto=onto)
    tokens = jnp.arange(20).reshape(2, 10)
    logits = jax.jit(lambda state: nnx.merge(*nnx.split(model)[:1], state)(tokens))
    before = logits(nnx.state(model))
    after = load_model(tmp_path / "quantized")
    again = jax.jit(lambda state: nnx.merge(*nnx.split(after)[:1], state)(tokens))
    np.testing.assert_allclose(again(nnx.state(after)), before, atol=1e-5 * np.abs(before).max())
    add_adapters(ordinary, lora, range(3))
    graph, _, frozen = nnx.split(ordinary, trainable_filter(ADAPTERS), ...)
    ordinary = nnx.merge(graph, values, frozen)
    merge_adapters(ordinary)
    written = dict(named_leaves(nnx.state(load_model(tmp_path / "base"))))
    for path, leaf in named_leaves(nnx.state(ordinary)):
        np.testing.assert_allclose(written[path], leaf, rtol=1e-6, atol=1e-7, err_msg=str(path))


def test_what_cannot_be_quantised_is_refused_before_it_is_read(tmp_path):
    tiny_models.save("llama", tmp_path)
    with pytest.raises(ConfigError, match=r"q_proj: .* 48 is no multiple of 64\. Use int8"):
        load_model(tmp_path, quantize="nf4")


def test_what_adapters_can_be_merged_onto_is_said(saved, tmp_path):
    model = load_model(saved, quantize="nf4")
    with pytest.raises(ConfigError, match="must be 'base', 'quantized' or None, found 'bse'"):
        save_model(model, tmp_path / "out", source=saved, merge_onto="bse")
    assert not (tmp_path / "out").exists()
