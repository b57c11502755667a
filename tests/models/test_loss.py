"""The chunked loss against the same loss from all logits."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from closeness import relative_error
from jaxmoo.models import (
    Decoder,
    DecoderConfig,
    language_loss,
    target_mask,
    token_nll,
    trainable_filter,
)
from tiny_models import by_logical_path, tokens_and_mask


def full_nll(model: Decoder, batch) -> jax.Array:
    """The definition: every logit at once."""
    logits = model(
        batch["tokens"], positions=batch.get("positions"), segment_ids=batch.get("segment_ids")
    )
    log_p = jax.nn.log_softmax(logits[:, :-1])
    nll = -jnp.take_along_axis(log_p, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(nll, ((0, 0), (1, 0))) * target_mask(batch)


def full_loss(model: Decoder, batch) -> jax.Array:
    return full_nll(model, batch).sum() / jnp.maximum(target_mask(batch).sum(), 1)


def batch_of(*shape: int) -> dict[str, np.ndarray]:
    tokens, mask = tokens_and_mask(67, shape)
    return {"tokens": tokens, "loss_mask": mask}


def value_and_gradients(model: Decoder, loss, batch):
    """Every language's loss and gradients by logical path."""
    graphdef, state = nnx.split(model)
    function = jax.vmap(jax.value_and_grad(lambda s, b: loss(nnx.merge(graphdef, s), b)), (None, 0))
    value, gradients = jax.jit(function)(state, batch)
    return np.asarray(value), by_logical_path(gradients, leading=1)


# As many targets as they get, from all of a row to none.
LANGUAGES = batch_of(4, 2, 33)
LANGUAGES["loss_mask"] &= np.arange(33) < np.array([33, 9, 2, 0])[:, None, None]


@pytest.fixture(scope="module")
def expected(make_model):
    return value_and_gradients(make_model(), full_loss, LANGUAGES)


@pytest.fixture(scope="module")
def found(make_model):
    return value_and_gradients(make_model(), partial(language_loss, chunk=3), LANGUAGES)


def test_languages_with_different_numbers_of_targets_are_mapped_over(found, expected):
    (losses, gradients), (expected_losses, expected_gradients) = found, expected
    np.testing.assert_allclose(losses, expected_losses, atol=2e-6)
    assert losses[3] == 0
    for name, expected_gradient in expected_gradients.items():
        assert relative_error(gradients[name][:3], expected_gradient[:3]) < 1e-5, name
        assert not gradients[name][3].any()


def test_nll_and_gradients_do_not_depend_on_the_chunk(make_model):
    """The default's last chunk is filled up; one chunk may hold everything, or one position."""
    batch = jax.tree.map(jnp.asarray, batch_of(3, 17))
    graphdef, state = nnx.split(make_model())

    def gradients_and_nll(state, nll):
        def mean(state):
            found = nll(nnx.merge(graphdef, state), batch)
            return found.sum() / target_mask(batch).sum(), found

        return jax.grad(mean, has_aux=True)(state)

    chunks = (None, 1, 1000)
    (expected, expected_nll), *found = jax.jit(
        lambda state: [
            gradients_and_nll(state, nll)
            for nll in (full_nll, *(partial(token_nll, chunk=chunk) for chunk in chunks))
        ]
    )(state)
    expected = by_logical_path(expected)
    for chunk, (gradients, nll) in zip(chunks, found, strict=True):
        np.testing.assert_allclose(nll, expected_nll, atol=2e-6, err_msg=str(chunk))
        for name, gradient in by_logical_path(gradients).items():
            assert relative_error(gradient, expected[name]) < 1e-5, (chunk, name)


def test_the_loss_is_the_token_mean_over_the_whole_batch(make_model):
    batch = batch_of(3, 17)
    batch["loss_mask"] = np.arange(17) < np.array([[3], [17], [1]])
    nll, loss = jax.jit(lambda *x: (token_nll(*x), language_loss(*x)))(make_model(), batch)
    # The first token of a row is predicted by nothing: 2 + 16 + 0 targets.
    np.testing.assert_allclose(loss, np.asarray(nll).sum() / 18, rtol=1e-6)
    assert (np.asarray(nll) != 0).sum() == 18
    assert not nll[:, 0].any()


def test_the_first_token_of_a_packed_text_is_not_a_target(make_model):
    batch = batch_of(1, 10)
    batch["loss_mask"] = np.ones((1, 10), bool)
    batch["segment_ids"] = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3]])

    def program(model, batch):
        return target_mask(batch), token_nll(model, batch), full_nll(model, batch)

    mask, found, expected = jax.jit(program)(make_model(), batch)
    assert mask[0].tolist() == [
        False,
        *[True] * 3,
        False,
        *[True] * 2,
        False,
        True,
        True,
    ]
    np.testing.assert_allclose(found, expected, atol=2e-6)


