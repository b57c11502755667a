"""The distributions that tokens are drawn from: those of transformers' logits warpers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoo.errors import ConfigError
from jaxmoo.models.sampling import Sampling, draw, filter_logits

VOCABULARY = 50


def logits(rows=4):
    return np.random.default_rng(0).normal(0, 3, (rows, VOCABULARY)).astype(np.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 10**6},
        {"top_p": 0.01},
        {"top_p": 0.9},
        {"top_p": 1.0},
        {"min_p": 0.0},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_the_filters_are_those_of_transformers_in_its_order(settings):
    import torch
    from transformers import GenerationConfig, LogitsProcessorList
    from transformers.generation import logits_process as theirs

    kinds = {
        "temperature": theirs.TemperatureLogitsWarper,
        "top_k": theirs.TopKLogitsWarper,
        "top_p": theirs.TopPLogitsWarper,
        "min_p": theirs.MinPLogitsWarper,
    }
    assert set(kinds) <= set(vars(GenerationConfig())), "and so are their names"
    warpers = LogitsProcessorList(
        [kinds[name](settings[name]) for name in kinds if name in settings]
    )
    expected = warpers(None, torch.from_numpy(logits())).softmax(-1).numpy()
    found = jax.nn.softmax(filter_logits(jnp.asarray(logits()), Sampling(**settings)))
    assert ((np.asarray(found) > 0) == (expected > 0)).all()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_tokens_are_drawn_with_their_probabilities():
    sampling, number = Sampling(temperature=1.5, top_k=5), 4000
    row = jnp.asarray(logits(1))
    many = jnp.broadcast_to(row, (number, VOCABULARY))
    drawn = jax.jit(draw, static_argnames="sampling")(
        many, sampling, jnp.int32(3), jnp.arange(number), jnp.int32(2)
    )
    share = np.bincount(np.asarray(drawn), minlength=VOCABULARY) / number
    wanted = np.asarray(jax.nn.softmax(filter_logits(row, sampling)))[0]
    assert (share[wanted == 0] == 0).all()
    # Five standard errors of a share.
    np.testing.assert_array_less(np.abs(share - wanted), 5 * np.sqrt(wanted / number) + 1e-9)


def test_what_is_drawn_depends_on_seed_row_and_place_in_the_text_alone():
    row = jnp.zeros((1, 10**4))

    def one(seed, number, place):
        return int(
            draw(row, Sampling(), jnp.int32(seed), jnp.asarray([number]), jnp.int32(place))[0]
        )

    found = [one(0, 0, 0), one(1, 0, 0), one(0, 1, 0), one(0, 0, 1), one(1, 1, 0), one(0, 1, 1)]
    assert len(set(found)) == len(found)
    assert found[0] == one(0, 0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature is a number above 0, found 0.0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k is a number of tokens, at least 1, found 0"),
        ({"top_p": 0.0}, "top_p is a probability above 0"),
        ({"top_p": 1.1}, "top_p is a probability above 0"),
        ({"min_p": -0.1}, "min_p is a number from 0 to 1"),
    ],
    ids=str,
)
def test_what_is_out_of_range_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)
