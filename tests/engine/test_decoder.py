"""The decoder in the engine: the same update as from stacked gradients, tied or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoo import mesh, resolve_conflicts, resolved_value_and_grad, stacked_value_and_grad
from jaxmoo.blocks import choose
from jaxmoo.models import Decoder, DecoderConfig, language_loss, target_mask, token_nll

STACKED = r"^layers\.(\d+)\."
LANGUAGES, ROWS, LENGTH = 4, 4, 10


def decoder(tied, remat="full"):
    config = DecoderConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    graph, params = nnx.split(Decoder(config, remat=remat, rngs=nnx.Rngs(0)))
    return graph, jax.tree.map(lambda x: 3 * x, params)


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 48, (LANGUAGES, ROWS, LENGTH))
    mask = rng.random((LANGUAGES, ROWS, LENGTH)) < 0.6
    return {"tokens": jnp.asarray(tokens, jnp.int32), "loss_mask": jnp.asarray(mask)}


def difference(tied, blocks, device_mesh, aggregator="cagrad", remat="full"):
    """Largest relative difference of the engine's update, losses and weights from the oracle's."""
    graph, params = decoder(tied, remat)
    options = {"aggregator": aggregator, "blocks": blocks, "stacked": STACKED}
    engine = resolved_value_and_grad(
        lambda p, b: token_nll(nnx.merge(graph, p), b).sum(),
        params,
        num_objectives=LANGUAGES,
        weight_fn=lambda b: target_mask(b).sum(),
        mesh=device_mesh,
        **options,
    )
    placed = jax.device_put(params, mesh.parameter_shardings(device_mesh, params, stacked=STACKED))
    data = jax.device_put(batch(), mesh.batch_sharding(device_mesh))
    losses, update, state = jax.jit(engine)(placed, data, engine.init())

    def oracle(params, batch):
        losses, stacked = stacked_value_and_grad(
            lambda p, b: language_loss(nnx.merge(graph, p), b)
        )(params, batch)
        resolver = resolve_conflicts(num_objectives=LANGUAGES, **options)
        active = jnp.ones(LANGUAGES, bool)
        return losses, *resolver.update(stacked, resolver.init(params), active=active)

    expected = jax.jit(oracle)(params, batch())
    found = jax.device_get((losses, update, state.weights))
    expected = jax.device_get((expected[0], expected[1], expected[2].weights))
    return max(
        float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


SLICED = choose({r"embedding$": "slices:4", ".*": "layer"})


@pytest.mark.parametrize(
    ("tied", "blocks", "aggregator", "remat"),
    [
        (True, SLICED, "cagrad", "full"),
        (False, SLICED, "graddrop", "none"),
        (True, "whole", "gradvac", "dots"),
    ],
    ids=["tied, sliced", "untied, sliced, random numbers", "tied, whole, with state"],
)
def test_the_update_is_that_of_stacked_gradients(tied, blocks, aggregator, remat):
    one = mesh.make_mesh(LANGUAGES, devices=jax.devices()[:1])
    assert difference(tied, blocks, one, aggregator, remat) < 1e-5


def on_mesh(tied, axis):
    """The difference on 2 x 2 x 2 devices."""
    return difference(tied, SLICED, mesh.make_mesh(LANGUAGES, language=2, fsdp=2, **{axis: 2}))


@pytest.mark.parametrize(("tied", "axis"), [(True, "data"), (False, "tensor")])
def test_any_mesh_gives_the_same_update(tied, axis, eight_devices):
    assert eight_devices("engine.test_decoder", "on_mesh", tied, axis) < 1e-5
