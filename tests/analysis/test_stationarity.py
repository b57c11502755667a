"""Stationarity against an exact quadratic program, and Gram matrices against the gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoo import stacked_value_and_grad
from jaxmoo.analysis.conflict import layer_of, together
from jaxmoo.analysis.stationarity import measure_grams, paired_batch, shortest, stationarity
from jaxmoo.config.training import load_config
from jaxmoo.data.tokenization.tokenize import Tokenized
from jaxmoo.errors import DataError
from jaxmoo.hf import load_config as load_model_config
from jaxmoo.hf import load_model
from jaxmoo.models import Decoder, DecoderConfig, language_loss, segments_for
from jaxmoo.models.lora import adapters
from jaxmoo.runs.trained_parameters import begun_model, trained_filter


def exact(gram: np.ndarray) -> np.ndarray:
    """The shortest convex combination, exactly: the best stationary point over all supports."""
    best = None
    for size in range(1, len(gram) + 1):
        for support in map(list, itertools.combinations(range(len(gram)), size)):
            # On a support, the weights for which all products with the result are equal.
            matrix = np.block(
                [[gram[np.ix_(support, support)], np.ones((size, 1))], [np.ones((1, size)), 0]]
            )
            solution = np.linalg.lstsq(matrix, np.r_[np.zeros(size), 1.0], rcond=None)[0][:size]
            if (solution < -1e-12).any():
                continue
            w = np.zeros(len(gram))
            w[support] = solution
            if best is None or w @ gram @ w < best @ gram @ best:
                best = w
    return best


@pytest.mark.parametrize("seed", range(6))
def test_the_minimal_norm_is_that_of_the_exact_quadratic_program(seed):
    from scipy.optimize import minimize

    rng = np.random.default_rng(seed)
    g = rng.normal(size=(5, 40)) * 10 ** rng.uniform(-1, 1, (5, 1)) + 0.6 * rng.normal(size=40)
    if seed >= 4:
        g = g[:, :4]  # the hull may reach the origin
    gram = g @ g.T
    w, expected = shortest(gram), exact(gram)
    reached = w @ gram @ w
    assert reached - expected @ gram @ expected <= 1e-5 * np.diagonal(gram).min()
    other = minimize(
        lambda w: w @ gram @ w / np.diagonal(gram).min(),
        np.full(5, 0.2),
        bounds=[(0, 1)] * 5,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-12, "maxiter": 1000},
    )
    # The oracle itself.
    assert expected @ gram @ expected <= other.x @ gram @ other.x + 1e-6 * np.diagonal(gram).min()


def test_stationary_points_and_lone_gradients():
    opposed = np.array([[1.0, -1.0], [-1.0, 1.0]])
    found = stationarity(np.stack([opposed, opposed]), opposed)
    assert found.min_norm == pytest.approx(0, abs=1e-3)
    assert shortest(np.diag([4.0, 0.0])).tolist() == [1, 0]
    alike = np.ones((2, 2))
    found = stationarity(np.stack([alike, alike]), alike)
    assert found.ratio == found.ratio_across == pytest.approx(1)


def test_the_estimate_across_batches_is_free_of_noise():
    """Three languages, one direction each, in noise twice as long."""
    rng = np.random.default_rng(0)
    signal = np.eye(3, 4000) + 0.5 * np.eye(1, 4000)
    a, b = signal + rng.normal(size=(2, 3, 4000)) * 0.04
    within, across = np.stack([a @ a.T, b @ b.T]), (a @ b.T + b @ a.T) / 2
    found, truth = stationarity(within, across), signal @ signal.T
    true_cosine = truth[1, 0] / np.sqrt(truth[1, 1] * truth[0, 0])
    assert abs(found.cosine[1, 0]) < 0.4 * true_cosine  # drowned
    assert found.cosine_across[1, 0] == pytest.approx(true_cosine, abs=0.2)
    least = exact(truth)
    assert found.square == pytest.approx(least @ truth @ least, rel=0.3)
    assert found.one_batch[0] ** 2 > 2 * found.square


def measure(config):
    """Gram matrices of a model's modules, and the gradients one by one."""
    path = config.model.source
    model = load_model(path, segments=segments_for(load_model_config(path), config.model.trainable))
    rng = np.random.default_rng(0)
    model = begun_model(config, model, lambda _: None)
    for _, _, linear in adapters(model):
        linear.lora_B.kernel[...] = jnp.asarray(rng.normal(0, 0.1, linear.lora_B.kernel.shape))
    tokenized = {
        code: [
            Tokenized(rng.integers(3, 259, n, np.int32), np.arange(n) > 4, 9, n)
            for n in rng.integers(8, 30, 12)
        ]
        for code in ("en", "es", "it")
    }
    batch = paired_batch(tokenized, ("en", "es", "it"), 4)
    graph, params, frozen = nnx.split(model, trained_filter(config), ...)
    losses, gradients = jax.jit(
        stacked_value_and_grad(lambda p, one: language_loss(nnx.merge(graph, p, frozen), one))
    )(params, jax.tree.map(jnp.asarray, batch))
    flat = np.concatenate(
        [np.asarray(x, np.float64).reshape(6, -1) for x in jax.tree.leaves(gradients)], axis=1
    )
    return measure_grams(model, config, batch), np.asarray(losses), flat, batch, tokenized


