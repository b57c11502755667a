"""Continuations that share a prompt, against the same texts one by one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoo.models import Decoder, DecoderConfig, token_nll
from jaxmoo.models.branches import branch_nll


def test_branches_are_scored_as_if_each_were_alone():
    config = DecoderConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, max_position_embeddings=32,
        sliding_window=5,
    )  # fmt: skip
    model = Decoder(config, segments=(0, 2), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 61, 7), rng.integers(0, 61, 4)]
    # The second continuation goes on like the first, the third is one token.
    ends = [[rng.integers(0, 61, n) for n in lengths] for lengths in ((2, 4, 1), (3, 3, 1))]
    tokens, branch = np.zeros((2, 16), np.int32), np.full((2, 16), -1, np.int32)
    for row, (prompt, some) in enumerate(zip(prompts, ends, strict=True)):
        parts = [prompt, *some]
        size = sum(map(len, parts))
        tokens[row, :size] = np.concatenate(parts)
        branch[row, :size] = np.repeat(np.arange(len(parts)), list(map(len, parts)))
    found = np.asarray(jax.jit(branch_nll)(model, jnp.asarray(tokens), jnp.asarray(branch)))

    alone = np.zeros((6, 16), np.int32)
    mask = np.zeros((6, 16), bool)
    places = [(row, number) for row in range(2) for number in range(3)]
    for i, (row, number) in enumerate(places):
        text = np.concatenate([prompts[row], ends[row][number]])
        alone[i, : len(text)] = text
        mask[i, len(prompts[row]) : len(text)] = True
    expected = np.asarray(
        jax.jit(token_nll)(model, {"tokens": jnp.asarray(alone), "loss_mask": jnp.asarray(mask)})
    )
    for i, (row, number) in enumerate(places):
        np.testing.assert_allclose(
            found[row, branch[row] == number + 1], expected[i, mask[i]], atol=1e-5
        )
    assert not found[branch <= 0].any()
