"""The compiled step: compiled once, and with memory for one layer's gradients, not the model's."""

import logging

import jax
import jax.numpy as jnp
import pytest

import jaxmoo
from engine.toy import Toy, batches, engine
from jaxmoo.engine import block, resolved_value_and_grad


def test_the_second_step_is_neither_traced_nor_compiled(caplog):
    toy, data = Toy(), batches(4, 3)
    made, traces = engine(toy, 4, aggregator="moco"), []

    @jax.jit
    def step(params, batch, state):
        traces.append(None)
        return made(params, batch, state)

    state = made.init()
    compiled = []
    for batch in data:
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            losses, _, state = step(toy.params, batch, state)
            jax.block_until_ready(losses)
        compiled.append(sum("Compiling jit(step)" in r.getMessage() for r in caplog.records))
    assert compiled == [1, 0, 0]
    assert len(traces) == 1
    assert int(state.step) == 3


def test_the_state_is_that_of_resolve_conflicts():
    toy = Toy()
    made = engine(toy, 4, aggregator="moco")
    tx = jaxmoo.resolve_conflicts("moco", stacked=toy.stacked, num_objectives=4)
    abstract = jax.eval_shape(made.init)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), jax.eval_shape(tx.init, toy.params)
    )


@pytest.mark.slow
def test_memory_is_that_of_one_layers_gradients():
    """24 layers of 256 KiB: all objectives' gradients are 48 MiB, of one layer 2 MiB."""
    k, layers, width = 8, 24, 256

    def loss(params, batch):
        def body(h, layer):
            return block(lambda p, h: h + jnp.tanh(h @ p["w"]))(layer, h), None

        h, _ = jax.lax.scan(body, batch["x"], params["layers"])
        return (h**2).sum()

    params = {"layers": {"w": jax.ShapeDtypeStruct((layers, width, width), jnp.float32)}}
    batch = {"x": jax.ShapeDtypeStruct((k, 4, width), jnp.float32)}
    options = {"aggregator": "mean", "stacked": "^layers", "num_objectives": k}
    made = resolved_value_and_grad(loss, params, **options)
    tx = jaxmoo.resolve_conflicts("mean", stacked="^layers", num_objectives=k)

    def stacked(params, batch, state):
        losses, gradients = jaxmoo.stacked_value_and_grad(loss)(params, batch)
        return losses, *tx.update(gradients, state)

    def temporary(step, state):
        compiled = jax.jit(step).lower(params, batch, state).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    model = layers * width**2 * 4
    in_pass = temporary(made, jax.eval_shape(made.init))
    at_once = temporary(stacked, jax.eval_shape(tx.init, params))
    assert at_once > k * model
    assert in_pass < 0.25 * at_once
