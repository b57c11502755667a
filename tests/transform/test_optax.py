"""resolve_conflicts: a good citizen of optax, clear about bad input."""

import re

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmoo
from jaxmoo import blocks
from jaxmoo.errors import ConfigError
from transform.trees import (
    STACKED,
    K,
    assert_trees_close,
    block_matrices,
    compiled,
    compiled_update,
    replaced,
    resolver,
)


def test_chain_gives_the_optimizer_the_resolved_gradient(params, updates):
    mgda = resolver("mgda")
    resolved, _ = compiled_update(mgda, updates, params)
    adam = optax.adamw(1e-2)
    expected, _ = compiled_update(adam, resolved, params)
    both = optax.chain(mgda, optax.adamw(1e-2))
    found, state = compiled_update(both, updates, params)
    assert_trees_close(found, expected, atol=1e-7)
    assert optax.tree.get(state, "conflict").shape == (7,)


def test_init_is_abstract_and_the_second_call_compiles_nothing(params, updates):
    tx = optax.chain(
        jaxmoo.resolve_conflicts("pcgrad", "layer", stacked=STACKED, num_objectives=K),
        optax.sgd(0.1),
    )
    abstract = jax.eval_shape(tx.init, params)
    state = tx.init(params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    traces = []

    @jax.jit
    def step(updates, state):
        traces.append(None)
        return tx.update(updates, state, params)

    for _ in range(3):
        _, state = step(updates, state)
    assert len(traces) == 1
    assert int(optax.tree.get(state, "step")) == 3


def test_random_methods_draw_anew_each_step_and_repeat_with_the_seed(params, updates):
    update = compiled(resolver("pcgrad", "whole").update)

    def run(seed):
        tx = jaxmoo.resolve_conflicts("pcgrad", "whole", num_objectives=K, seed=seed)
        state, seen = tx.init(params), []
        for _ in range(8):
            _, state = update(updates, state, params)
            seen.append(tuple(np.asarray(state.weights[0]).round(5)))
        return seen

    first = run(0)
    assert run(0) == first != run(1)
    assert len(set(first)) > 1


def test_partition_resolves_one_part_and_averages_another(params, updates):
    labels = {"embed": "mean", "layers": jax.tree.map(lambda _: "moo", params["layers"])}
    labels["scale"] = "mean"
    tx = optax.partition(
        {
            "moo": jaxmoo.resolve_conflicts("mgda", "layer", stacked=STACKED),
            "mean": jaxmoo.resolve_conflicts("mean", "whole"),
        },
        labels,
    )
    found, _ = compiled_update(tx, updates, params)
    wanted, _ = compiled_update(resolver({"layers": "mgda", ".*": "mean"}), updates, params)
    assert_trees_close(found, wanted, atol=1e-6)


def test_masked_leaves_the_rest_stacked(params, updates):
    mask = {"embed": True, "layers": jax.tree.map(lambda _: False, params["layers"])}
    mask["scale"] = True
    tx = optax.masked(jaxmoo.resolve_conflicts("mean", "whole"), mask)
    found, _ = compiled_update(tx, updates, params)
    assert found["embed"].shape == params["embed"].shape
    assert found["layers"]["mlp"]["up"].shape == (K, *params["layers"]["mlp"]["up"].shape)


def test_multi_steps_after_it_accumulates_resolved_gradients(params, updates):
    tx = optax.chain(
        jaxmoo.resolve_conflicts("mean", "layer", stacked=STACKED),
        optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(),
    )
    state = tx.init(params)
    first, state = compiled_update(tx, updates, params, state)
    tripled = jax.tree.map(lambda x: 3 * x, updates)
    second, state = compiled_update(tx, tripled, params, state)
    assert all(not np.any(x) for x in jax.tree.leaves(first))
    assert_trees_close(second, jax.tree.map(lambda x: -2 * x.mean(0), updates), atol=1e-5)


def test_a_hyperparameter_can_follow_a_schedule(params, updates):
    @optax.inject_hyperparams
    def make(c):
        return jaxmoo.resolve_conflicts(jaxmoo.aggregators.cagrad(c=c), "layer", stacked=STACKED)

    tx = make(c=lambda step: jnp.where(step == 0, 0.0, 0.9))
    state = tx.init(params)
    first, state = compiled_update(tx, updates, params, state)
    assert_trees_close(first, jax.tree.map(lambda x: x.mean(0), updates), atol=1e-5)
    second, _ = compiled_update(tx, updates, params, state)
    fixed = jaxmoo.resolve_conflicts(jaxmoo.aggregators.cagrad(c=0.9), "layer", stacked=STACKED)
    assert_trees_close(second, compiled_update(fixed, updates, params)[0], atol=1e-5)


def test_apply_if_finite_behind_it_sees_finite_updates(params, updates):
    tx = optax.chain(
        jaxmoo.resolve_conflicts("mean", "whole"), optax.apply_if_finite(optax.sgd(1.0), 2)
    )
    one_bad = jax.tree.map(lambda x: replaced(x, 0, np.nan), updates)
    found, state = compiled_update(tx, one_bad, params)
    assert_trees_close(found, jax.tree.map(lambda x: -x[1:].mean(0), updates), atol=1e-5)
    assert int(optax.tree.get(state, "total_notfinite")) == 0
    # Where every objective is non-finite, nothing is left to resolve and the update is zero.
    all_bad = jax.tree.map(lambda x: np.full_like(x, jnp.nan), updates)
    found, _ = compiled_update(tx, all_bad, params, state)
    assert all(not np.any(x) for x in jax.tree.leaves(found))


@pytest.mark.slow
def test_peak_memory_is_inputs_and_outputs(params):
    shapes = {"layers": {"w": jax.ShapeDtypeStruct((8, 4, 4_000_000), jnp.float32)}}
    single = {"layers": {"w": jax.ShapeDtypeStruct((4, 4_000_000), jnp.float32)}}
    tx = jaxmoo.resolve_conflicts("mgda", "layer", stacked="^layers")
    state = jax.eval_shape(tx.init, single)
    compiled = jax.jit(tx.update).lower(shapes, state, single).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 0.05 * 8 * 4 * 4_000_000 * 4


def test_where_there_is_nothing_to_resolve_nothing_is_done(params, updates):
    methods = {"layers": "gradvac", ".*": "mean"}
    tx = optax.chain(
        jaxmoo.resolve_conflicts(methods, "layer", stacked=STACKED, num_objectives=K),
        optax.adam(1e-3),
    )
    none = optax.masked(tx, jax.tree.map(lambda _: False, params))
    found, _ = none.update(updates, none.init(params), params)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, updates)
    found, _ = tx.update({}, tx.init({}), {})
    assert found == {}
    # A part that holds nothing, in which no pattern matches anything.
    parts = optax.partition(
        {"all": jaxmoo.resolve_conflicts("mean", "layer"), "none": tx},
        jax.tree.map(lambda _: "all", params),
    )
    found, _ = compiled_update(parts, updates, params)
    assert_trees_close(found, jax.tree.map(lambda x: x.mean(0), updates), atol=1e-6)


