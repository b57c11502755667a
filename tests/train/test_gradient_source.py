"""The settings that change what a step's gradient is: token means, and some of the languages."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxmoo import blocks, mesh, resolve_conflicts, stacked_value_and_grad
from jaxmoo.config import Config, DataConfig, ModelConfig, ResolveConfig, TrainConfig
from jaxmoo.models import Decoder, DecoderConfig, target_mask, token_nll
from jaxmoo.train.gradient_source import GradientSource, make_gradients, sampled
from jaxmoo.train.step import TrainState, make_train_step

ARCHITECTURE = DecoderConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    tie_word_embeddings=False,
)
SEEN = ["en", "fa", "zh", "ja"]


@functools.cache
def model():
    graph = nnx.graphdef(Decoder.abstract(ARCHITECTURE))
    state = jax.jit(lambda: nnx.state(Decoder(ARCHITECTURE, rngs=nnx.Rngs(0))))()
    return graph, *nnx.split_state(state, nnx.Param, ...)


def make_source(microbatches=1, **resolve):
    """A source of gradients, and the parameters to call it with."""
    config = Config(
        output="none",
        model=ModelConfig(source="none"),
        data=DataConfig(source="none", seen=SEEN),
        resolve=ResolveConfig(**({"aggregator": "mean"} | resolve)),
        train=TrainConfig(steps=1, microbatches=microbatches),
    )
    graph, params, frozen = model()
    device_mesh = mesh.make_mesh(config.data.step_languages, devices=jax.devices()[:1])
    return make_gradients(
        config, lambda p, f: nnx.merge(graph, p, f), params, frozen, device_mesh
    ), (graph, params, frozen)


def make_batch(k, lengths):
    """Packed rows; per language the number of targets of each of its two rows, or of both."""
    rng = np.random.default_rng(0)
    shape = (k, 2, 12)
    return {
        "tokens": rng.integers(1, 31, shape).astype(np.int32),
        "loss_mask": np.broadcast_to(np.arange(12) < np.reshape(lengths, (k, -1, 1)), shape),
        "positions": np.broadcast_to(np.arange(12, dtype=np.int32) % 6, shape),
        "segment_ids": np.broadcast_to(1 + np.arange(12, dtype=np.int32) // 6, shape),
    }


class Oracle:
    """Losses and gradients of every language by itself, from sums over its targets."""

    def __init__(self, graph, params, frozen, batch):
        self.counts = np.asarray(target_mask(jax.tree.map(jnp.asarray, batch)).sum((1, 2)))
        sums, self._gradients = _sums(graph)(params, frozen, batch)
        self.losses = np.asarray(sums) / np.maximum(self.counts, 1)

    def gradient(self, weights):
        """Gradient of the languages' sums, weighted."""
        return jax.tree.map(
            lambda x: np.tensordot(np.asarray(weights), np.asarray(x, np.float64), 1),
            self._gradients,
        )


@functools.cache
def _sums(graph):
    def own(params, frozen, one):
        return token_nll(nnx.merge(graph, params, frozen), one).sum()

    return jax.jit(jax.vmap(jax.value_and_grad(own), (None, None, 0)))


def largest_error(found, wanted):
    errors = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), found, wanted)
    return max(jax.tree.leaves(errors))


def stepped(source, params):
    """A compiled training step by plain descent that keeps the gradient, and the first state."""
    optimizer = optax.sgd(0.5, momentum=0.0)
    init = jax.jit(lambda params: (source.init(params), optimizer.init(params)))
    state = TrainState(jnp.int32(0), params, *init(params))
    return jax.jit(make_train_step(source, optimizer)), state


def gradient_of(state):
    return state.opt_state[0].trace


@pytest.mark.parametrize(
    ("engine", "microbatches"),
    [("backward", 2), ("stacked", 1), pytest.param("backward", 1, marks=pytest.mark.slow)],
)
def test_token_mean_with_mean_is_plain_fine_tuning_on_the_mixed_batch(engine, microbatches):
    source, (graph, params, frozen) = make_source(microbatches, token_mean=True, engine=engine)
    batch = make_batch(4, [[12, 9], [3, 12], [7, 0], [0, 0]])
    step, state = stepped(source, params)
    state, metrics = step(state, frozen, batch)
    oracle = Oracle(graph, params, frozen, batch)
    plain = oracle.gradient(np.ones(4) / oracle.counts.sum())
    assert largest_error(gradient_of(state), plain) < 1e-5
    # The losses stay each language's own.
    np.testing.assert_allclose(metrics["loss"], oracle.losses, rtol=1e-5)
    assert float(metrics["loss"][3]) == 0
    # Blocks' norms are means over microbatches, whose gradients partly cancel.
    norm = float(optax.tree.norm(plain))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(("engine", "by_token"), [("backward", True), ("stacked", False)])
def test_with_mean_the_gradient_is_that_of_the_weighted_mean_loss(engine, by_token):
    """And a language whose loss is not finite is left out and counted."""
    given = {"weights": [1.0, 2.0, 3.0, 10.0]}
    source, (graph, params, frozen) = make_source(
        engine=engine,
        token_mean=by_token,
        weighting="static",
        weighting_options=given,
    )
    batch = make_batch(4, [[12, 12], [5, 5], [9, 9], [3, 3]])
    step = jax.jit(source.compute)
    losses, gradient, _ = step(params, frozen, batch, jax.jit(source.init)(params))
    oracle = Oracle(graph, params, frozen, batch)
    share = oracle.counts / oracle.counts.mean() if by_token else np.ones(4)
    weights = np.array(given["weights"]) / 4
    assert largest_error(gradient, oracle.gradient(weights * share / oracle.counts / 4)) < 1e-5
    np.testing.assert_allclose(losses, oracle.losses, rtol=1e-5)
    check_not_finite(source, step, params, frozen)


