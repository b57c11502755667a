"""LAPE against a direct computation, and planted neurons are found."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_models
from jaxmoo.analysis.neurons import overlap, specific, thresholds
from jaxmoo.analysis.parallel import Sentence
from jaxmoo.analysis.representations import represent
from jaxmoo.errors import DataError
from jaxmoo.hf import load_model
from jaxmoo.models.probe import layer_statistics

if TYPE_CHECKING:  # seconds of importing, which collecting does without
    import torch

LANGUAGES = ("aa", "bb", "cc")
VOCABULARY = 131


def sentences(count: int = 8) -> dict[str, list[Sentence]]:
    """Every language has tokens of its own: 10 to 49, 50 to 89, 90 to 129."""
    rng = np.random.default_rng(0)
    found = {}
    for k, language in enumerate(LANGUAGES):
        rows = []
        for _ in range(count):
            length = int(rng.integers(5, 40))
            mask = np.ones(length, bool)
            mask[0] = False
            rows.append(Sentence(rng.integers(10 + 40 * k, 50 + 40 * k, length, np.int32), mask))
        found[language] = rows
    return found


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A model with neurons that are active in the tokens of one language alone.

    Three coordinates of the residual stream, which attention and MLPs leave alone, say what
    language a token is of; the gates of a few neurons read them.
    """
    import torch

    path = tmp_path_factory.mktemp("planted") / "model"
    model = tiny_models.make("llama", seed=1)
    neurons = {k: [(layer, 7 * k + 3 * layer + i) for layer in range(3) for i in range(2)]
               for k in range(3)}  # fmt: skip
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, :3] = 0
        for k in range(3):
            embedding[10 + 40 * k : 50 + 40 * k, k] = 0.6
        for number, layer in enumerate(model.model.layers):
            layer.post_attention_layernorm.weight.fill_(1)
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight *= 0.1  # or a few directions would decide most gates
                projection.weight[:3] = 0
            layer.mlp.gate_proj.weight[:, :3] = 0  # the other neurons are deaf to it
            for k, places in neurons.items():
                for at, neuron in places:
                    if at == number:
                        gate = layer.mlp.gate_proj.weight
                        gate[neuron] = 0
                        gate[neuron, :3] = -5.0
                        gate[neuron, k] = 5.0
    model.save_pretrained(path)
    return path, model, neurons


def gates_of_transformers(model, text: dict[str, list[Sentence]]) -> tuple[np.ndarray, np.ndarray]:
    """Activation probabilities [K, L, F] and pooled hidden states [L, K, N, D], sentence by
    sentence, with hooks."""
    import torch

    gates: dict[int, torch.Tensor] = {}
    hooks = [
        layer.mlp.gate_proj.register_forward_hook(
            lambda _, __, out, i=i: gates.__setitem__(i, out[0])
        )
        for i, layer in enumerate(model.model.layers)
    ]
    layers, width = len(model.model.layers), model.config.intermediate_size
    active = np.zeros((len(text), layers, width))
    pooled = np.zeros((layers, len(text), len(next(iter(text.values()))), model.config.hidden_size))
    for k, rows in enumerate(text.values()):
        count = 0
        for n, row in enumerate(rows):
            with torch.no_grad():
                out = model(torch.tensor(row.tokens[None], dtype=torch.long),
                            output_hidden_states=True)  # fmt: skip
            for i in range(layers):
                active[k, i] += (torch.nn.functional.silu(gates[i]) > 0).numpy()[row.mask].sum(0)
                # Of transformers' hidden states the last is behind the final norm; ours are not.
                pooled[i, k, n] = out.hidden_states[i][0].numpy()[row.mask].mean(0)
            count += row.mask.sum()
        active[k] /= count
    for hook in hooks:
        hook.remove()
    return active, pooled


def lape(p: np.ndarray) -> tuple[float, float, set[tuple[int, int, int]]]:
    """The definition, neuron by neuron: thresholds, and (language, layer, neuron)."""
    languages, layers, width = p.shape
    ordered = sorted(p.reshape(-1))
    level = ordered[round(0.95 * len(ordered)) - 1]
    scored = []
    for layer in range(layers):
        for neuron in range(width):
            q = p[:, layer, neuron]
            if q.max() > level:
                share = q / q.sum()
                scored.append((-sum(x * np.log(x) for x in share if x > 0), layer, neuron))
    scored.sort()
    chosen = scored[: round(0.01 * layers * width)]
    found = {
        (k, layer, neuron)
        for _, layer, neuron in chosen
        for k in range(languages)
        if p[k, layer, neuron] > level
    }
    return level, chosen[-1][0], found


