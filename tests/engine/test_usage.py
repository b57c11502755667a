"""Which parameters are resolved within the pass, and what a loss function may do with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmoo
from engine.toy import D, Toy, batches, engine
from jaxmoo.blocks import path_string
from jaxmoo.engine import block, resolved_value_and_grad

K = 3
BATCH = batches(K)[0]
ALL = {"embed.embedding", "head.kernel", "head.scale"} | {
    f"layers.{name}" for name in ("mix.kernel", "mlp.bias", "mlp.gate", "mlp.up")
}


def deferred(toy, blocks="layer", **options):
    """Paths of the arrays that are resolved after the pass."""
    made = engine(toy, K, blocks=blocks, aggregator="mean", **options)
    paths = [path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(toy.params)]
    return {paths[i] for i in made.deferred(made.usage(toy.params, BATCH))}


@pytest.mark.parametrize("blocks", ["layer", "module", "leaf"])
@pytest.mark.parametrize("form", ["scan", "loop", "list"])
def test_blocks_that_one_call_sees_are_resolved_within_the_pass(form, blocks):
    assert not deferred(Toy(form=form), blocks)


@pytest.mark.parametrize("form", ["scan", "loop"])
def test_a_parameter_used_twice_is_resolved_when_both_uses_are_known(form):
    assert deferred(Toy(tied=True, form=form)) == {"embed.embedding"}
    assert deferred(Toy(shared=True, form=form)) == {"shared.kernel"}


def test_blocks_that_span_calls_are_resolved_after_the_pass():
    assert deferred(Toy(), "whole") == ALL
    assert deferred(Toy(), lambda path: "edge" if "layers" not in path else path) == {
        "embed.embedding",
        "head.kernel",
        "head.scale",
    }
    # Of a stack, one layer that shares its block with another array takes the others with it.
    rule = lambda path: "odd" if path in ("layers.0.mlp.bias", "head.scale") else path  # noqa: E731
    assert deferred(Toy(), rule) == {"layers.mlp.bias", "head.scale"}


def test_a_loss_is_traced_for_its_use_of_parameters_once_per_shape_of_batch():
    traced = []

    def loss(params, batch):
        traced.append(batch.shape)
        return block(lambda p, x: jnp.tanh(x * p["w"]))(params, batch).sum()

    params = {"w": jnp.ones(3)}
    made = resolved_value_and_grad(loss, params, num_objectives=K, aggregator="mean")
    shapes = jax.ShapeDtypeStruct((K, 2, 3), jnp.float32)
    made.usage(params, shapes)
    first = len(traced)
    assert made.usage(params, jnp.ones((K, 2, 3))) is made.usage(params, shapes)
    assert len(traced) == first
    made.usage(params, jnp.ones((K, 4, 3)))
    assert len(traced) == 2 * first


def test_accumulated_gradients_are_resolved_after_the_pass():
    assert deferred(Toy(), microbatches=2, accumulation="accumulate_first") == ALL


def test_examples_may_be_mapped():
    """The gradients of one parameter are summed over the examples before they are resolved."""

    def loss(params, batch):
        scale = block(lambda p, x: jnp.tanh(x * p["w"]))
        return jax.vmap(scale, in_axes=(None, 0))(params, batch).sum()

    params = {"w": jnp.arange(1.0, 4.0)}
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(K, K, 3)), jnp.float32)
    made = resolved_value_and_grad(loss, params, num_objectives=K, aggregator="pcgrad")
    _, found, _ = jax.jit(made)(params, batch, made.init())
    stacked = jaxmoo.stacked_value_and_grad(lambda p, b: loss(p, b) / K)
    _, gradients = jax.jit(stacked)(params, batch)
    tx = jaxmoo.resolve_conflicts("pcgrad", num_objectives=K)
    expected, _ = jax.jit(tx.update)(gradients, tx.init(params))
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-5)


def test_a_marked_function_is_the_function_elsewhere():
    def function(p, x):
        return jnp.tanh(x @ p["w"])

    params, x = {"w": jnp.eye(2) * 0.5}, jnp.ones((3, 2))
    for remat in ("full", "dots", "none"):
        marked = block(function, remat=remat)
        np.testing.assert_allclose(marked(params, x), function(params, x), rtol=1e-6)
        found = jax.grad(lambda p, f=marked: f(p, x).sum())(params)["w"]
        expected = jax.grad(lambda p: function(p, x).sum())(params)["w"]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


class Classifier(nnx.Module):
    """Nothing like a language model: norm, two layers and a skip connection."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.hidden = nnx.Linear(D, D, rngs=rngs)
        self.out = nnx.Linear(D, 4, rngs=rngs)


