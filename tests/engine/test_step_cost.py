"""What a step costs beside plain fine-tuning: memory and traffic, counted in compiled programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo import mesh, resolved_value_and_grad
from jaxmoo.blocks import choose
from jaxmoo.engine import cost
from jaxmoo.models import Decoder, DecoderConfig, target_mask, token_nll

pytestmark = pytest.mark.slow
STACKED, LANGUAGES, LAYERS = r"^layers\.(\d+)\.", 8, 24
CONFIG = DecoderConfig(
    vocab_size=4096,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)


def compiled(objectives, aggregator, device_mesh, *, rows=LANGUAGES, **options):
    """A whole step, compiled for a mesh, and the number of its blocks."""
    graph, params = nnx.split(Decoder.abstract(CONFIG))
    optimizer = optax.adamw(1e-4)
    gradients = resolved_value_and_grad(
        lambda p, b: token_nll(nnx.merge(graph, p), b).sum(),
        params,
        mesh=device_mesh,
        num_objectives=objectives,
        aggregator=aggregator,
        **options,
        blocks=choose({r"embedding$": "slices:4", ".*": "layer"}),
        stacked=STACKED,
        weight_fn=lambda b: target_mask(b).sum(),
    )

    def step(params, opt_state, state, batch):
        losses, update, state = gradients(params, batch, state)
        update, opt_state = optimizer.update(update, opt_state, params)
        return optax.apply_updates(params, update), opt_state, state, losses

    def place(tree, shardings):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
        )

    def everywhere(tree):
        return place(tree, jax.tree.map(lambda _: NamedSharding(device_mesh, P()), tree))

    placed = place(params, mesh.parameter_shardings(device_mesh, params, stacked=STACKED))
    adam, *rest = jax.eval_shape(optimizer.init, placed)
    adam = adam._replace(count=everywhere(adam.count), mu=placed, nu=placed)
    sharding = mesh.batch_sharding(device_mesh)
    shape = (objectives, rows // objectives, 32)
    batch = {
        "tokens": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding),
        "loss_mask": jax.ShapeDtypeStruct(shape, bool, sharding=sharding),
    }
    state = everywhere(jax.eval_shape(gradients.init))
    lowered = jax.jit(step, donate_argnums=(0, 1, 2)).lower(placed, (adam, *rest), state, batch)
    return lowered.compile(), len(gradients.partition)


def costs(count):
    """Peak memory and bytes sent of a step that resolves and a plain one, on some devices."""
    devices = jax.devices()[:count]
    resolving, blocks = compiled(LANGUAGES, "cagrad", mesh.make_mesh(LANGUAGES, devices=devices))
    plain, _ = compiled(1, None, mesh.make_mesh(1, devices=devices))
    return {
        "peak": [cost.memory(x)["peak"] for x in (resolving, plain)],
        "sent": [cost.collective_bytes(x) for x in (resolving, plain)],
        "blocks": blocks,
        "devices": count,
    }


def sketched(size, languages, data, rows):
    """Bytes sent and peaks of a step that sketches and of a plain one on eight devices; blocks."""
    devices = jax.devices()[:8]
    step, blocks = compiled(
        languages,
        "cagrad",
        mesh.make_mesh(languages, data=data, devices=devices),
        rows=rows,
        gram=f"sketch:{size}",
        keep="one",
    )
    plain, _ = compiled(1, None, mesh.make_mesh(1, data=data, devices=devices), rows=rows)
    sent = [cost.collective_bytes(x) for x in (step, plain)]
    return sent, [cost.memory(x)["peak"] for x in (step, plain)], blocks


@pytest.fixture(scope="module", params=[1, 8], ids=["one device", "eight devices"])
def found(request, eight_devices):
    return eight_devices("engine.test_step_cost", "costs", request.param)


def test_memory_is_near_that_of_plain_fine_tuning(found):
    """Everything counted: parameters, optimiser, activations, temporaries; 24 layers, K = 8."""
    resolving, plain = found["peak"]
    assert resolving < (1.10 if found["devices"] > 1 else 1.15) * plain


def test_gradients_take_the_bytes_of_plain_fsdp_and_a_gram_matrix_per_block(found):
    if found["devices"] == 1:
        assert found["sent"] == [{}, {}]
        return
    gradients = [
        sum(sent.get(kind, 0) for kind in ("reduce-scatter", "all-to-all"))
        for sent in found["sent"]
    ]
    assert gradients[0] == gradients[1] > 0
    # Of what is summed over 8 devices 2 x 7/8 travels: a Gram matrix of float32 per block.
    assert found["sent"][0]["all-reduce"] == 2 * 7 / 8 * 4 * 8 * 8 * found["blocks"]


def test_sketches_take_plain_trainings_bytes_and_memory_for_any_k_and_replicas(eight_devices):
    """Exact ones would take K / L times plain's, and K times between replicas."""
    size, languages, data, pieces = 256, 64, 2, 4
    (found, plain), peaks, blocks = eight_devices(
        "engine.test_step_cost", "sketched", size, languages, data, languages * data
    )
    groups = min(languages, pieces)
    # What every device sends of its K / L sketches to those that hold the other pieces.
    exchanged = (languages // groups) * 4 * size * blocks * (pieces - 1) / pieces
    kinds = ("reduce-scatter", "all-to-all")
    sent = [sum(x.get(kind, 0) for kind in kinds) for x in (found, plain)]
    assert sent[0] - sent[1] == exchanged
    # Sums over all devices: sketches, between replicas; two halves of a Gram matrix per block.
    summed = 2 * (data - 1) / data * 4 * languages * size / pieces * blocks
    summed += 2 * (pieces - 1) / pieces * 4 * 2 * languages**2 * blocks
    more = found["all-reduce"] - plain.get("all-reduce", 0)
    assert abs(more - summed) < 4000  # losses and counts of tokens
    # Gradients of a layer of all 16 languages of a device would take more by themselves.
    layer = CONFIG.hidden_size * (3 * CONFIG.intermediate_size + 3 * CONFIG.hidden_size)
    assert peaks[0] - peaks[1] < languages // groups * 4 * layer