def packed_and_alone():
    """A batch of two packed rows, and the same texts in a row of their own each."""
    rng = np.random.default_rng(4)
    lengths = [[7, 9, 2], [4, 11]]
    packed = {
        "tokens": np.zeros((2, 20), np.int32),
        "loss_mask": np.zeros((2, 20), bool),
        "positions": np.zeros((2, 20), np.int32),
        "segment_ids": np.zeros((2, 20), np.int32),
    }
    alone = {name: np.zeros((5, 20), x.dtype) for name, x in list(packed.items())[:2]}
    places = []
    for row, parts in enumerate(lengths):
        start = 0
        for segment, n in enumerate(parts, start=1):
            here = (row, slice(start, start + n))
            tokens, mask = rng.integers(1, 67, n), np.arange(n) >= min(n // 2, 1)
            packed["tokens"][here], packed["loss_mask"][here] = tokens, mask
            packed["positions"][here], packed["segment_ids"][here] = np.arange(n), segment
            alone["tokens"][len(places), :n], alone["loss_mask"][len(places), :n] = tokens, mask
            places.append(here)
            start += n
    return packed, alone, places


@pytest.fixture(scope="module")
def loss_and_nll(make_model):
    """A function that computes ((loss, every target's NLL), gradients) of a batch."""
    graphdef, state = nnx.split(make_model())

    @partial(jax.value_and_grad, has_aux=True)
    def function(state, batch):
        nll = token_nll(nnx.merge(graphdef, state), batch)
        return nll.sum() / target_mask(batch).sum(), nll

    return partial(jax.jit(function), state)


def test_packed_texts_have_the_losses_and_gradients_they_have_alone(loss_and_nll):
    packed, alone, places = packed_and_alone()
    (loss, together), gradients = loss_and_nll(packed)
    (expected_loss, apart), expected_gradients = loss_and_nll(alone)
    for number, here in enumerate(places):
        n = here[1].stop - here[1].start
        np.testing.assert_allclose(together[here], apart[number, :n], atol=2e-6)
        assert together[here][0] == 0
    # Every target of the one is one of the other, so the means are of the same tokens.
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for found, wanted in zip(*map(jax.tree.leaves, (gradients, expected_gradients)), strict=True):
        assert relative_error(found, wanted) < 1e-5


def test_packed_texts_do_not_see_each_other(loss_and_nll):
    packed, _, places = packed_and_alone()
    before = np.asarray(loss_and_nll(packed)[0][1])
    for changed in places:
        tokens = packed["tokens"].copy()
        tokens[changed] = (tokens[changed] + 5) % 67
        after = np.asarray(loss_and_nll(packed | {"tokens": tokens})[0][1])
        others = np.ones(before.shape, bool)
        others[changed] = False
        assert (after[others] == before[others]).all()
        assert (after[changed][1:] != before[changed][1:]).any()


WIDE = DecoderConfig(
    vocab_size=49152,  # as SmolLM2's
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)


def gradient_program(loss, trained: str):
    """The gradient with respect to some parameters, ready to be lowered."""
    graphdef, params, frozen = nnx.split(Decoder.abstract(WIDE), trainable_filter(trained), ...)
    step = jax.jit(jax.grad(lambda p, f, b: loss(nnx.merge(graphdef, p, f), b)))
    return step, params, frozen


def test_the_logits_of_a_batch_never_exist_at_once():
    batch = batch_of(4, 512)

    def temporaries(loss) -> int:
        step, params, frozen = gradient_program(loss, ".")
        return step.lower(params, frozen, batch).compile().memory_analysis().temp_size_in_bytes

    all_logits = 4 * 511 * 49152 * 4
    assert temporaries(full_loss) > all_logits
    assert temporaries(language_loss) < all_logits / 2


def test_a_frozen_head_pays_for_no_gradient_of_its_own():
    def head_gradients(trained: str) -> int:
        step, params, frozen = gradient_program(language_loss, trained)
        program = str(jax.make_jaxpr(step)(params, frozen, batch_of(1, 64)))
        return len(re.findall(r"f32\[49152,32\] = dot_general", program))

    assert head_gradients(".") == 1
    assert head_gradients("layers") == 0


def assert_no_worse_than_rounding(half, single) -> None:
    (losses, gradients), (exact_losses, exact_gradients) = half, single
    assert losses.dtype == np.float32
    assert relative_error(losses, exact_losses) < 2**-8
    for name, gradient in gradients.items():
        assert gradient.dtype == np.float32
        assert relative_error(gradient, exact_gradients[name]) < 2**-4, name


def test_half_precision_loses_no_more_than_its_rounding(make_model, found):
    model = make_model(dtype=jnp.bfloat16)
    half = value_and_gradients(model, partial(language_loss, chunk=3), LANGUAGES)
    assert_no_worse_than_rounding(half, found)


@pytest.mark.slow
def test_half_precision_of_an_untied_head_loses_no_more_than_its_rounding(config):
    config = dataclasses.replace(config, tie_word_embeddings=False)
    batch = batch_of(3, 2, 33)

    @jax.jit
    def model() -> nnx.State:
        return nnx.state(Decoder(config, rngs=nnx.Rngs(0)))

    state = model()
    half, single = (
        value_and_gradients(
            nnx.merge(nnx.graphdef(Decoder.abstract(config, dtype=dtype)), state),
            language_loss,
            batch,
        )
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert_no_worse_than_rounding(half, single)