def test_arrays_without_elements_are_resolved_with_the_others():
    params = {"layers": {"none": jnp.zeros((0, 3)), "empty": jnp.zeros((2, 0))}, "w": jnp.zeros(2)}
    updates = jax.tree.map(lambda p: jnp.ones((K, *p.shape)), params)
    tx = jaxmoo.resolve_conflicts({"w": "mgda", ".*": "graddrop"}, "leaf", stacked="^layers")
    found, _ = compiled_update(tx, updates, params)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(found["w"], 1, rtol=1e-6)


@pytest.mark.parametrize(
    "params", [{}, {"none": jnp.zeros((0, 3))}], ids=["no arrays", "no entries"]
)
def test_steps_without_anything_to_resolve_are_counted(params):
    tx = jaxmoo.resolve_conflicts("mgda")
    updates = jax.tree.map(lambda p: jnp.ones((K, *p.shape)), params)
    found, state = compiled_update(tx, updates, params)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)
    assert state.step == 1


@pytest.mark.slow
def test_the_state_maps_over_parameters_is_serialised_and_cast(params, updates):
    tx = optax.chain(
        jaxmoo.resolve_conflicts("pcgrad", "layer", stacked=STACKED, num_objectives=K),
        optax.adam(1e-3),
    )
    state = tx.init(params)
    names = optax.tree_map_params(
        tx, lambda _, name: name, state, jax.tree.map(jnp.shape, params), is_leaf=None
    )
    assert names[1][0].mu == jax.tree.map(jnp.shape, params)
    update = compiled(tx.update)
    wanted, _ = update(updates, state, params)
    stored = flax.serialization.to_bytes(state)
    found, _ = update(updates, flax.serialization.from_bytes(state, stored), params)
    assert_trees_close(found, wanted, rtol=0)
    cast = optax.tree.cast(state[:1], jnp.float32)
    assert optax.tree.get(cast, "step").dtype != jnp.int32
    found, _ = update(updates, (*cast, state[1]), params)
    assert_trees_close(found, wanted, rtol=0)


