"""A small random decoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoo.models import Decoder, DecoderConfig, logical_paths, named_leaves


@pytest.fixture(scope="session")
def config() -> DecoderConfig:
    return DecoderConfig(
        vocab_size=67,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="session")
def make_model(config):
    """A function that makes decoders that differ in their options, never in their weights."""
    rng = np.random.default_rng(0)
    shapes = {
        name: leaf.shape[1:] if path[0] == "layers" else leaf.shape
        for path, leaf in named_leaves(nnx.state(Decoder.abstract(config)))
        for name in logical_paths(path, leaf.shape)
    }
    # Larger than at the start of a training, so that attention looks somewhere.
    weights = {
        name: rng.normal(name.endswith("scale"), 0.2, shape).astype(np.float32)
        for name, shape in shapes.items()
    }

    def make(segments=(0,), **options) -> Decoder:
        graphdef, state = nnx.split(Decoder.abstract(config, segments=segments, **options))
        arrays = []
        for path, leaf in named_leaves(state):
            parts = [weights[name] for name in logical_paths(path, leaf.shape)]
            arrays.append(jnp.asarray(np.stack(parts) if path[0] == "layers" else parts[0]))
        return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), arrays))

    return make
