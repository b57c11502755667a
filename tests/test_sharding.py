"""Gradients on explicit meshes and inside of ``shard_map``, with every method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmoo
from jaxmoo import aggregators

K = 4
AXES = ("language", "fsdp")
draw = np.random.default_rng(0)


def method(name):
    return aggregators.get(name, **({"weights": [1, 2, 3, 4]} if name == "constant" else {}))


def normal(*shape):
    return jnp.asarray(draw.normal(size=shape), jnp.float32)


def same(found, wanted, what):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        if jax.dtypes.issubdtype(y.dtype, jax.dtypes.prng_key):
            continue
        atol = 2e-5 * np.abs(y).max(initial=1e-30)
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=f"{what} {path}")


def on_meshes():
    """Compare on 2 x 2 devices; the default types of ``jax.make_mesh`` are explicit."""
    names = aggregators.names()
    params = {name: jnp.zeros((4, 6)) for name in names} | {"bias": jnp.zeros(3)}
    first, second = (jax.tree.map(lambda p: normal(K, *p.shape), params) for _ in range(2))
    methods = {f"^{name}$": method(name) for name in names} | {".*": "mean"}
    tx = jaxmoo.resolve_conflicts(methods, blocks="leaf", num_objectives=K)

    def update(first, second, state):
        return tx.update(first, state, second=second)

    state = tx.init(params)
    wanted = jax.jit(update)(first, second, state)

    mesh = jax.make_mesh((2, 2), AXES)
    assert mesh.axis_types == (AxisType.Explicit,) * 2

    def place(tree, lead):
        def one(x):
            return jax.device_put(
                x, NamedSharding(mesh, P(lead, None if x.shape[1] % 2 else "fsdp"))
            )

        return jax.tree.map(one, tree)

    w, batch = normal(6), {"x": normal(K, 8, 6), "y": normal(K, 8)}
    with jax.set_mesh(mesh):
        found = jax.jit(update)(
            place(first, "language"), place(second, "language"), tx.init(params)
        )
        same(found, wanted, "explicit:")
        assert jax.typeof(found[0]["cagrad"]).sharding.spec == P("fsdp", None)
        # A second step takes what the first gives, and so does the rest of a chain.
        chain = optax.chain(jaxmoo.resolve_conflicts("moco", num_objectives=K), optax.adam(0.1))
        inputs = place({"w": first["mgda"]}, "language")
        placed = jax.device_put({"w": params["mgda"]}, NamedSharding(mesh, P("fsdp")))
        step = jax.jit(chain.update)
        _, kept = step(inputs, chain.init(placed), placed)
        step(inputs, kept, placed)

        def loss(w, batch):
            return jnp.mean((batch["x"] @ w - batch["y"]) ** 2)

        gradients = jaxmoo.stacked_value_and_grad(loss)
        on_mesh = jax.device_put(batch, NamedSharding(mesh, P("language", "fsdp")))
        found = jax.jit(gradients)(jax.device_put(w, NamedSharding(mesh, P())), on_mesh)
    same(found, gradients(w, batch), "stacked:")

    rows = first["mgda"].reshape(K, -1)
    found = jaxmoo.aggregate("cagrad", jax.device_put(rows, NamedSharding(mesh, P(None, "fsdp"))))
    same(found, jaxmoo.aggregate("cagrad", rows), "aggregate:")

    # Inside of shard_map, which checks: each device of "fsdp" is given, and so gives, the whole.
    mesh = jax.make_mesh((2, 2), AXES, axis_types=(AxisType.Auto,) * 2)
    given, out = P(None, "fsdp"), P("fsdp")
    run = jax.shard_map(
        lambda *updates: update(*updates, state)[0],
        mesh=mesh,
        in_specs=(given, given),
        out_specs=out,
    )
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x], 1), (first, second))
    found = jax.jit(run)(*twice)
    same(found, jax.tree.map(lambda x: jnp.concatenate([x, x]), wanted[0]), "shard_map:")

    def aggregate(x):
        return jaxmoo.aggregate("imtl_g", x)

    jax.shard_map(aggregate, mesh=mesh, in_specs=given, out_specs=out)(rows)


@pytest.mark.slow
def test_every_method_runs_on_explicit_meshes_and_in_shard_map(eight_devices):
    eight_devices("test_sharding", "on_meshes")