@pytest.mark.slow
def test_weights_of_a_step_follow_from_the_losses_before_it():
    """FAMO's recursion in float64 on the losses in the metrics; one language pauses."""
    rate, gamma = 0.3, 0.01
    source, (_, params, frozen) = make_source(
        weighting="famo", weighting_options={"learning_rate": rate, "gamma": gamma}
    )
    step, state = stepped(source, params)
    expected, logits, m, v = np.ones(4), np.zeros(4), np.zeros(4), np.zeros(4)
    previous, seen, updates = np.ones(4), np.zeros(4, bool), 0
    for number in range(5):
        pause = number == 2
        state, metrics = step(state, frozen, make_batch(4, [12, 6, 8, 0 if pause else 4]))
        np.testing.assert_allclose(metrics["loss_weights"], expected, rtol=1e-4)
        here = np.array([True, True, True, not pause])
        losses = np.where(here, np.asarray(metrics["loss"], np.float64), 1)
        compared = here & seen
        if compared.any():
            updates += 1
            z = np.exp(logits) / np.exp(logits).sum()
            fall = np.where(compared, np.log(previous) - np.log(losses), 0)
            g = z * (fall - z @ fall) + gamma * logits
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            corrected = (m / (1 - 0.9**updates)) / (np.sqrt(v / (1 - 0.999**updates)) + 1e-8)
            logits = logits - rate * corrected
        weights = np.where(here, np.exp(logits) / np.exp(logits).sum() / losses, 0)
        expected = np.where(here, weights * here.sum() / weights.sum(), expected)
        previous, seen = np.where(here, losses, previous), seen | here
    assert np.ptp(expected) > 0.1


def test_moving_averages_of_gradients_take_in_none_that_is_not_finite():
    source, (_, params, frozen) = make_source(engine="stacked", aggregator="moco")
    check_not_finite(source, jax.jit(source.compute), params, frozen)


def check_not_finite(source, step, params, frozen):
    """A language whose loss is not finite is left out and counted."""
    batch = make_batch(4, [12, 3, 7, 0])
    batch["tokens"] = np.where(np.arange(4)[:, None, None] == 1, 30, batch["tokens"] % 30)
    params = jax.tree.map(lambda x: x, params)  # containers of its own
    table = params.embed_tokens.embedding
    table.set_value(table[...].at[30].set(jnp.nan))
    losses, gradient, state = step(params, frozen, batch, jax.jit(source.init)(params))
    assert np.flatnonzero(~np.isfinite(losses)).tolist() == [1]
    assert source.diagnostics(state).skipped.tolist() == [0, 1, 0, 0]
    assert not source.diagnostics(state).weights[:, 1].any()
    assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(gradient))


def toy_source(k):
    """Losses [k] that a batch is the target of, resolved by a method that looks at conflicts."""
    tx = resolve_conflicts("imtl_g", blocks="leaf", num_objectives=k)
    loss = stacked_value_and_grad(
        lambda params, one: sum(jnp.mean((p - one["x"]) ** 2) for p in params.values())
    )

    def compute(params, frozen, batch, state):
        assert set(batch) == {"x"}
        losses, gradients = loss(params, batch)
        return losses, *tx.update(gradients, state, params)

    params = {"a": jnp.zeros(3), "b": jnp.arange(3.0)}
    part = blocks.partition("leaf", params)
    return GradientSource(tx.init, compute, lambda state: state, part, None), params


def test_a_step_of_some_languages_is_that_of_a_run_with_these_alone():
    (pair, params), some = toy_source(2), sampled(toy_source(2)[0], 4)
    step, expected_step = jax.jit(some.compute), jax.jit(pair.compute)
    state, expected_state = some.init(params), pair.init(params)
    skipped = np.zeros(4, int)
    for here in ([1, 3], [0, 1]):
        x = np.random.default_rng(here).normal(size=(2, 5, 3)).astype(np.float32)
        x[1] = np.nan if here == [0, 1] else x[1]
        batch = {"x": x, "language": np.broadcast_to(np.array(here, np.int32)[:, None], (2, 5))}
        losses, gradient, state = step(params, None, batch, state)
        expected = expected_step(params, None, {"x": x}, expected_state)
        expected_losses, expected_gradient, expected_state = expected
        jax.tree.map(np.testing.assert_array_equal, gradient, expected_gradient)
        found, wanted = some.diagnostics(state), pair.diagnostics(expected_state)
        over_all = np.zeros(4), np.zeros((2, 4)), np.zeros((2, 4, 4))
        over_all[0][here] = expected_losses
        over_all[1][:, here] = wanted.weights
        over_all[2][:, np.array(here)[:, None], here] = wanted.gram
        for seen, filled in zip((losses, found.weights, found.gram), over_all, strict=True):
            np.testing.assert_array_equal(seen, filled)
        skipped[here] += np.array([0, here == [0, 1]])
        np.testing.assert_array_equal(found.skipped, skipped)
        np.testing.assert_array_equal(found.conflict, wanted.conflict)
