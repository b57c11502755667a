"""What passes through a block and the engine: modules' state, arguments of all kinds, aux."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import jaxmoo
from jaxmoo.engine import block, resolved_value_and_grad
from jaxmoo.errors import ConfigError
from jaxmoo.mesh import batch_sharding, parameter_shardings

K, ROWS, D = 3, 4, 4
DRAW = np.random.default_rng(0)
X = jnp.asarray(DRAW.normal(size=(ROWS, D)), jnp.float32)


class Noisy(nnx.Module):
    """A layer whose calls change statistics and count random draws."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(D, D, rngs=rngs)
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, training, *, scale=1.0):
        h = self.norm(self.linear(x), use_running_average=not training)
        return scale * self.dropout(h, deterministic=not training)


def values(module):
    return jax.tree.leaves(nnx.state(module, nnx.Not(nnx.RngKey)))


@pytest.mark.parametrize("remat", ["full", "dots", "none"])
def test_a_block_of_a_module_is_the_module_and_keeps_what_its_calls_change(remat):
    plain, marked = Noisy(nnx.Rngs(0)), Noisy(nnx.Rngs(0))
    call = block(marked, remat=remat)
    for training in (True, True, False):
        np.testing.assert_allclose(call(X, training, scale=2.0), plain(X, training, scale=2.0))
    for x, y in zip(values(marked), values(plain), strict=True):
        np.testing.assert_allclose(x, y)
    assert marked.dropout.rngs.count.get_value() == 2


class Changes(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones(D))

    def __call__(self, x):
        self.w[...] = self.w * 2
        return x * self.w


class Grows(Changes):
    def __call__(self, x):
        self.seen = nnx.Variable(x)
        return x * self.w


def test_what_a_block_of_a_module_cannot_keep_is_refused_by_name():
    with pytest.raises(
        ConfigError, match=r"block\(Changes\): .*changes its parameter 'Changes\.w'"
    ):
        block(Changes())(X)
    with pytest.raises(
        ConfigError, match=r"block\(Grows\): .*makes the new variable 'Grows\.seen'"
    ):
        block(Grows())(X)


def test_arguments_that_are_no_arrays_pass_through_a_block():
    def function(p, x, activation, power, *, flip, name=None, bias):
        assert isinstance(power, int) and isinstance(name, str)
        x = activation(x @ p["w"]) ** power + bias["b"]
        return -x if flip else x

    arguments = ({"w": jnp.eye(D)}, X, jnp.tanh, 3)
    options = {"flip": True, "name": "last", "bias": {"b": jnp.ones(D)}}
    np.testing.assert_allclose(
        jax.jit(lambda: block(function)(*arguments, **options))(),
        function(*arguments, **options),
        rtol=1e-5,
    )


BATCH = {
    "x": jnp.asarray(DRAW.normal(size=(K, ROWS, D)), jnp.float32),
    "temperature": jnp.asarray([0.5, 1.0, 2.0]),  # [K]
}


def test_state_of_modules_numbers_per_objective_and_aux_are_as_with_stacked_gradients():
    graph, params, rest = nnx.split(Noisy(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, rest, batch, call=block):
        model = nnx.merge(graph, params, rest)
        h = call(model)(batch["x"], True)
        loss = jnp.sum(jnp.exp(h / batch["temperature"]))
        return loss, {"stats": nnx.state(model, nnx.BatchStat), "sum": h.sum()}

    made = resolved_value_and_grad(
        loss, params, num_objectives=K, aggregator="mgda", frozen=rest, has_aux=True
    )
    (losses, aux), found, _ = jax.jit(made)(params, BATCH, made.init(), rest)

    def mean(params, batch):
        variables = jax.tree.map(lambda x: x, rest)
        value, aux = loss(params, variables, batch, call=lambda model: model)
        return value / ROWS, aux

    tx = jaxmoo.resolve_conflicts("mgda", num_objectives=K)

    @jax.jit
    def oracle(params):
        result, gradients = jaxmoo.stacked_value_and_grad(mean, has_aux=True)(params, BATCH)
        return result, tx.update(gradients, tx.init(params))[0]

    wanted = oracle(params)
    for x, y in zip(jax.tree.leaves(((losses, aux), found)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())


def on_explicit_meshes():
    """Compare on the meshes that ``jax.make_mesh`` makes."""
    k, rows_each = 4, 8
    draw = np.random.default_rng(0)
    batch = {
        "x": draw.normal(size=(k, rows_each, 4)).astype(np.float32),
        "temperature": np.arange(1, k + 1, dtype=np.float32),
    }
    params = {"w": draw.normal(size=(4, 4)).astype(np.float32), "b": np.ones(3, np.float32)}

    def layer(p, x):
        return jnp.tanh(x @ p["w"])[:, :3] * p["b"]

    def loss(params, batch):
        h = block(layer)(params, batch["x"])
        penalty = len(h) * sum(jnp.vdot(p, p) for p in jax.tree.leaves(params))
        return jnp.sum((h - 1) ** 2 / batch["temperature"]) + penalty, {"positive": (h > 0).sum()}

    def mean(params, batch):
        value, aux = loss(params, batch)
        return value / rows_each, aux

    tx = jaxmoo.resolve_conflicts("cagrad", num_objectives=k)

    @jax.jit
    def oracle(params):
        result, gradients = jaxmoo.stacked_value_and_grad(mean, has_aux=True)(params, batch)
        return result, tx.update(gradients, tx.init(params))[0]

    wanted = oracle(params)

    for names, sizes in [
        (("data", "language", "fsdp"), (1, 2, 2)),
        (("data", "language", "fsdp", "tensor"), (1, 2, 1, 2)),
    ]:
        mesh = jax.make_mesh(sizes, names)
        assert set(mesh.axis_types) == {AxisType.Explicit}
        with jax.set_mesh(mesh):
            made = resolved_value_and_grad(
                loss,
                params,
                num_objectives=k,
                aggregator="cagrad",
                mesh=mesh,
                has_aux=True,
                microbatches=2,
                accumulation="accumulate_first",
            )
            placed = jax.device_put(params, parameter_shardings(mesh, params))
            rows = jax.device_put(batch["x"], batch_sharding(mesh))
            step, state = jax.jit(made), made.init()
            result, update, state = step(placed, batch | {"x": rows}, state)
            step(placed, batch | {"x": rows}, state)
        assert jax.typeof(update["w"]).sharding == jax.typeof(placed["w"]).sharding
        for x, y in zip(jax.tree.leaves((result, update)), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


def test_the_engine_runs_on_explicit_meshes(eight_devices):
    """With numbers per objective, aux, microbatches and a penalty outside of blocks."""
    eight_devices("engine.test_modules", "on_explicit_meshes")