def test_blocks_of_bytes_are_those_of_the_parameters_whatever_the_gradients_type(params, updates):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tx = jaxmoo.resolve_conflicts("mgda", "bytes:60", stacked=STACKED, num_objectives=K)
    state = tx.init(low)
    part = blocks.partition("bytes:60", low, stacked=STACKED)
    assert len(part) != len(blocks.partition("bytes:60", params, stacked=STACKED))
    _, after = compiled_update(tx, updates, low, state)
    for gram, matrix in zip(after.gram, block_matrices(part, updates)[0], strict=True):
        np.testing.assert_allclose(gram, matrix @ matrix.T, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"state is of .* Give update the parameters"):
        tx.update(updates, state)


def test_a_preference_can_follow_a_schedule(params, updates):
    make = optax.inject_hyperparams(jaxmoo.resolve_conflicts, static_args=("num_objectives",))
    tx = make(
        "mean",
        preference=lambda step: jnp.where(step == 0, jnp.array([1.0, 0, 0]), jnp.array([0, 1, 3])),
        num_objectives=K,
    )
    state, update = tx.init(params), compiled(tx.update)
    first, state = update(updates, state, params)
    second, _ = update(updates, state, params)
    np.testing.assert_allclose(first["embed"], updates["embed"][0], atol=1e-6)
    expected = updates["embed"][1] / 4 + updates["embed"][2] * 3 / 4
    np.testing.assert_allclose(second["embed"], expected, atol=1e-6)