@pytest.fixture(scope="module")
def measured(planted):
    path, model, _ = planted
    text = sentences()
    return represent(load_model(path), text, batch_size=4, progress=False), text, model


def test_statistics_are_those_of_transformers(measured):
    found, text, model = measured
    active, pooled = gates_of_transformers(model, text)
    counted = found.active.sum(0) / found.tokens.sum(0)[:, None, None]
    # A gate within rounding of 0 may fall on either side.
    assert np.mean(counted != active) < 0.01
    np.testing.assert_allclose(counted, active, atol=0.02)
    np.testing.assert_allclose(found.pooled[:3], pooled, atol=1e-4)
    assert found.tokens.sum() == sum(row.mask.sum() for rows in text.values() for row in rows)


def test_neurons_of_experts_are_active_in_tokens_that_read_the_expert(tmp_path):
    """As transformers routes tokens, and by its weights; in the tokens that count."""
    import torch

    oracle = tiny_models.save("qwen3_moe", tmp_path, mlp_only_layers=[])
    model, (tokens, mask) = load_model(tmp_path), tiny_models.tokens_and_mask(VOCABULARY, (3, 12))
    width = oracle.config.moe_intermediate_size
    expected = np.zeros((3, 3, 4, width), int)  # [layers, rows, E, F]

    def count(module, inputs, number):
        hidden, chosen, _ = inputs
        gates = torch.einsum("td,efd->tef", hidden, module.gate_up_proj[:, :width])
        read = torch.nn.functional.one_hot(chosen, 4).sum(1).bool()
        active = (gates > 0) & read[..., None] & torch.tensor(mask).reshape(-1, 1, 1)
        expected[number] = active.reshape(3, 12, 4, width).sum(1).numpy()

    for number, layer in enumerate(oracle.model.layers):
        layer.mlp.experts.register_forward_pre_hook(functools.partial(count, number=number))
    with torch.no_grad():
        oracle(torch.tensor(tokens).long())
    found = jax.jit(lambda x: layer_statistics(model, x, jnp.asarray(mask)))(tokens).active_LBF
    assert expected.sum() > 0.1 * mask.sum() * 3 * 2 * width
    np.testing.assert_array_equal(found, expected.reshape(3, 3, -1))


def test_lape_is_the_direct_computation(measured):
    found = measured[0]
    p = found.active.sum(0) / found.tokens.sum(0)[:, None, None]
    level, limit, chosen = lape(p)
    at = thresholds(p)
    assert at.probability == pytest.approx(level) and at.entropy == pytest.approx(limit)
    # Neurons of exactly the limiting entropy are all taken; the planted ones have entropy 0.
    assert chosen <= set(zip(*map(list, np.nonzero(specific(p, at))), strict=True))


def test_planted_neurons_are_recovered(measured, planted):
    found, neurons = measured[0], planted[2]
    p = found.active.sum(0) / found.tokens.sum(0)[:, None, None]
    at = thresholds(p, share=18 / p[0].size)
    chosen = specific(p, at)
    for k, places in neurons.items():
        assert {(int(a), int(b)) for a, b in np.argwhere(chosen[k])} == set(places)


def test_a_change_of_the_model_is_seen_at_frozen_thresholds(measured, planted):
    path, _, neurons = planted
    found, text, _ = measured
    model = load_model(path)
    # What was planted for the first language is made deaf to it, in two of three layers.
    gate = model.layers["0"].mlp.gate_proj.kernel
    value = np.array(gate[...])
    for layer, neuron in neurons[0]:
        if layer > 0:
            value[layer, :3, neuron] = 5.0
    gate.set_value(jnp.asarray(value))
    after = represent(model, text, batch_size=4, progress=False)
    p, q = (r.active.sum(0) / r.tokens.sum(0)[:, None, None] for r in (found, after))
    at = thresholds(p, share=18 / p[0].size)
    before, then = specific(p, at), specific(q, at)
    assert [int(x.sum()) for x in then] == [2, 6, 6]
    assert overlap(before, then).tolist() == pytest.approx([1 / 3, 1, 1])
    # At thresholds of its own the number is fixed by construction.
    assert specific(q, thresholds(q, share=18 / q[0].size)).any(0).sum() >= 18


def test_too_few_active_neurons_are_an_error():
    p = np.zeros((2, 1, 200))
    p[0, 0, 0] = 1
    with pytest.raises(DataError, match="only 1 of 200 neurons"):
        thresholds(p)
