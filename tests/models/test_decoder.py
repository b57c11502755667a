"""What the options of a decoder may change, and what they may not."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from closeness import relative_error
from jaxmoo.errors import ConfigError
from jaxmoo.models import Decoder, rope_tables, token_nll
from tiny_models import by_logical_path, tokens_and_mask


def batch_of(*shape: int) -> dict[str, jax.Array]:
    tokens, mask = tokens_and_mask(67, shape)
    return {"tokens": jnp.asarray(tokens), "loss_mask": jnp.asarray(mask)}


class Step:
    """Every token's NLL and the gradients of a model, and how often they were traced."""

    def __init__(self, model: Decoder):
        graphdef, self.state = nnx.split(model)
        self.traced = 0

        def step(state, batch):
            self.traced += 1
            nll = token_nll(nnx.merge(graphdef, state), batch)
            return nll.mean(), nll

        self.jitted = jax.jit(jax.grad(step, has_aux=True))


BATCH = batch_of(8, 64)


@pytest.fixture(scope="module")
def by_remat(make_model):
    """Temporary memory, gradients and NLL by what is recomputed."""
    found = {}
    for remat in ("full", "dots", "none"):
        step = Step(make_model(remat=remat))
        compiled = step.jitted.lower(step.state, BATCH).compile()
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        found[remat] = temporaries, *compiled(step.state, BATCH)
    return found


def assert_same(gradients, nll, expected, expected_nll) -> None:
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-5, atol=1e-6)
    found, expected = by_logical_path(gradients), by_logical_path(expected)
    assert set(found) == set(expected)
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-5, name


def test_remat_changes_neither_losses_nor_gradients(by_remat):
    _, *expected = by_remat["full"]
    for remat in ("dots", "none"):
        assert_same(*by_remat[remat][1:], *expected)


def test_remat_trades_memory_for_recomputation(by_remat):
    temporaries = {remat: found[0] for remat, found in by_remat.items()}
    assert temporaries["full"] < temporaries["dots"] < temporaries["none"]


def test_segments_change_neither_losses_nor_gradients_and_are_compiled_once(make_model, by_remat):
    step = Step(make_model(segments=(0, 1, 3)))
    gradients, nll = step.jitted(step.state, BATCH)
    assert_same(gradients, nll, *by_remat["full"][1:])
    for _ in range(2):
        gradients, _ = step.jitted(gradients, batch_of(8, 64))
    assert step.traced == 1


def test_packed_texts_do_not_see_each_other(make_model):
    """A row of two texts, and a row of its own for each of them."""
    lengths = [11, 19]
    texts = np.split(tokens_and_mask(67, (30,))[0], [11])
    tokens = np.stack([np.concatenate(texts), *(np.resize(text, 30) for text in texts)])
    segment_ids = np.stack([np.repeat([1, 2], lengths), np.ones(30), np.ones(30)])
    positions = np.stack([np.concatenate([np.arange(n) for n in lengths]), *[np.arange(30)] * 2])
    call = nnx.jit(lambda model, *a, **kw: model(*a, **kw))
    packed, *apart = call(
        make_model(), tokens, positions=positions, segment_ids=segment_ids.astype(np.int32)
    )
    apart = [row[:n] for row, n in zip(np.asarray(apart), lengths, strict=True)]
    assert relative_error(packed, np.concatenate(apart)) < 1e-5


def test_half_precision_parameters_and_computation_are_chosen_apart(config):
    model = Decoder.abstract(config, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    tokens = BATCH["tokens"]
    assert nnx.eval_shape(Decoder.hidden, model, tokens).dtype == jnp.bfloat16
    assert nnx.eval_shape(Decoder.__call__, model, tokens).dtype == jnp.float32


def test_an_abstract_model_holds_no_arrays(config):
    huge = dataclasses.replace(config, hidden_size=2**14, vocab_size=2**20)
    leaves = jax.tree.leaves(nnx.state(Decoder.abstract(huge, segments=(0, 2))))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_head_table_of_a_tied_model_is_the_embedding(make_model, config):
    model = make_model()
    np.testing.assert_array_equal(model.head_table(), model.embed_tokens.embedding[...])
    untied = Decoder.abstract(dataclasses.replace(config, tie_word_embeddings=False))
    assert untied.head_table().shape == (67, 24)


def test_rotary_angles_follow_the_position(config):
    positions = np.array([0, 1, 5])
    cos, sin = jax.jit(partial(rope_tables, config))(positions)
    frequencies = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    angles = positions[:, None] * frequencies
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
