"""Parameters may be read outside of blocks: the result stays that of stacked gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmoo
from jaxmoo.blocks import path_string
from jaxmoo.engine import block, resolved_value_and_grad
from jaxmoo.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:Read outside of a block")

K, ROWS, D, LAYERS = 3, 4, 4, 3
_draw = np.random.default_rng(0)


def _normal(*shape):
    return jnp.asarray(_draw.normal(size=shape) * 0.7, jnp.float32)


PARAMS = {
    "stem": {"w": _normal(D, D)},
    "layers": {"w": _normal(LAYERS, D, D), "b": _normal(LAYERS, D)},
    "head": {"w": _normal(D, 2)},
}
BATCH = {"x": _normal(K, ROWS, D), "y": _normal(K, ROWS, 2)}
MASKS = jax.tree.map(lambda p: jnp.asarray(_draw.random(p.shape) < 0.7, p.dtype), PARAMS)
NOTHING = jax.tree.map(lambda _: None, PARAMS)
COUNT = jnp.arange(LAYERS)
BIAS = {"w": None, "b": None}


def layer(p, h):
    return h + jnp.tanh(h @ p["w"] + p["b"])


def model(params, batch, change=lambda layer: layer):
    h = block(lambda p, x: jnp.tanh(x @ p["w"]))(params["stem"], batch["x"])
    body = lambda h, p: (block(layer)(change(p), h), None)  # noqa: E731
    h, _ = jax.lax.scan(body, h, params["layers"])
    prediction = block(lambda p, h: h @ p["w"])(params["head"], h)
    return jnp.sum((prediction - batch["y"]) ** 2)


def combine(*trees):
    """What ``equinox.combine`` does."""

    def first(*leaves):
        return next((x for x in leaves if x is not None), None)

    return jax.tree.map(first, *trees, is_leaf=lambda x: x is None)


def squares(tree):
    return sum(jnp.vdot(p, p) for p in jax.tree.leaves(tree))


def in_float16(tree):
    return jax.tree.map(lambda p: p.astype(jnp.float16), tree)


# A penalty is part of every example's loss: the loss is a sum over them.
ALL = {"stem.w", "layers.w", "layers.b", "head.w"}
OUTSIDE = {
    "a map": (lambda p, b: model(jax.tree.map(jnp.tanh, p), b), ALL),
    "masks": (lambda p, b: model(jax.tree.map(jnp.multiply, p, MASKS), b), ALL),
    "casts": (lambda p, b: model(in_float16(p), b), ALL),
    "casts of optax": (lambda p, b: model(optax.tree.cast(p, jnp.float16), b), ALL),
    "L2": (lambda p, b: model(p, b) + ROWS * squares(p), ALL),
    "L2 of a stack": (
        lambda p, b: model(p, b) + ROWS * squares(p["layers"]),
        {"layers.w", "layers.b"},
    ),
    "L2 by name": (lambda p, b: model(p, b) + ROWS * jnp.sum(p["head"]["w"] ** 2), {"head.w"}),
    "L2 in a jitted function": (lambda p, b: model(p, b) + ROWS * jax.jit(squares)(p), ALL),
    "a block of all layers": (
        lambda p, b: model(p, b) + ROWS * block(squares)(p),
        {"layers.w", "layers.b"},
    ),
    "a norm": (lambda p, b: model(p, b) + ROWS * optax.tree.norm(p), ALL),
    "stop_gradient": (
        lambda p, b: (
            model({**p, "stem": jax.lax.stop_gradient(p["stem"])}, b)
            + ROWS * block(squares)(p["stem"])
        ),
        {"stem.w"},
    ),
    "layers in another order": (
        lambda p, b: model({**p, "layers": jax.tree.map(jnp.flip, p["layers"])}, b),
        {"layers.w", "layers.b"},
    ),
    "layers along another axis": (
        lambda p, b: model(p | {"layers": p["layers"] | {"w": transposed(p["layers"]["w"])}}, b),
        {"layers.w"},
    ),
    "a closure": (
        lambda p, b: model(p, b) + block(lambda w: jnp.vdot(w, p["head"]["w"]))(p["head"]["w"]),
        {"head.w"},
    ),
    "a part": (lambda p, b: model(p, b) + block(jnp.sum)(p["head"]["w"][:1]), {"head.w"}),
    # These read nothing, but ask for more than parameters in the engine's form can answer.
    "combine": (lambda p, b: model(combine(p, NOTHING), b), ALL),
    "combine in a loop": (lambda p, b: model(p, b, lambda x: combine(x, BIAS)), ALL),
    "sizes": (lambda p, b: model(p, b) / sum(x.size for x in jax.tree.leaves(p)), ALL),
    "layers by a traced number": (
        lambda p, b: (
            model(p, b)
            + jax.lax.scan(
                lambda h, i: (block(layer)(some(p["layers"], i), h), None), b["x"], COUNT
            )[0].sum()
        ),
        ALL,
    ),
    "no cast": (lambda p, b: model(jax.tree.map(lambda x: x.astype(jnp.float32), p), b), ALL),
}
HANDED_ON = {
    "the other way": lambda p, b: model(combine(NOTHING, p), b),
    "the size of one": lambda p, b: model(p, b) / p["layers"]["w"].size,
    "a jitted function": lambda p, b: jax.jit(model)(p, b),
    "a choice": lambda p, b: jax.lax.cond(b["x"].sum() > 0, model, model, p, b),
    "recomputed": lambda p, b: jax.checkpoint(model)(p, b),
}


def transposed(w):
    return jnp.stack([w[:, i] for i in range(D)], 1).swapaxes(1, 2)


def some(layers, which):
    return jax.tree.map(lambda x: x[which], layers)


def engine(loss):
    return resolved_value_and_grad(
        loss, PARAMS, num_objectives=K, aggregator="pcgrad", stacked="^layers"
    )


def paths(numbers):
    found = [path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(PARAMS)]
    return {found[i] for i in numbers}


@pytest.mark.parametrize("name", OUTSIDE)
def test_every_read_outside_of_a_block_is_seen(name):
    loss, wanted = OUTSIDE[name]
    made = engine(loss)
    usage = made.usage(PARAMS, BATCH)
    assert paths(usage.outside) == wanted
    assert paths(made.deferred(usage)) >= wanted


@pytest.mark.parametrize("name", HANDED_ON)
def test_parameters_that_are_only_handed_on_are_resolved_within_the_pass(name):
    """Through loops, choices and functions of JAX too."""
    made = engine(HANDED_ON[name])
    usage = made.usage(PARAMS, BATCH)
    assert not usage.outside
    # Two branches of a choice are two calls.
    assert paths(made.deferred(usage)) == (ALL if name == "a choice" else set())


def at_once(params, batch):
    changed = jax.tree.map(jnp.multiply, in_float16(params), MASKS)
    changed = changed | {"layers": jax.tree.map(jnp.flip, changed["layers"])}
    changed["stem"] = jax.lax.stop_gradient(changed["stem"])
    loss = model(changed, batch) + ROWS * (squares(params) + optax.tree.norm(params))
    return loss / sum(x.size for x in jax.tree.leaves(params))


def a_stack_and_a_part(params, batch):
    penalised = OUTSIDE["L2 of a stack"][0](params, batch)
    return penalised + block(jnp.sum)(params["head"]["w"][:1])


def some_layers_apart(params, batch):
    last = model(params | {"layers": some(params["layers"], slice(1, 3))}, batch)
    return last + ROWS * block(squares)(some(params["layers"], 0))


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(at_once, marks=pytest.mark.slow),
        a_stack_and_a_part,
        pytest.param(OUTSIDE["combine in a loop"][0], marks=pytest.mark.slow),
        pytest.param(some_layers_apart, marks=pytest.mark.slow),
    ],
    ids=["at once", "a stack and a part", "combine in a loop", "some layers apart"],
)
def test_the_result_is_that_of_stacked_gradients(loss):
    made = engine(loss)
    losses, found, state = jax.jit(made)(PARAMS, BATCH, made.init())
    tx = jaxmoo.resolve_conflicts("pcgrad", stacked="^layers", num_objectives=K)

    @jax.jit
    def oracle(params):
        mean = lambda p, b: loss(p, b) / ROWS  # noqa: E731
        values, gradients = jaxmoo.stacked_value_and_grad(mean)(params, BATCH)
        return values, *tx.update(gradients, tx.init(params))

    values, expected, wanted = oracle(PARAMS)
    np.testing.assert_allclose(losses, values, rtol=1e-5)
    np.testing.assert_allclose(state.gram, wanted.gram, rtol=0, atol=1e-5 * wanted.gram.max())
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


def test_reads_outside_of_blocks_are_named_with_their_line_and_their_price():
    with pytest.warns(
        UserWarning, match=r"head\.w \(.*test_reads\.py:\d+\).*1 of 4 arrays are held"
    ):
        jax.eval_shape(made := engine(OUTSIDE["L2 by name"][0]), PARAMS, BATCH, made.init())


def test_a_parameter_that_no_block_reads_is_refused_by_name_and_line():
    loss = lambda p, b: model(p, b) + ROWS * jnp.sum(jax.tree.leaves(p["new"])[0] ** 2)  # noqa: E731
    made = resolved_value_and_grad(
        loss, PARAMS | {"new": jnp.ones(2)}, num_objectives=K, stacked="^layers"
    )
    with pytest.raises(
        ConfigError, match=r"'new' is used outside of a block \(.*test_reads\.py:\d"
    ):
        made.usage(PARAMS | {"new": jnp.ones(2)}, BATCH)
