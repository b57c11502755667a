"""resolve_conflicts: exact per block, a good citizen of optax, clear about bad input."""

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
from jaxmoo.resolve import conflict_share

K = 3
STACKED = r"^layers\."
METHODS = ["mean", "sum", "mgda", "cagrad", "pcgrad"]
BLOCKS = ["whole", "layer", "module", "leaf", "bytes:60", "random:4"]


@pytest.fixture(scope="module")
def params():
    shapes = {
        "embed": (6, 4),
        "layers": {"attn": {"q": (5, 4, 4)}, "mlp": {"up": (5, 4, 6), "bias": (5, 6)}},
        "scale": (),
    }
    return jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))


@pytest.fixture(scope="module")
def updates(params):
    """Conflicting gradients of K objectives."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(
        treedef,
        [jax.random.normal(k, (K, *x.shape)) for k, x in zip(keys, leaves, strict=True)],
    )


def compiled_update(tx, updates, params, state=None, **extra):
    """One update, compiled as users compile it."""
    state = tx.init(params) if state is None else state
    return jax.jit(tx.update)(updates, state, params, **extra)


def block_matrices(part, tree):
    """Per block the float64 matrix [K, n] of what belongs to it, and where it lies."""
    columns, where = [[] for _ in part.names], [[] for _ in part.names]
    for index, (x, numbers) in enumerate(zip(jax.tree.leaves(tree), part.labels, strict=True)):
        sections = np.asarray(x, np.float64).reshape(K, len(numbers), -1)
        for section, number in enumerate(numbers):
            columns[number].append(sections[:, section])
            where[number].append((index, section))
    return [np.concatenate(c, axis=1) for c in columns], where


def resolve_by_hand(part, tree, aggregate):
    """The definition: cut, concatenate, aggregate each block by itself, put back."""
    matrices, where = block_matrices(part, tree)
    leaves = jax.tree.leaves(tree)
    result = [
        np.zeros((len(n), x[0].size // len(n))) for x, n in zip(leaves, part.labels, strict=True)
    ]
    for number, (matrix, places) in enumerate(zip(matrices, where, strict=True)):
        resolved, offset = aggregate(number, matrix), 0
        for index, section in places:
            width = result[index].shape[1]
            result[index][section] = resolved[offset : offset + width]
            offset += width
    return [r.reshape(x.shape[1:]) for r, x in zip(result, leaves, strict=True)]


@pytest.mark.parametrize("rule", BLOCKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_block_is_what_the_method_gives_on_its_own(method, rule, params, updates):
    part = blocks.partition(rule, params, stacked=STACKED)
    tx = jaxmoo.resolve_conflicts(method, rule, stacked=STACKED, num_objectives=K)
    state = tx.init(params)
    resolved, new_state = jax.jit(tx.update)(updates, state, params)
    weights = np.asarray(new_state.weights, np.float64)
    grams = np.asarray(new_state.gram)

    def combine(number, matrix):
        np.testing.assert_allclose(grams[number], matrix @ matrix.T, rtol=1e-5, atol=1e-5)
        return weights[number] @ matrix

    expected = resolve_by_hand(part, updates, combine)
    for found, wanted in zip(jax.tree.leaves(resolved), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    key = jax.random.fold_in(state.key, 0)
    alone, _ = jax.jit(jaxmoo.aggregators.weigh_blocks, static_argnums=0)(
        jaxmoo.aggregators.get(method), new_state.gram, key=key
    )
    # Weights need not be unique, what they combine to is.
    for number, matrix in enumerate(block_matrices(part, updates)[0]):
        found, wanted = weights[number] @ matrix, np.asarray(alone[number], np.float64) @ matrix
        np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(matrix).max())


def test_one_block_is_the_whole_model_method(params, updates):
    flat = jnp.concatenate([x.reshape(K, -1) for x in jax.tree.leaves(updates)], axis=1)
    for method in ("mean", "mgda", "cagrad"):
        tx = jaxmoo.resolve_conflicts(method, "whole")
        resolved, _ = compiled_update(tx, updates, params)
        found = jnp.concatenate([x.ravel() for x in jax.tree.leaves(resolved)])
        np.testing.assert_allclose(found, jaxmoo.aggregate(method, flat), rtol=1e-4, atol=1e-5)


def test_the_mean_does_not_depend_on_the_blocks(params, updates):
    for rule in BLOCKS:
        tx = jaxmoo.resolve_conflicts("mean", rule, stacked=STACKED)
        resolved, _ = compiled_update(tx, updates, params)
        for found, x in zip(jax.tree.leaves(resolved), jax.tree.leaves(updates), strict=True):
            np.testing.assert_allclose(found, x.mean(0), atol=1e-6)


def test_blocks_may_have_different_methods(params, updates):
    tx = jaxmoo.resolve_conflicts(
        {r"layers": "mgda", ".*": "mean"}, "layer", stacked=STACKED, num_objectives=K
    )
    resolved, state = compiled_update(tx, updates, params)
    mgda = jaxmoo.resolve_conflicts("mgda", "layer", stacked=STACKED)
    only_mgda, _ = compiled_update(mgda, updates, params)
    np.testing.assert_allclose(resolved["embed"], updates["embed"].mean(0), atol=1e-6)
    for found, wanted in zip(
        jax.tree.leaves(resolved["layers"]), jax.tree.leaves(only_mgda["layers"]), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    names = blocks.partition("layer", params, stacked=STACKED).names
    outside = [i for i, name in enumerate(names) if not name.startswith("layers")]
    np.testing.assert_allclose(state.weights[np.array(outside)], 1 / K, rtol=1e-6)


@pytest.mark.parametrize("method", ["mgda", "cagrad", "mean"])
def test_match_norm_keeps_the_direction_and_takes_the_mean_gradients_length(
    method, params, updates
):
    plain = jaxmoo.resolve_conflicts(method, "layer", stacked=STACKED)
    matched = jaxmoo.resolve_conflicts(method, "layer", stacked=STACKED, match_norm=True)
    first, _ = compiled_update(plain, updates, params)
    second, state = compiled_update(matched, updates, params)
    part = blocks.partition("layer", params, stacked=STACKED)
    # The scalar's gradients differ in sign: for MGDA that block is stationary, and noise is not
    # blown up to a step.
    stationary = part.names.index("scale") if method == "mgda" else None
    if stationary is not None:
        assert state.update_norm[stationary] < 1e-2 * state.mean_norm[stationary]

    def lift(tree):
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (K, *x.shape)), tree)

    for number, (a, b, n) in enumerate(
        zip(
            block_matrices(part, lift(first))[0],
            block_matrices(part, lift(second))[0],
            state.mean_norm,
            strict=True,
        )
    ):
        if number == stationary:
            continue
        assert state.update_norm[number] == pytest.approx(float(n), rel=1e-4)
        cosine = a[0] @ b[0] / np.linalg.norm(a[0]) / np.linalg.norm(b[0])
        assert cosine == pytest.approx(1, abs=1e-5)
        assert np.linalg.norm(b[0]) == pytest.approx(float(n), rel=1e-4)


def test_preference_weights_the_mean(params, updates):
    tx = jaxmoo.resolve_conflicts("mean", "layer", stacked=STACKED, preference=[2, 1, 1])
    resolved, _ = compiled_update(tx, updates, params)
    expected = jnp.einsum("k,k...->...", jnp.array([0.5, 0.25, 0.25]), updates["embed"])
    np.testing.assert_allclose(resolved["embed"], expected, atol=1e-6)


def test_an_absent_objective_has_no_part(params, updates):
    tx = jaxmoo.resolve_conflicts("cagrad", "layer", stacked=STACKED, num_objectives=K)
    active = jnp.array([True, False, True])
    garbage = jax.tree.map(lambda x: x.at[1].set(1e3), updates)
    with_garbage, state = compiled_update(tx, garbage, params, active=active)
    two = jax.tree.map(lambda x: x[jnp.array([0, 2])], updates)
    tx2 = jaxmoo.resolve_conflicts("cagrad", "layer", stacked=STACKED)
    without, _ = compiled_update(tx2, two, params)
    assert np.all(state.weights[:, 1] == 0)
    for a, b in zip(jax.tree.leaves(with_garbage), jax.tree.leaves(without), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_non_finite_objective_is_left_out_of_its_block_and_counted(params, updates):
    poisoned = jax.tree.map(lambda x: x, updates)
    poisoned["embed"] = updates["embed"].at[1, 0, 0].set(jnp.nan)
    tx = jaxmoo.resolve_conflicts("mean", "layer", stacked=STACKED, num_objectives=K)
    resolved, state = compiled_update(tx, poisoned, params)
    np.testing.assert_allclose(
        resolved["embed"], (updates["embed"][0] + updates["embed"][2]) / 2, atol=1e-6
    )
    np.testing.assert_allclose(
        resolved["layers"]["mlp"]["up"], updates["layers"]["mlp"]["up"].mean(0), atol=1e-6
    )
    assert state.skipped.tolist() == [0, 1, 0]
    _, state = compiled_update(tx, poisoned, params, state)
    assert state.skipped.tolist() == [0, 2, 0]


def test_a_non_finite_objective_can_stop_the_program(params, updates):
    poisoned = {**updates, "embed": updates["embed"].at[1, 0, 0].set(jnp.inf)}
    tx = jaxmoo.resolve_conflicts("mean", "layer", stacked=STACKED, nonfinite="raise")
    with pytest.raises(Exception, match=r"Non-finite gradient of objective\(s\) \[1\]"):
        jax.block_until_ready(jax.jit(tx.update)(poisoned, tx.init(params), params))
        jax.effects_barrier()


@pytest.mark.parametrize("method", ["graddrop", "trimmed_mean"])
def test_coordinate_wise_rules_work_per_block(method, params, updates):
    tx = jaxmoo.resolve_conflicts(
        {"layers": method, ".*": "mean"}, "layer", stacked=STACKED, num_objectives=K
    )
    resolved, state = compiled_update(tx, updates, params)
    np.testing.assert_allclose(resolved["embed"], updates["embed"].mean(0), atol=1e-6)
    part = blocks.partition("layer", params, stacked=STACKED)
    lifted = jax.tree.map(lambda x: jnp.broadcast_to(x, (K, *x.shape)), resolved)
    for matrix, norm in zip(block_matrices(part, lifted)[0], state.update_norm, strict=True):
        assert np.linalg.norm(matrix[0]) == pytest.approx(float(norm), rel=1e-4)
    if method == "trimmed_mean":
        median = np.median(np.asarray(updates["layers"]["mlp"]["up"]), axis=0)
        np.testing.assert_allclose(resolved["layers"]["mlp"]["up"], median, atol=1e-6)
    # A coordinate of the result is a mean of gradients of one sign, or their median.
    found, given = np.asarray(resolved["layers"]["mlp"]["up"]), updates["layers"]["mlp"]["up"]
    assert np.all(found <= np.max(given, 0) + 1e-6) and np.all(found >= np.min(given, 0) - 1e-6)
    poisoned = jax.tree.map(lambda x: x.at[1].set(jnp.nan), updates)
    without, _ = compiled_update(tx, poisoned, params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(without))


def test_methods_of_two_batches_take_the_second_as_an_argument(params, updates):
    tx = jaxmoo.resolve_conflicts("modo", "layer", stacked=STACKED, num_objectives=K)
    second = jax.tree.map(lambda x: x + 0.1, updates)
    resolved, state = compiled_update(tx, updates, params, second=second)
    part = blocks.partition("layer", params, stacked=STACKED)
    cross = [
        a @ b.T
        for a, b in zip(
            block_matrices(part, updates)[0], block_matrices(part, second)[0], strict=True
        )
    ]
    expected, _ = jaxmoo.aggregators.weigh_blocks(
        jaxmoo.aggregators.get("modo"), jnp.asarray(np.stack(cross), jnp.float32)
    )
    np.testing.assert_allclose(state.weights, expected, atol=1e-5)
    np.testing.assert_allclose(
        resolved["embed"],
        jnp.einsum("k,k...->...", expected[part.names.index("embed")], updates["embed"]),
        atol=1e-5,
    )
    with pytest.raises(ConfigError, match="independent second batch"):
        tx.update(updates, tx.init(params), params)


def test_bfloat16_gradients_stay_bfloat16(params, updates):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), updates)
    tx = jaxmoo.resolve_conflicts("cagrad", "layer", stacked=STACKED)
    resolved, state = compiled_update(tx, low, params)
    exact, _ = compiled_update(tx, jax.tree.map(lambda x: x.astype(jnp.float32), low), params)
    for a, b in zip(jax.tree.leaves(resolved), jax.tree.leaves(exact), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-7, atol=2**-7)
    assert state.conflict.dtype == jnp.float32


def times(tree, factors):
    """A tree whose parts are multiplied by numbers."""
    scaled = {}
    for name, part in tree.items():
        factor = factors[name]
        scaled[name] = jax.tree.map(lambda x, c=factor: x * c, part)
    return scaled


def test_gradients_whose_squares_leave_float32s_range_are_resolved_as_any(params, updates):
    """Their products are formed of gradients scaled by a power of two, block by block."""
    methods = {"embed": "mgda", r"layers\.\d": "cagrad", "scale": "graddrop"}
    tx = jaxmoo.resolve_conflicts(methods, "layer", stacked=STACKED, num_objectives=K)
    update = jax.jit(tx.update)
    wanted, state = update(updates, tx.init(params), params)
    # Blocks of different ranges beside each other; below the smallest of them nothing is left.
    for factors in ({"embed": 1e20, "scale": 1e-20}, {"embed": 1e-20, "layers": 1e25}):
        size = {name: factors.get(name, 1.0) for name in updates}
        found, after = update(times(updates, size), tx.init(params), params)
        back = {name: 1 / c for name, c in size.items()}
        assert_trees_close(times(found, back), wanted, rtol=1e-4, atol=1e-5)
        by = np.array([back[name] for name in ("embed", *["layers"] * 5, "scale")])
        np.testing.assert_allclose(after.update_norm * by, state.update_norm, rtol=1e-4)
        np.testing.assert_allclose(after.mean_norm * by, state.mean_norm, rtol=1e-4)
        assert not after.skipped.any()


def test_a_published_scale_holds_for_gradients_of_any_size():
    """Of degree (1 - a) / (1 + a) in the gradients, here -1 / 3."""
    tx = jaxmoo.resolve_conflicts(
        jaxmoo.aggregators.fairgrad(alpha=2.0, scale="published"), "whole"
    )
    params = jnp.zeros(4)
    given = jnp.eye(2, 4) + 0.1
    update = jax.jit(tx.update)
    wanted, _ = update(given, tx.init(params), params)
    for size in (1e20, 1e-20):
        found, _ = update(given * size, tx.init(params), params)
        np.testing.assert_allclose(found * size ** (1 / 3), wanted, rtol=1e-4)


# --- As an optax transformation ----------------------------------------------------------------


def assert_trees_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def test_chain_gives_the_optimizer_the_resolved_gradient(params, updates):
    resolver = jaxmoo.resolve_conflicts("mgda", "layer", stacked=STACKED)
    resolved, _ = compiled_update(resolver, updates, params)
    adam = optax.adamw(1e-2)
    expected, _ = compiled_update(adam, resolved, params)
    both = optax.chain(resolver, optax.adamw(1e-2))
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
    def run(seed):
        tx = jaxmoo.resolve_conflicts(
            "pcgrad", "whole", stacked=STACKED, num_objectives=K, seed=seed
        )
        state, seen, update = tx.init(params), [], jax.jit(tx.update)
        for _ in range(8):
            _, state = update(updates, state, params)
            seen.append(tuple(np.asarray(state.weights[0]).round(5)))
        return seen

    assert run(0) == run(0)
    assert len(set(run(0))) > 1


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
    expected = jaxmoo.resolve_conflicts({"layers": "mgda", ".*": "mean"}, "layer", stacked=STACKED)
    wanted, _ = compiled_update(expected, updates, params)
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
    def resolver(c):
        return jaxmoo.resolve_conflicts(jaxmoo.aggregators.cagrad(c=c), "layer", stacked=STACKED)

    tx = resolver(c=lambda step: jnp.where(step == 0, 0.0, 0.9))
    state = tx.init(params)
    first, state = jax.jit(tx.update)(updates, state, params)
    assert_trees_close(first, jax.tree.map(lambda x: x.mean(0), updates), atol=1e-5)
    second, _ = jax.jit(tx.update)(updates, state, params)
    fixed = jaxmoo.resolve_conflicts(jaxmoo.aggregators.cagrad(c=0.9), "layer", stacked=STACKED)
    assert_trees_close(second, compiled_update(fixed, updates, params)[0], atol=1e-5)


def test_apply_if_finite_behind_it_sees_finite_updates(params, updates):
    tx = optax.chain(
        jaxmoo.resolve_conflicts("mean", "whole"), optax.apply_if_finite(optax.sgd(1.0), 2)
    )
    one_bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), updates)
    found, state = compiled_update(tx, one_bad, params)
    assert_trees_close(found, jax.tree.map(lambda x: -x[1:].mean(0), updates), atol=1e-5)
    assert int(optax.tree.get(state, "total_notfinite")) == 0
    # Where every objective is non-finite, nothing is left to resolve and the update is zero.
    all_bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), updates)
    found, _ = compiled_update(tx, all_bad, params, state)
    assert all(not np.any(x) for x in jax.tree.leaves(found))


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
    update = jax.jit(tx.update)
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
    resolver = optax.inject_hyperparams(jaxmoo.resolve_conflicts, static_args=("num_objectives",))
    tx = resolver(
        "mean",
        preference=lambda step: jnp.where(step == 0, jnp.array([1.0, 0, 0]), jnp.array([0, 1, 3])),
        num_objectives=K,
    )
    state, update = tx.init(params), jax.jit(tx.update)
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


# --- Bad input ---------------------------------------------------------------------------------


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


def test_conflict_share_counts_pairs_of_present_objectives():
    vectors = np.array([[1, 0], [-1, 0.1], [0, 0], [0, 1.0]])
    assert conflict_share(jnp.asarray(vectors @ vectors.T)) == pytest.approx(1 / 3)
    assert conflict_share(jnp.zeros((2, 2))) == 0