@pytest.fixture(scope="module")
def measured(finished_run):
    return measure(load_config(finished_run / "config.yaml"))


@pytest.mark.slow
def test_losses_and_gradients_are_those_that_the_run_minimises(write_config):
    """With the router's loss."""
    coef = 3.0
    config = load_config(write_config(train__router_aux_loss_coef=coef, model__trainable=r"gate\."))
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4}
    architecture = DecoderConfig(**sizes, **heads, **experts, max_position_embeddings=16)
    model = Decoder(architecture, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.integers(0, 16, (4, 2, 8)), "loss_mask": np.ones((4, 2, 8), bool)}
    graph, params, frozen = nnx.split(model, trained_filter(config), ...)

    @jax.jit
    def by_themselves(params, batch):
        def loss(params, one):
            return language_loss(nnx.merge(graph, params, frozen), one, router_coef=coef)

        return stacked_value_and_grad(loss)(params, batch)

    losses, gradients = by_themselves(params, jax.tree.map(jnp.asarray, batch))
    (gradients,) = (np.asarray(x, np.float64).reshape(4, -1) for x in jax.tree.leaves(gradients))
    found = measure_grams(model, config, batch, blocks="whole")
    assert found.losses.ravel() == pytest.approx(np.asarray(losses), rel=1e-5)
    expected = gradients[:2] @ gradients[:2].T
    np.testing.assert_allclose(found.within[0, 0], expected, rtol=1e-4, atol=1e-4 * expected.max())


@pytest.mark.slow
def test_of_a_run_with_adapters_it_is_their_gradients_that_are_measured(finished_run):
    changes = ["lora.rank=2", "lora.dora=true", "lora.targets=[q_proj,up_proj]"]
    found, losses, flat, _, _ = measure(load_config(finished_run / "config.yaml", changes))
    np.testing.assert_allclose(found.losses.reshape(-1), losses, rtol=1e-5)
    assert found.blocks == tuple(f"layers.{i}.{m}" for i in (1, 2) for m in ("mlp", "self_attn"))
    expected = flat[:3] @ flat[:3].T
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.within[0].sum(0), expected, atol=1e-5 * scale)


@pytest.mark.slow
def test_gram_matrices_are_those_of_the_gradients(measured):
    found, losses, flat, _, _ = measured
    expected = flat @ flat.T
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.losses.reshape(-1), losses, rtol=1e-5)
    assert len(found.blocks) == 8  # two layers of attention, MLP and two norms
    np.testing.assert_allclose(found.within[0].sum(0), expected[:3, :3], atol=1e-5 * scale)
    np.testing.assert_allclose(found.within[1].sum(0), expected[3:, 3:], atol=1e-5 * scale)
    across = (expected[:3, 3:] + expected[3:, :3]) / 2
    np.testing.assert_allclose(found.across.sum(0), across, atol=1e-5 * scale)
    both = (flat[:3] + flat[3:]) / 2
    np.testing.assert_allclose(found.pooled.sum(0), both @ both.T, atol=1e-5 * scale)


@pytest.mark.slow
def test_blocks_are_never_farther_from_stationary_than_the_whole(measured):
    found = measured[0]
    whole = stationarity(found.within.sum(1), found.across.sum(0))
    _, layers = together(found.within, found.blocks, [layer_of(b) for b in found.blocks])
    _, across = together(found.across, found.blocks, [layer_of(b) for b in found.blocks])
    by_layer = [stationarity(layers[:, i], across[i]) for i in range(2)]
    by_module = [stationarity(found.within[:, i], found.across[i]) for i in range(8)]
    total = [sum(s.min_norm**2 for s in parts) for parts in ([whole], by_layer, by_module)]
    assert total[2] <= total[1] * (1 + 1e-6) <= total[0] * (1 + 2e-6)
    oracle = exact(found.pooled.sum(0))
    assert whole.min_norm**2 == pytest.approx(oracle @ found.pooled.sum(0) @ oracle, rel=1e-5)


@pytest.mark.slow
def test_the_two_batches_share_no_example(measured):
    _, _, _, batch, tokenized = measured
    rows = batch["tokens"].reshape(2, 3, 4, -1)
    for language in range(3):
        texts = {tuple(row) for side in rows for row in side[language]}
        assert len(texts) == 8
    with pytest.raises(DataError, match=r"'en' has 12 training examples; two batches of 7 need 14"):
        paired_batch(tokenized, ("en",), 7)