def test_frozen_parts_lose_the_objective_axis(params, updates):
    labels = jax.tree.map(lambda _: "train", params) | {"embed": "frozen"}
    tx = optax.partition(
        {
            "train": optax.chain(jaxmoo.resolve_conflicts("mean", "layer"), optax.sgd(1.0)),
            "frozen": jaxmoo.freeze(),
        },
        labels,
    )
    found, _ = compiled_update(tx, updates, params)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)
    assert not found["embed"].any() and found["scale"] != 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregator": "cagard"}, "Did you mean 'cagrad'"),
        ({"blocks": "layers"}, "Did you mean 'layer'"),
        ({"nonfinite": "ignore"}, "expected 'skip' or 'raise'"),
        ({"preference": [1, -1]}, "weights >= 0"),
        ({"preference": [1, 1], "num_objectives": 3}, "expected 3 weights"),
        ({"preference": [1, "much"]}, "weights >= 0"),
        ({"preference": [1, float("nan")]}, "weights >= 0"),
        ({"num_objectives": 0}, "at least 1"),
        ({"num_objectives": 2.5}, "at least 1"),
        ({"match_norm": "yes"}, "expected True or False"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        jaxmoo.resolve_conflicts(**options)


def test_bad_updates_are_refused(params, updates):
    tx = jaxmoo.resolve_conflicts("mean", "layer", stacked=STACKED)
    state = tx.init(params)
    with pytest.raises(ConfigError, match=r"no objective axis.*stacked_value_and_grad"):
        tx.update(params, state, params)
    with pytest.raises(ConfigError, match="no objective axis"):
        tx.update(params, state)
    uneven = {**updates, "embed": updates["embed"][:2]}
    with pytest.raises(ConfigError, match=r"axes disagree.*2 in 'embed'.*3 in"):
        tx.update(uneven, state, params)
    fixed = jaxmoo.resolve_conflicts("mean", "layer", stacked=STACKED, num_objectives=5)
    with pytest.raises(ConfigError, match="hold 3 objectives"):
        compiled_update(fixed, updates, params)
    with pytest.raises(ConfigError, match="no objectives"):
        tx.update(jax.tree.map(lambda x: x[:0], updates), state)
    for active in (jnp.ones(K + 1, bool), jnp.array(True)):
        with pytest.raises(ConfigError, match="active: expected one entry for each of the 3"):
            tx.update(updates, state, params, active=active)
    weighted = jaxmoo.resolve_conflicts("mean", "layer", stacked=STACKED, preference=[1, 2])
    with pytest.raises(ConfigError, match="preference: expected one entry for each of the 3"):
        weighted.update(updates, state, params)
    with pytest.raises(ConfigError, match="floating point"):
        tx.update(jax.tree.map(lambda x: x.astype(jnp.int32), updates), state)


def test_patterns_that_match_nothing_or_leave_blocks_out_are_refused(params):
    for mapping, message in (
        ({"layers": "mgda"}, "No aggregator for block 'embed'"),
        ({"layers": "mgda", "head": "mean", ".*": "mean"}, "'head' is the first match of no"),
    ):
        tx = jaxmoo.resolve_conflicts(mapping, "layer", stacked=STACKED)
        with pytest.raises(ConfigError, match=message):
            tx.init(params)


# --- optax.experimental.aggregating --------------------------------------------------------------

aggregating = getattr(getattr(optax, "experimental", None), "aggregating", None)
needs_aggregating = pytest.mark.skipif(
    aggregating is None, reason="this optax has no optax.experimental.aggregating"
)


@needs_aggregating
def test_it_is_an_aggregator_of_optax(params, updates):
    """``process`` makes an aggregator of one, and passes extra arguments on."""
    mean = jaxmoo.resolve_conflicts("mean", "layer", stacked=STACKED, num_objectives=K)
    assert isinstance(mean, aggregating.Aggregator)
    assert isinstance(jaxmoo.freeze(), aggregating.Aggregator)
    clip = optax.stateless(
        lambda gradients, _: jax.vmap(optax.projections.projection_l2_ball)(gradients)
    )
    adam = optax.adam(1e-2)
    tx = aggregating.process(*map(optax.with_extra_args_support, (clip, mean, adam)))
    plain = aggregating.process(clip, mean, adam)
    assert isinstance(plain, aggregating.Aggregator)
    active = jnp.array([True, False, True])
    chain = optax.chain(clip, mean, adam)
    wanted, state = compiled_update(chain, updates, params, active=active)
    found, after = compiled_update(tx, updates, params, active=active)
    assert_trees_close(found, wanted, atol=1e-7)
    assert not optax.tree.get(after, "weights")[:, 1].any()
    np.testing.assert_array_equal(
        optax.tree.get(after, "conflict"), optax.tree.get(state, "conflict")
    )


@needs_aggregating
def test_an_aggregator_of_optax_takes_its_place(params, updates):
    averaged = optax.chain(aggregating.average_per_element_updates(), optax.sgd(1.0))
    resolved = optax.chain(jaxmoo.resolve_conflicts("mean", "whole"), optax.sgd(1.0))
    found, _ = compiled_update(averaged, updates, params)
    wanted, _ = compiled_update(resolved, updates, params)
    assert_trees_close(found, wanted, atol=1e-6)


@needs_aggregating
def test_resolved_gradients_are_accumulated_before_the_optimiser_runs(params, updates):
    mean = jaxmoo.resolve_conflicts("mean", "whole", num_objectives=K)
    accumulated = optax.chain(mean, aggregating.accumulate_avg_updates(2))
    tx = aggregating.process(optax.identity(), aggregating.Aggregator(*accumulated), optax.sgd(1.0))
    first, state = compiled_update(tx, updates, params)
    assert all(not np.any(x) for x in jax.tree.leaves(first))
    tripled = jax.tree.map(lambda x: 3 * x, updates)
    second, state = compiled_update(tx, tripled, params, state)
    assert_trees_close(second, jax.tree.map(lambda x: -2 * x.mean(0), updates), atol=1e-5)
    assert int(optax.tree.get(state, "step")) == 2
