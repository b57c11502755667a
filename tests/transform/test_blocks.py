"""resolve_conflicts: exact per block."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoo
from jaxmoo import blocks
from jaxmoo.errors import ConfigError
from jaxmoo.resolve import conflict_share
from transform.trees import (
    STACKED,
    K,
    assert_trees_close,
    block_matrices,
    compiled_update,
    replaced,
    resolver,
)

METHODS = ["mean", "sum", "mgda", "cagrad", "pcgrad"]
BLOCKS = ["whole", "layer", "module", "leaf", "bytes:60", "random:4"]


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


def dealt(part, methods):
    """The methods in turn, one for each block."""
    return {
        f"^({'|'.join(map(re.escape, part.names[i :: len(methods)]))})$": method
        for i, method in enumerate(methods[: len(part)])
    }


@functools.cache
def weigh(method):
    """Compiled ``(gram, key, block) -> weights``."""
    aggregator = jaxmoo.aggregators.get(method)
    return jax.jit(
        lambda gram, key, block: jaxmoo.aggregators.weigh_block(
            aggregator, gram, state=aggregator.init(K), key=key, block=block
        )[0]
    )


@pytest.mark.parametrize(
    ("rule", "methods"),
    [
        *(("whole", [method]) for method in METHODS),
        ("layer", METHODS),
        *(
            pytest.param(rule, ["mean", "sum", "pcgrad"], marks=pytest.mark.slow)
            for rule in BLOCKS[2:]
        ),
    ],
)
def test_every_block_is_what_the_method_gives_on_its_own(rule, methods, params, updates):
    """The methods are dealt out over the blocks."""
    part = blocks.partition(rule, params, stacked=STACKED)
    tx = resolver(methods[0] if len(part) == 1 else dealt(part, methods), rule)
    state = tx.init(params)
    resolved, new_state = compiled_update(tx, updates, params, state)
    weights = np.asarray(new_state.weights, np.float64)
    grams = np.asarray(new_state.gram)

    def combine(number, matrix):
        np.testing.assert_allclose(grams[number], matrix @ matrix.T, rtol=1e-5, atol=1e-5)
        return weights[number] @ matrix

    expected = resolve_by_hand(part, updates, combine)
    for found, wanted in zip(jax.tree.leaves(resolved), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    key = jax.random.fold_in(state.key, 0)
    # Weights need not be unique, what they combine to is.
    for number, matrix in enumerate(block_matrices(part, updates)[0]):
        alone = weigh(methods[number % len(methods)])(grams[number], key, number)
        found, wanted = weights[number] @ matrix, np.asarray(alone, np.float64) @ matrix
        np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(matrix).max())


def test_one_block_is_the_whole_model_method(params, updates):
    flat = np.concatenate([x.reshape(K, -1) for x in jax.tree.leaves(updates)], axis=1)
    methods = ("mean", "mgda", "cagrad")
    whole = jax.jit(lambda j: [jaxmoo.aggregate(method, j) for method in methods])(flat)
    for method, wanted in zip(methods, whole, strict=True):
        resolved, _ = compiled_update(resolver(method, "whole"), updates, params)
        found = np.concatenate([x.ravel() for x in jax.tree.leaves(resolved)])
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5, err_msg=method)


@pytest.mark.slow
def test_the_mean_does_not_depend_on_the_blocks(params, updates):
    rules = [jaxmoo.resolve_conflicts("mean", rule, stacked=STACKED) for rule in BLOCKS]

    @jax.jit
    def by_every_rule(updates):
        return [tx.update(updates, tx.init(params), params)[0] for tx in rules]

    for rule, resolved in zip(BLOCKS, by_every_rule(updates), strict=True):
        for found, x in zip(jax.tree.leaves(resolved), jax.tree.leaves(updates), strict=True):
            np.testing.assert_allclose(found, x.mean(0), atol=1e-6, err_msg=rule)


def test_blocks_may_have_different_methods(params, updates):
    tx = resolver({"layers": "mgda", ".*": "mean"})
    resolved, state = compiled_update(tx, updates, params)
    only_mgda, _ = compiled_update(resolver("mgda"), updates, params)
    np.testing.assert_allclose(resolved["embed"], updates["embed"].mean(0), atol=1e-6)
    for found, wanted in zip(
        jax.tree.leaves(resolved["layers"]), jax.tree.leaves(only_mgda["layers"]), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    names = blocks.partition("layer", params, stacked=STACKED).names
    outside = [i for i, name in enumerate(names) if not name.startswith("layers")]
    np.testing.assert_allclose(state.weights[np.array(outside)], 1 / K, rtol=1e-6)


@pytest.mark.slow
def test_match_norm_keeps_the_direction_and_takes_the_mean_gradients_length(params, updates):
    methods = {r"layers\.[01]|scale": "mgda", r"layers\.[23]|embed": "cagrad", ".*": "mean"}
    plain = jaxmoo.resolve_conflicts(methods, "layer", stacked=STACKED)
    matched = jaxmoo.resolve_conflicts(methods, "layer", stacked=STACKED, match_norm=True)
    first, _ = compiled_update(plain, updates, params)
    second, state = compiled_update(matched, updates, params)
    part = blocks.partition("layer", params, stacked=STACKED)
    # The scalar's gradients differ in sign: for MGDA that block is stationary, and noise is not
    # blown up to a step.
    stationary = part.names.index("scale")
    assert state.update_norm[stationary] < 1e-2 * state.mean_norm[stationary]

    def lift(tree):
        return jax.tree.map(lambda x: np.broadcast_to(x, (K, *x.shape)), tree)

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
    expected = np.einsum("k,k...->...", [0.5, 0.25, 0.25], updates["embed"])
    np.testing.assert_allclose(resolved["embed"], expected, atol=1e-6)


def test_an_absent_objective_has_no_part(params, updates):
    tx = jaxmoo.resolve_conflicts("cagrad", "layer", stacked=STACKED, num_objectives=K)
    active = jnp.array([True, False, True])
    garbage = jax.tree.map(lambda x: replaced(x, 1, 1e3), updates)
    with_garbage, state = compiled_update(tx, garbage, params, active=active)
    two = jax.tree.map(lambda x: x[[0, 2]], updates)
    tx2 = jaxmoo.resolve_conflicts("cagrad", "layer", stacked=STACKED)
    without, _ = compiled_update(tx2, two, params)
    assert np.all(state.weights[:, 1] == 0)
    for a, b in zip(jax.tree.leaves(with_garbage), jax.tree.leaves(without), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_of_an_expert_that_it_does_not_reach_an_objective_is_absent():
    """The solve is that without it; one alone has its own gradient, and elsewhere all are there."""
    rng = np.random.default_rng(0)
    experts, rest = rng.normal(size=(K, 5, 3, 2)), rng.normal(size=(K, 4))
    experts[1, :3], experts[:2, 3], experts[:, 4], rest[1] = 0, 0, 0, 0
    updates = {"mlp": {"experts": {"up": jnp.asarray(experts)}}, "norm": jnp.asarray(rest)}
    methods = {"experts.0": "mgda", "experts.1": "cagrad", "experts.2": "mean", ".*": "mean"}
    tx = jaxmoo.resolve_conflicts(methods, "expert", num_objectives=K)
    params = jax.tree.map(lambda x: x[0], updates)
    found, state = compiled_update(tx, updates, params, active=jnp.ones(K, bool))
    found = found["mlp"]["experts"]["up"]
    for number, method in enumerate(("mgda", "cagrad", "mean")):
        without = jaxmoo.aggregate(method, experts[[0, 2], number].reshape(2, -1))
        np.testing.assert_allclose(found[number].ravel(), without, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[3], experts[2, 3], rtol=1e-6)
    assert np.all(found[4] == 0) and np.all(np.isfinite(state.weights))
    np.testing.assert_array_equal(state.weights[:3, 1], 0)
    # In other blocks an objective without a gradient keeps its share.
    np.testing.assert_allclose(state.weights[-1], [1 / K, 0, 1 / K], rtol=1e-6)


def test_experts_are_blocks_where_there_are_any(params):
    with pytest.raises(ConfigError, match=r"'experts' of their path, found none .* layer blocks"):
        blocks.partition("expert", params, stacked=STACKED)


def test_a_non_finite_objective_is_left_out_of_its_block_and_counted(params, updates):
    poisoned = jax.tree.map(lambda x: x, updates)
    poisoned["embed"] = replaced(updates["embed"], (1, 0, 0), np.nan)
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
    poisoned = {**updates, "embed": replaced(updates["embed"], (1, 0, 0), np.inf)}
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
    lifted = jax.tree.map(lambda x: np.broadcast_to(x, (K, *x.shape)), resolved)
    for matrix, norm in zip(block_matrices(part, lifted)[0], state.update_norm, strict=True):
        assert np.linalg.norm(matrix[0]) == pytest.approx(float(norm), rel=1e-4)
    if method == "trimmed_mean":
        median = np.median(np.asarray(updates["layers"]["mlp"]["up"]), axis=0)
        np.testing.assert_allclose(resolved["layers"]["mlp"]["up"], median, atol=1e-6)
    # A coordinate of the result is a mean of gradients of one sign, or their median.
    found, given = np.asarray(resolved["layers"]["mlp"]["up"]), updates["layers"]["mlp"]["up"]
    assert np.all(found <= np.max(given, 0) + 1e-6) and np.all(found >= np.min(given, 0) - 1e-6)
    poisoned = jax.tree.map(lambda x: replaced(x, 1, np.nan), updates)
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
    modo = functools.partial(jaxmoo.aggregators.weigh_blocks, jaxmoo.aggregators.get("modo"))
    expected, _ = jax.jit(modo)(np.stack(cross).astype(np.float32))
    np.testing.assert_allclose(state.weights, expected, atol=1e-5)
    np.testing.assert_allclose(
        resolved["embed"],
        np.einsum("k,k...->...", expected[part.names.index("embed")], updates["embed"]),
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


@pytest.mark.slow
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


def test_a_method_that_fails_in_one_block_spoils_no_other():
    """Where the two gradients are orthogonal this one divides by zero."""
    method = jaxmoo.Aggregator("failing", lambda gram, active, preference, *_: (1 / gram[0], ()))
    gradients = {"orthogonal": jnp.eye(2), "equal": jnp.ones((2, 1))}
    tx = jaxmoo.resolve_conflicts(method, "leaf")
    found, _ = tx.update(gradients, tx.init(jax.tree.map(lambda x: x[0], gradients)))
    assert not np.isfinite(found["orthogonal"]).all()
    assert np.array_equal(found["equal"], [2.0])


def test_conflict_share_counts_pairs_of_present_objectives():
    vectors = np.array([[1, 0], [-1, 0.1], [0, 0], [0, 1.0]])
    assert conflict_share(jnp.asarray(vectors @ vectors.T)) == pytest.approx(1 / 3)
    assert conflict_share(jnp.zeros((2, 2))) == 0
