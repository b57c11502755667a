"""The chunked loss against the same loss from all logits."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoo.models import (
    Decoder,
    DecoderConfig,
    language_loss,
    target_mask,
    token_nll,
    trainable_filter,
)
from tiny_models import by_logical_path, relative_error, tokens_and_mask


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


def batch_of(*shape: int, seed: int = 0) -> dict[str, jax.Array]:
    tokens, mask = tokens_and_mask(67, shape, seed=seed)
    return {"tokens": jnp.asarray(tokens), "loss_mask": jnp.asarray(mask)}


@pytest.mark.parametrize("chunk", [None, 1, 5, 16, 1000])
def test_nll_and_gradients_do_not_depend_on_the_chunk(make_model, chunk):
    model = make_model()
    batch = batch_of(3, 17)
    np.testing.assert_allclose(
        token_nll(model, batch, chunk=chunk), full_nll(model, batch), atol=2e-6
    )
    graphdef, state = nnx.split(model)
    found, expected = (
        by_logical_path(jax.grad(lambda s, f=f: f(nnx.merge(graphdef, s), batch))(state))
        for f in (partial(language_loss, chunk=chunk), full_loss)
    )
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-5, name


def test_languages_with_different_numbers_of_targets_are_mapped_over(make_model):
    graphdef, state = nnx.split(make_model())
    batch = batch_of(4, 2, 33)
    few = jnp.arange(33) < jnp.array([33, 9, 2, 0])[:, None, None]
    batch["loss_mask"] &= few
    found, expected = (
        jax.jit(
            jax.vmap(jax.value_and_grad(lambda s, b, f=f: f(nnx.merge(graphdef, s), b)), (None, 0))
        )(state, batch)
        for f in (partial(language_loss, chunk=3), full_loss)
    )
    np.testing.assert_allclose(found[0], expected[0], atol=2e-6)
    assert found[0][3] == 0
    expected_arrays = by_logical_path(expected[1], leading=1)
    for name, gradient in by_logical_path(found[1], leading=1).items():
        assert relative_error(gradient, expected_arrays[name]) < 1e-5, name
        assert not gradient[3].any()


def test_the_loss_is_the_token_mean_over_the_whole_batch(make_model):
    model = make_model()
    batch = batch_of(3, 17)
    batch["loss_mask"] = jnp.arange(17) < jnp.array([[3], [17], [1]])
    nll = token_nll(model, batch)
    # The first token of a row is predicted by nothing: 2 + 16 + 0 targets.
    np.testing.assert_allclose(language_loss(model, batch), nll.sum() / 18, rtol=1e-6)
    assert (np.asarray(nll) != 0).sum() == 18
    assert not nll[:, 0].any()


def test_the_first_token_of_a_packed_text_is_not_a_target(make_model):
    batch = batch_of(1, 10)
    batch["loss_mask"] = jnp.ones((1, 10), bool)
    batch["segment_ids"] = jnp.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3]])
    assert target_mask(batch)[0].tolist() == [
        False,
        *[True] * 3,
        False,
        *[True] * 2,
        False,
        True,
        True,
    ]
    np.testing.assert_allclose(
        token_nll(make_model(), batch), full_nll(make_model(), batch), atol=2e-6
    )


def test_a_batch_without_targets_has_loss_and_gradient_zero(make_model):
    graphdef, state = nnx.split(make_model())
    batch = batch_of(2, 9) | {"loss_mask": jnp.zeros((2, 9), bool)}
    loss, gradient = jax.value_and_grad(lambda s: language_loss(nnx.merge(graphdef, s), batch))(
        state
    )
    assert loss == 0
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient))


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


def compiled_bytes(loss, batch, *, frozen_head: bool = False) -> int:
    model = Decoder.abstract(WIDE)
    graphdef, trained, rest = nnx.split(
        model, trainable_filter("layers" if frozen_head else "."), ...
    )
    step = jax.jit(jax.grad(lambda t, r, b: loss(nnx.merge(graphdef, t, r), b)))
    return step.lower(trained, rest, batch).compile().memory_analysis().temp_size_in_bytes


def test_the_logits_of_a_batch_never_exist_at_once():
    batch = batch_of(4, 512)
    all_logits = 4 * 511 * 49152 * 4
    assert compiled_bytes(full_loss, batch) > all_logits
    assert compiled_bytes(language_loss, batch) < all_logits / 4


def test_a_frozen_head_pays_for_no_gradient_of_its_own():
    batch = batch_of(1, 64)
    head = 49152 * 32 * 4
    with_head = compiled_bytes(language_loss, batch)
    without = compiled_bytes(language_loss, batch, frozen_head=True)
    assert without < with_head - head / 2
