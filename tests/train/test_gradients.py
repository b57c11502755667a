"""The settings that change what a step's gradient is: token means, and some of the languages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoo import mesh
from jaxmoo.models import Decoder, DecoderConfig, target_mask, token_nll
from jaxmoo.train.config import Config, DataConfig, ModelConfig, ResolveConfig, TrainConfig
from jaxmoo.train.gradients import make_gradients

ARCHITECTURE = DecoderConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    tie_word_embeddings=False,
)
SEEN = ["en", "fa", "zh", "ja"]


def make_source(seen=SEEN, data=None, **resolve):
    """A source of gradients, and the parameters to call it with."""
    config = Config(
        output="none",
        model=ModelConfig(source="none"),
        data=DataConfig(source="none", seen=seen, **(data or {})),
        resolve=ResolveConfig(**({"aggregator": "mean"} | resolve)),
        train=TrainConfig(steps=1),
    )
    graph, params, frozen = nnx.split(Decoder(ARCHITECTURE, rngs=nnx.Rngs(0)), nnx.Param, ...)
    device_mesh = mesh.make_mesh(config.data.step_languages, devices=jax.devices()[:1])
    return make_gradients(
        config, lambda p, f: nnx.merge(graph, p, f), params, frozen, device_mesh
    ), (graph, params, frozen)


def make_batch(k, lengths):
    """Packed rows whose languages have different numbers of targets."""
    rng = np.random.default_rng(0)
    shape = (k, 2, 12)
    return {
        "tokens": rng.integers(1, 31, shape).astype(np.int32),
        "loss_mask": np.broadcast_to(np.arange(12) < np.array(lengths)[:, None, None], shape),
        "positions": np.broadcast_to(np.arange(12, dtype=np.int32) % 6, shape),
        "segment_ids": np.broadcast_to(1 + np.arange(12, dtype=np.int32) // 6, shape),
    }


def largest_error(found, wanted):
    errors = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), found, wanted
    )
    return max(jax.tree.leaves(errors))


@pytest.mark.parametrize("engine", ["backward", "stacked"])
def test_token_mean_with_mean_is_plain_fine_tuning_on_the_mixed_batch(engine):
    source, (graph, params, frozen) = make_source(token_mean=True, engine=engine)
    batch = make_batch(4, [12, 3, 7, 0])
    losses, gradient, _ = jax.jit(source.compute)(params, frozen, batch, source.init(params))

    def mixed(params):
        rows = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, x.shape[-1]), batch)
        return token_nll(nnx.merge(graph, params, frozen), rows).sum() / target_mask(rows).sum()

    assert largest_error(gradient, jax.jit(jax.grad(mixed))(params)) < 1e-5
    # The losses stay each language's own.
    one = {name: jnp.asarray(x[1]) for name, x in batch.items()}
    expected = token_nll(nnx.merge(graph, params, frozen), one).sum() / target_mask(one).sum()
    assert float(losses[1]) == pytest.approx(float(expected), rel=1e-5)
    assert float(losses[3]) == 0


def test_a_step_of_some_languages_is_that_of_a_run_with_these_alone():
    some, (_, params, frozen) = make_source(data={"languages_per_step": 2}, aggregator="imtl_g")
    pair, _ = make_source(["fa", "ja"], aggregator="imtl_g")
    step, expected_step = jax.jit(some.compute), jax.jit(pair.compute)
    state, expected_state = some.init(params), pair.init(params)
    for bad in (False, True):
        batch = make_batch(2, [12, 7])
        if bad:  # a token of the second language has no finite vector
            params["embed_tokens"]["embedding"] = jax.tree.map(
                lambda x: x.at[0].set(jnp.nan), params["embed_tokens"]["embedding"]
            )
            batch["tokens"][1, 0, 0] = 0
        numbers = np.broadcast_to(np.array([[1], [3]], np.int32), (2, 2))
        losses, gradient, state = step(params, frozen, batch | {"language": numbers}, state)
        expected = expected_step(params, frozen, batch, expected_state)
        expected_losses, expected_gradient, expected_state = expected
        np.testing.assert_array_equal(losses, [0, expected_losses[0], 0, expected_losses[1]])
        for a, b in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
            np.testing.assert_array_equal(a, b)
        found, wanted = some.diagnostics(state), pair.diagnostics(expected_state)
        np.testing.assert_array_equal(found.gram[:, [1, 3]][:, :, [1, 3]], wanted.gram)
        np.testing.assert_array_equal(found.weights[:, [1, 3]], wanted.weights)
        assert not np.asarray(found.weights[:, [0, 2]]).any()
        assert not np.asarray(found.gram[:, [0, 2]]).any()
        np.testing.assert_array_equal(found.skipped[np.array([1, 3])], wanted.skipped)
        assert not np.asarray(found.skipped[np.array([0, 2])]).any()
    assert np.asarray(wanted.skipped).any()