def classifier_loss(model, batch, remat="full"):
    def mark(part):
        return block(part, remat=remat)

    h = mark(model.norm)(batch["x"])
    h = h + jnp.tanh(mark(model.hidden)(h))
    logits = mark(model.out)(h)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], -1).sum()


@pytest.fixture(scope="module")
def classified():
    """A model's graph, parameters and batch, and what stacked gradients give."""
    graph, params = nnx.split(Classifier(nnx.Rngs(0)))
    draw = np.random.default_rng(0)
    batch = {
        "x": jnp.asarray(draw.normal(size=(K, 6, D)), jnp.float32),
        "y": jnp.asarray(draw.integers(0, 4, (K, 6))),
    }
    tx = jaxmoo.resolve_conflicts("pcgrad", num_objectives=K)

    @jax.jit
    def oracle(params):
        stacked = jaxmoo.stacked_value_and_grad(
            lambda p, b: classifier_loss(nnx.merge(graph, p), b) / 6
        )
        losses, gradients = stacked(params, batch)
        return losses, tx.update(gradients, tx.init(params))[0]

    return graph, params, batch, oracle(params)


@pytest.mark.parametrize(
    "remat", ["full", *(pytest.param(x, marks=pytest.mark.slow) for x in ("dots", "none"))]
)
def test_flax_modules_of_ones_own_are_blocks(remat, classified):
    graph, params, batch, (wanted_losses, expected) = classified

    def loss(params, batch):
        return classifier_loss(nnx.merge(graph, params), batch, remat)

    made = resolved_value_and_grad(loss, params, num_objectives=K, aggregator="pcgrad")
    losses, found, state = jax.jit(made)(params, batch, made.init())
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())
    assert made.partition.names == ("hidden", "norm", "out")
    assert state.gram.shape == (3, K, K)


def test_frozen_parameters_are_read_and_not_trained():
    toy = Toy()
    trained = {"layers": toy.params["layers"]}
    frozen = {name: toy.params[name] for name in ("embed", "head")}

    def loss(trained, frozen, batch):
        return toy.loss({**trained, **frozen}, batch)

    made = resolved_value_and_grad(
        loss, trained, num_objectives=K, aggregator="pcgrad", frozen=frozen, stacked=toy.stacked
    )
    _, found, _ = jax.jit(made)(trained, BATCH, made.init(), frozen)
    _, gradients = jax.jit(
        jaxmoo.stacked_value_and_grad(lambda p, b: loss(p, frozen, b) / b["mask"].shape[0])
    )(trained, BATCH)
    tx = jaxmoo.resolve_conflicts("pcgrad", stacked=toy.stacked, num_objectives=K)
    expected, _ = jax.jit(tx.update)(gradients, tx.init(trained))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


def scanned(body):
    """A loss that scans a function over stacked layers."""
    return lambda params, batch: jax.lax.scan(body, batch, params["layers"]["w"])[0].sum()


@pytest.mark.parametrize(
    "loss",
    [
        jax.jit(scanned(lambda x, w: (block(lambda p, x: jnp.tanh(x @ p))(w, x), None))),
        pytest.param(
            jax.checkpoint(scanned(lambda x, w: (block(lambda p, x: jnp.tanh(x @ p))(w, x), None))),
            marks=pytest.mark.slow,
        ),
        scanned(lambda x, w: (block(lambda p, x: jnp.tanh(x @ p))(w, x), None)),
    ],
    ids=["jitted", "recomputed", "scanned"],
)
def test_a_loss_that_jax_has_traced_is_the_same_before_within_and_after_any_engine(loss):
    """JAX keeps traces by function and shapes; what an engine traced is for that engine alone."""
    params = {"layers": {"w": jnp.stack([jnp.eye(2) * 0.5, jnp.eye(2) * 2])}}
    batch = jnp.array([[[0.1, 0.2]], [[0.3, -0.4]]])
    expected = np.sum(np.tanh(np.tanh(np.asarray(batch) * 0.5) * 2), (1, 2))

    def outside():
        return np.asarray([loss(params, one) for one in batch])

    np.testing.assert_allclose(outside(), expected, rtol=1e-6)
    for aggregator in ("mean", "fairgrad"):
        engine = resolved_value_and_grad(
            loss, params, num_objectives=2, aggregator=aggregator, blocks="layer",
            stacked=r"^layers\.",
        )  # fmt: skip
        losses, _, _ = jax.jit(engine)(params, batch, engine.init())
        np.testing.assert_allclose(losses, expected, rtol=1e-6)
        np.testing.assert_allclose(outside(), expected, rtol=1e-6)
