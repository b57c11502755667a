"""Generation: greedily the tokens transformers generates, whatever the padding and the batch."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_models
from jaxmoo.errors import ConfigError
from jaxmoo.hf import load_model
from jaxmoo.models.generate import generate

LENGTHS = [11, 1, 20]
NEW = 32


def prompts(pad):
    rng = np.random.default_rng(1)
    tokens = np.full((len(LENGTHS), 24), pad, np.int32)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = rng.integers(3, 131, length)
    return tokens


def expected(oracle, tokens, stop):
    """One prompt at a time, so that nothing is padded."""
    import torch

    rows = np.full((len(LENGTHS), NEW), 2, np.int32)
    for row, length in enumerate(LENGTHS):
        ids = torch.tensor(tokens[row : row + 1, :length].astype(np.int64))
        out = oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=stop or None,
            pad_token_id=2,
        )[0, length:]
        rows[row, : len(out)] = out
    return rows


def generated(model, tokens, stop):
    return np.asarray(
        jax.jit(generate, static_argnames=("new_tokens", "stop", "pad_id"))(
            model, jnp.asarray(tokens), jnp.asarray(LENGTHS), new_tokens=NEW, stop=stop, pad_id=2
        )
    )


@pytest.mark.parametrize(
    "variant", ["mistral", "qwen3", "gemma2", "gemma3_text", "cohere2", "olmo3"]
)
@pytest.mark.slow
def test_the_tokens_are_those_of_transformers(variant, tmp_path):
    oracle = tiny_models.save(variant, tmp_path)
    oracle.generation_config.eos_token_id = None
    tokens = prompts(pad=2)
    wanted = expected(oracle, tokens, [])
    # The layers in two stacks, as a run that trained the last one has them.
    model = load_model(tmp_path, segments=(0, 2))
    assert (generated(model, tokens, ()) == wanted).all()


def test_rows_end_with_a_stop_token_and_do_not_touch_each_other(tmp_path):
    oracle = tiny_models.save("llama", tmp_path)
    tokens = prompts(pad=2)
    free = expected(oracle, tokens, [])
    stop = (int(free[0, 5]), int(free[2, 2]))
    model = load_model(tmp_path)
    found = generated(model, tokens, stop)
    assert (found == expected(oracle, tokens, list(stop))).all()
    assert (found[0, np.isin(found[0], stop).argmax() + 1 :] == 2).all()
    # What lies in the padding is never seen.
    assert (generated(model, np.where(tokens == 2, 77, tokens), stop) == found).all()


def test_every_row_has_its_own_stop_tokens_and_numbers(tmp_path):
    """A row's text does not depend on the batch: on other rows, on padding, or on where it is."""
    from jaxmoo.models.sampling import Sampling

    oracle = tiny_models.save("llama", tmp_path)
    tokens, free = prompts(pad=2), expected(oracle, prompts(pad=2), [])
    # Each ends with the other's token, and not with its own.
    stop = np.array([[free[0, 5], -1], [free[1, 3], free[1, 1]], [free[2, 2], -1]], np.int32)
    model = load_model(tmp_path)
    run = jax.jit(generate, static_argnames=("new_tokens", "pad_id", "sampling"))

    def found(rows, width, **options):
        return np.asarray(
            run(
                model,
                jnp.asarray(tokens[rows, :width]),
                jnp.asarray(LENGTHS)[jnp.asarray(rows)],
                new_tokens=NEW,
                stop=jnp.asarray(stop[rows]),
                pad_id=2,
                rows_B=jnp.asarray(rows),
                **options,
            )
        )

    greedy = found([0, 1, 2], 24)
    for row in range(3):
        own = [int(token) for token in stop[row] if token >= 0]
        assert (greedy[row] == expected(oracle, tokens, own)[row]).all()
    drawn = {"sampling": Sampling(temperature=1.3, top_k=40), "seed": 5}
    together = found([0, 1, 2], 24, **drawn)
    assert (together != greedy).any()
    assert (together[[2, 0]] == found([2, 0], 20, **drawn)).all()
    assert (together != found([0, 1, 2], 24, **drawn | {"seed": 6})).any()


def test_a_text_whose_rotary_frequencies_would_change_is_refused(tmp_path):
    tiny_models.save("phi3", tmp_path)
    with pytest.raises(ConfigError, match=r"9 tokens in all: beyond 8, .* \(longrope\)"):
        generate(load_model(tmp_path), jnp.zeros((1, 4)), jnp.ones(1), new_tokens=5, stop=())


def test_too_long_a_text_is_refused(tmp_path):
    tiny_models.save("llama", tmp_path)
    limit = json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"]
    with pytest.raises(ConfigError, match=f"at most {limit} in all"):
        generate(load_model(tmp_path), jnp.zeros((1, limit)), jnp.ones(1), new_tokens=1, stop=())
