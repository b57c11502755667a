"""What goes wrong is said early, by name, with what to do; languages that fail do no harm."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.cases import CASES, one_absent, one_not_finite, wanted
from engine.toy import Toy, batches, engine, weight
from jaxmoo.engine import block, resolved_value_and_grad
from jaxmoo.errors import ConfigError, DataError, JaxmooError

K, TOY = 8, Toy()
SKETCH = "sketch:64"
(BATCH,) = batches(K)


def run(loss=TOY.loss, batch=BATCH, params=TOY.params, **options):
    options = {"stacked": TOY.stacked, "num_objectives": K, "aggregator": "mean"} | options
    made = resolved_value_and_grad(loss, params, **options)
    return jax.eval_shape(made, params, batch, made.init())


# --- Languages ---------------------------------------------------------------------------------


def test_a_language_that_is_not_finite_is_left_out_and_counted():
    """That the others get what the oracle gives is one of the cases of test_exact.py."""
    name = "a function, stack in a loop, not finite"
    result, steps = wanted(name), CASES[name].steps
    assert result["state.skipped"].tolist() == [0, 0, steps, 0, 0, 0, 0, 0]
    assert np.flatnonzero(~np.isfinite(result["step.0.0"])).tolist() == [2]
    assert not result["state.weights"][:, 2].any()
    updates = [x for name, x in result.items() if name.startswith("step.0.1.")]
    assert all(np.isfinite(x).all() and np.any(x) for x in updates)


@pytest.mark.slow
def test_a_language_whose_loss_alone_is_not_finite_is_left_out_and_counted():
    """Its gradient is finite: that of a probability of zero, for one."""

    def loss(params, batch):
        return TOY.loss(params, batch) + batch["added"].sum()

    added = jnp.zeros((K, len(BATCH["mask"][0]))).at[2, 0].set(jnp.inf)
    options = {"stacked": TOY.stacked, "num_objectives": K, "weight_fn": weight}
    made = resolved_value_and_grad(loss, TOY.params, aggregator="cagrad", **options)
    step, state = jax.jit(made), made.init()
    losses, found, state = step(TOY.params, BATCH | {"added": added}, state)
    assert np.flatnonzero(~np.isfinite(losses)).tolist() == [2]
    assert state.skipped.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    absent = one_absent(BATCH) | {"added": added}
    losses, wanted, state = step(TOY.params, absent, state)
    assert losses[2] == 0 and state.skipped.sum() == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted)


def test_a_language_that_is_not_finite_may_stop_the_program():
    made = engine(TOY, K, aggregator="mean", nonfinite="raise")
    step = jax.jit(made)
    jax.block_until_ready(step(TOY.params, BATCH, made.init()))
    jax.effects_barrier()
    with pytest.raises(Exception, match=r"Non-finite gradient of objective\(s\) \[2\]"):
        jax.block_until_ready(step(TOY.params, one_not_finite(BATCH), made.init()))
        jax.effects_barrier()


def test_an_absent_language_has_no_part_and_is_no_failure():
    result = wanted("module, one objective absent")
    assert not result["state.skipped"].any()
    assert not result["state.weights"][:, 2].any() and not result["state.gram"][:, 2].any()
    assert result["step.0.0"][2] == 0


# --- Batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda b: b, {"microbatches": 3}, "a multiple of 3 (data 1 x fsdp 1 x microbatches 3)"),
        (lambda b: b, {"num_objectives": 5}, "num_objectives=5, but the batch holds 8 objectives"),
        (lambda b: b | {"mask": b["mask"][:2]}, {}, "mask: 2"),
        (lambda b: {"bias": jnp.zeros(K)}, {}, "found only arrays [K] of one number per objective"),
        (lambda b: b | {"bias": jnp.zeros((K, 5))}, {"microbatches": 2}, "'bias': expected [K, B"),
        (lambda b: jax.tree.map(lambda x: x[:, :0], b), {}, "found 0"),
        (lambda b: {}, {}, "no arrays"),
    ],
)
def test_batches_that_do_not_fit_are_refused(change, options, message):
    with pytest.raises(DataError, match=re.escape(message)):
        run(batch=change(BATCH), **options)


def test_a_mesh_with_other_axes_is_refused():
    mesh = jax.make_mesh((1,), ("model",), devices=jax.devices()[:1])
    with pytest.raises(ConfigError, match=r"expected axes data, language.*jaxmoo\.mesh\.make_mesh"):
        run(mesh=mesh)


# --- Loss functions ----------------------------------------------------------------------------


def test_parameters_are_read_in_blocks_only():
    for use in (
        lambda p, h: h * p["scale"],
        lambda p, h: h @ p["kernel"],
        lambda p, h: jnp.dot(h, p["kernel"]),
        lambda p, h: h + p["kernel"].sum(),
        lambda p, h: h + p["kernel"][0],
    ):

        def loss(params, batch, use=use):
            h = block(lambda p, t: p["embedding"][t])(params["embed"], batch["tokens"])
            return use(params["head"], h).sum()

        with pytest.raises(
            ConfigError, match=r"Parameter 'head\.\w+' is used outside of a block.*jaxmoo\.block"
        ):
            run(loss)


def test_parameters_that_no_block_reads_are_named():
    def loss(params, batch):
        return block(lambda p, t: p["embedding"][t])(params["embed"], batch["tokens"]).sum()

    with pytest.raises(ConfigError, match=r"No block reads.*head\.kernel.*layers.*Freeze them"):
        run(loss)


@pytest.mark.parametrize("k", [3, K])
def test_blocks_are_not_mapped_over_their_parameters(k):
    """Also where there are as many layers as objectives."""

    def loss(params, batch):
        layer = block(lambda p, h: h * p["bias"].sum())
        return jax.vmap(layer, in_axes=(0, None))(params["mlp"], batch["factor"]).sum()

    params = {"mlp": {"bias": TOY.params["layers"]["mlp"]["bias"]}}
    (batch,) = batches(k)
    with pytest.raises(ConfigError, match=r"reads 'mlp\.bias' was called inside a vmap over its"):
        run(loss, batch, params, stacked="^mlp", num_objectives=k)


# --- Options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregator": "cagard"}, "Did you mean 'cagrad'"),
        ({"aggregator": "modo"}, "modo needs gradients of two batches"),
        ({"aggregator": {"layers": "mgda"}}, "No aggregator for block"),
        ({"aggregator": None}, "of a single objective, found 8"),
        ({"blocks": "layers"}, "Did you mean 'layer'"),
        ({"stacked": "^blocks"}, "matches no parameter path"),
        ({"nonfinite": "ignore"}, "nonfinite: expected one of skip, raise"),
        ({"replicas": "mean"}, "replicas: expected one of mean_then_resolve"),
        ({"accumulation": "first"}, "accumulation: expected one of resolve_each"),
        ({"microbatches": 0}, "microbatches: expected at least 1"),
        ({"preference": [1, 1]}, "expected 8 weights"),
        ({"gram": "sketched"}, "gram: expected 'exact' or 'sketch:N'"),
        ({"gram": "sketch:1"}, "with N at least 2, found 'sketch:1'"),
        ({"gram": SKETCH, "aggregator": "graddrop"}, "graddrop works coordinate by coordinate"),
        ({"keep": "one"}, "keep='one' needs sketches"),
        ({"gram": SKETCH, "replicas": "pooled_gram"}, "which is what mean_then_resolve means"),
        (
            {"gram": SKETCH, "microbatches": 2, "accumulation": "accumulate_first"},
            "nothing is left to sketch",
        ),
    ],
)
def test_bad_options_are_refused_before_anything_is_traced(options, message):
    def untouched(params, batch):
        raise AssertionError("traced")

    with pytest.raises(JaxmooError, match=re.escape(message)):
        run(untouched, **options)


def test_an_unknown_way_of_recomputing_is_refused():
    with pytest.raises(ConfigError, match="remat must be one of full, dots, none"):
        block(lambda p: p, remat="some")
