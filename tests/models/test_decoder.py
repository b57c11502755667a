"""What the options of a decoder may change, and what they may not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from closeness import relative_error
from jaxmoo.errors import ConfigError
from jaxmoo.models import Decoder, language_loss, rope_tables
from tiny_models import by_logical_path, tokens_and_mask


def batch_of(*shape: int) -> dict[str, jax.Array]:
    tokens, mask = tokens_and_mask(67, shape)
    return {"tokens": jnp.asarray(tokens), "loss_mask": jnp.asarray(mask)}


def logits_and_gradients(model: Decoder, batch) -> tuple[jax.Array, dict[str, np.ndarray]]:
    graphdef, state = nnx.split(model)

    @jax.jit
    def function(state):
        gradients = jax.grad(lambda s: language_loss(nnx.merge(graphdef, s), batch))(state)
        return nnx.merge(graphdef, state)(batch["tokens"]), gradients

    logits, gradients = function(state)
    return logits, by_logical_path(gradients)


@pytest.fixture(scope="module")
def plain(make_model):
    return logits_and_gradients(make_model(remat="full"), batch_of(2, 17))


@pytest.mark.parametrize(
    "options",
    [{"remat": "dots"}, {"remat": "none"}, {"segments": (0, 3)}, {"segments": (0, 1, 2, 3)}],
    ids=str,
)
def test_remat_and_segments_change_neither_logits_nor_gradients(make_model, plain, options):
    expected_logits, expected = plain
    logits, found = logits_and_gradients(make_model(**options), batch_of(2, 17))
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-5, atol=1e-6)
    assert set(found) == set(expected)
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-5, name


def test_a_step_is_compiled_once(make_model):
    graphdef, state = nnx.split(make_model(segments=(0, 2)))
    traced = []

    @jax.jit
    def step(state, batch):
        traced.append(1)
        return jax.grad(lambda s: language_loss(nnx.merge(graphdef, s), batch))(state)

    for _ in range(3):
        state = step(state, batch_of(2, 9))
    assert len(traced) == 1


def test_remat_trades_memory_for_recomputation(make_model):
    batch = batch_of(8, 64)

    def temporaries(remat: str) -> int:
        graphdef, state = nnx.split(make_model(remat=remat))
        step = jax.jit(jax.grad(lambda s: language_loss(nnx.merge(graphdef, s), batch)))
        return step.lower(state).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("full") < temporaries("dots") < temporaries("none")


def test_packed_texts_do_not_see_each_other(make_model):
    model = make_model()
    tokens, _ = tokens_and_mask(67, (1, 30))
    lengths = [11, 19]
    segment_ids = jnp.asarray(np.repeat([1, 2], lengths)[None])
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None])
    call = nnx.jit(lambda model, *a, **kw: model(*a, **kw))
    packed = call(model, jnp.asarray(tokens), positions=positions, segment_ids=segment_ids)
    apart = [call(model, jnp.asarray(part)) for part in np.split(tokens, [11], axis=1)]
    assert relative_error(packed, jnp.concatenate(apart, axis=1)) < 1e-5


def test_half_precision_parameters_and_computation_are_chosen_apart(config):
    batch = batch_of(2, 17)
    model = Decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.hidden, batch["tokens"]).dtype == jnp.bfloat16
    assert jax.eval_shape(model, batch["tokens"]).dtype == jnp.float32


def test_an_abstract_model_holds_no_arrays(config):
    huge = dataclasses.replace(config, hidden_size=2**14, vocab_size=2**20)
    leaves = jax.tree.leaves(nnx.state(Decoder.abstract(huge, segments=(0, 2))))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_head_table_of_a_tied_model_is_the_embedding(make_model, config):
    model = make_model()
    np.testing.assert_array_equal(model.head_table(), model.embed_tokens.embedding[...])
    untied = Decoder(dataclasses.replace(config, tie_word_embeddings=False), rngs=nnx.Rngs(0))
    assert untied.head_table().shape == (67, 24)


def test_rotary_angles_follow_the_position(config):
    positions = jnp.array([0, 1, 5])
    cos, sin = rope_tables(config, positions)
    frequencies = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    angles = np.asarray(positions)[:, None] * frequencies
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-6)


def test_a_sequence_beyond_the_models_limit_is_refused_before_anything_runs(make_model):
    model = make_model()
    jax.eval_shape(model, jax.ShapeDtypeStruct((1, 64), jnp.int32))
    with pytest.raises(ConfigError, match=r"sequence of 65 tokens.*at most 64"):
        jax.eval_shape(model, jax.ShapeDtypeStruct((1, 65), jnp.int32))


@pytest.mark.parametrize("segments", [(), (1,), (0, 0), (0, 2, 1), (0, 4)])
def test_segments_that_are_not_runs_of_layers_are_refused(config, segments):
    with pytest.raises(ConfigError, match="segments must increase from 0"):
        Decoder.abstract(config, segments=segments)


def test_unknown_options_name_the_known_ones(config):
    with pytest.raises(ConfigError, match="Did you mean 'dots'"):
        Decoder.abstract(config, remat="dot")
    with pytest.raises(ConfigError, match="must be one of auto, xla, cudnn, tpu, got 'flash'"):
        Decoder.abstract(config, attention="flash")
