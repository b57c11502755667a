"""Faults found in other implementations, one test each."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aggregators import families, oracles
from aggregators.families import STACK
from jaxmoo import aggregators
from jaxmoo.aggregators import aggregate

J = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
GRAM_BASED = [n for n in aggregators.names() if n not in ("graddrop", "trimmed_mean", "constant")]
THREE = np.array([[1.0, 2.0, -1.0, 0.0], [-2.0, 1.0, 0.5, 1.0], [0.5, -1.5, 2.0, -1.0]])


def resolve(name: str | aggregators.Aggregator, *matrices: np.ndarray) -> list[np.ndarray]:
    return families.resolve_each(name, list(matrices))


@pytest.mark.parametrize("name", ["cagrad", "upgrad"])
def test_1_small_gradients_are_not_gated(name):
    """A gate at a squared norm of 1e-4 returns zero or the mean for gradients times 1e-3."""
    small, full = resolve(name, J * 1e-3, J)
    np.testing.assert_allclose(small, full * 1e-3, rtol=1e-4)


def test_2_imbalance_does_not_turn_the_update_against_the_weak():
    """A ridge on G makes UPGrad oppose the weak objective, with a cosine of -0.72."""
    imbalanced = np.array([[-4.0, 1.0, 1.0], [600.0, 100.0, 100.0]])
    for name in ("upgrad", "dualproj"):
        (d,) = resolve(name, imbalanced)
        weak = imbalanced[0]
        assert weak @ d >= -1e-5 * np.linalg.norm(weak) * np.linalg.norm(d)
        exact = {"upgrad": oracles.upgrad, "dualproj": oracles.dualproj}[name](imbalanced)
        np.testing.assert_allclose(d, exact, rtol=1e-4)


def test_3_mgda_is_exact_when_norms_differ():
    """100 Frank-Wolfe steps leave errors of 0.76 in the weights, and conflicts."""
    rng = np.random.default_rng(0)
    scales = np.array([1.0, 1.0, 30.0, 100.0])[:, None]
    stack = (scales * rng.standard_normal((200, 4, 10))).astype(np.float32).astype(np.float64)
    at_once = len(STACK)
    batches = [stack[i : i + at_once] for i in range(0, len(stack), at_once)]
    d = np.concatenate([resolve("mgda", *batch) for batch in batches])
    # The weights of independent rows.
    weights = np.stack([np.linalg.lstsq(j.T, x)[0] for j, x in zip(stack, d, strict=True)])
    exact = np.stack([oracles.min_norm(j) for j in stack])
    np.testing.assert_allclose(weights, exact, atol=1e-4)
    products = np.einsum("mkn,mn->mk", stack, d) / np.linalg.norm(stack, axis=2)
    assert (products.min(1) >= -1e-5 * np.linalg.norm(stack[:, 0], axis=1)).all()


def test_4_pcgrad_draws_an_order_per_gradient_and_skips_itself():
    """Some project gradients on themselves, never shuffle, or share one order."""
    gram = aggregators.gram(jnp.asarray(THREE, jnp.float32))
    draw = jax.jit(
        jax.vmap(lambda k: aggregators.weigh_block(aggregators.pcgrad(), gram, key=k)[0])
    )
    weights = np.asarray(draw(jax.random.split(jax.random.key(0), 300)), np.float64)
    found = np.unique(np.round(weights @ THREE, 4), axis=0)
    orders = list(itertools.permutations(range(3)))
    separate = [oracles.pcgrad(THREE, t) for t in itertools.product(orders, repeat=3)]
    shared = [oracles.pcgrad(THREE, [order] * 3) for order in orders]
    assert len(found) == len(np.unique(np.round(separate, 4), axis=0))
    assert len(found) > len(np.unique(np.round(shared, 4), axis=0))


def single(row: np.ndarray) -> np.ndarray:
    """Batches of one gradient, in the shape the compiled path of the families takes."""
    stack = np.zeros_like(STACK)
    stack[:, 0, : len(row)] = row
    return stack


def test_5_only_one_scale_of_cagrad_returns_a_single_gradient():
    row = np.array([3.0, 4.0])
    _, updates = families.resolve("cagrad", single(row))
    np.testing.assert_allclose(updates[0, :2], row, rtol=1e-6)
    published = aggregators.cagrad(0.5, rescale="none")
    np.testing.assert_allclose(aggregate(published, jnp.asarray(row[None])), 1.5 * row)


@pytest.mark.parametrize("name", ["mgda", "cagrad"])
def test_6_a_zero_row_is_masked_and_the_rest_renormalised(name):
    """MGDA and CAGrad return 0 there, others shrink by 2/3."""
    padded = np.vstack([J, np.zeros(3)])
    with_zeros, without = resolve(name, padded, J)
    np.testing.assert_allclose(with_zeros, without, rtol=1e-5, atol=1e-5)
    # And beside no padding at all.
    alone = jax.jit(lambda j: aggregate(name, j))(jnp.asarray(J, jnp.float32))
    np.testing.assert_allclose(without, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GRAM_BASED)
def test_7_an_all_zero_block_gives_zeros(name):
    """UPGrad gives NaN there, Nash-MTL an error."""
    _, updates = families.resolve(name, np.zeros_like(STACK))
    np.testing.assert_array_equal(updates, 0)


@pytest.mark.parametrize("name", GRAM_BASED)
def test_8_a_single_objective_is_the_identity(name):
    row = np.array([3.0, 4.0, -1.0])
    _, updates = families.resolve(name, single(row))
    np.testing.assert_array_equal(updates[:, :3], np.tile(row, (len(updates), 1)))


@pytest.mark.parametrize("name", ["nash_mtl", "fairgrad"])
def test_9_a_blocks_norm_follows_its_gradients(name):
    """Published, every block would get the same norm whatever its gradients."""
    published = {
        "nash_mtl": "nash_mtl published",
        "fairgrad": aggregators.fairgrad(1.0, scale="published"),
    }[name]
    norm, larger = (np.linalg.norm(d) for d in resolve(published, THREE, 10 * THREE))
    assert norm == pytest.approx(larger, rel=1e-4)
    ours = [np.linalg.norm(d) for d in resolve(name, THREE, 10 * THREE)]
    mean = np.linalg.norm(THREE.mean(0))
    assert ours == pytest.approx([mean, 10 * mean], rel=1e-4)


def test_10_imtl_g_does_not_explode():
    """Where the sum of the published weights passes through zero."""
    rng = np.random.default_rng(0)

    def exact(j):
        w = np.linalg.solve(j @ j.T, np.linalg.norm(j, axis=1))
        return w.sum() / np.abs(w).sum()

    candidates = rng.standard_normal((2000, 3, 4)) * np.exp(rng.standard_normal((2000, 3, 1)))
    j = min(candidates, key=lambda j: abs(exact(j)))
    assert abs(exact(j)) < 2e-3  # the published update is hundreds of times too long
    (d,) = resolve("imtl_g", j)
    weights = np.linalg.lstsq(j.T, d)[0]
    assert np.abs(weights).sum() <= 10 * (1 + 1e-4)
    assert (j @ d).min() > 0


def test_11_one_nan_row_does_not_poison_the_others():
    poisoned = np.vstack([J, np.full(3, np.nan)])
    for name in ("mean", "mgda", "upgrad"):
        found, expected = resolve(name, poisoned, J)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    found = aggregate("trimmed_mean", jnp.asarray(poisoned, jnp.float32))
    np.testing.assert_allclose(found, J.mean(0), rtol=1e-5, atol=1e-5)


def test_12_state_survives_saving_and_restoring(tmp_path):
    """As arrays on disk, and then the same steps follow."""
    method = aggregators.gradvac()
    grams = jnp.asarray(np.stack([THREE @ THREE.T, 2 * THREE @ THREE.T]), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4)
    state = None
    for key in keys[:2]:
        _, state = aggregators.weigh_blocks(method, grams, state=state, key=key)
    leaves, structure = jax.tree.flatten(state)
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz") as saved:
        restored = jax.tree.unflatten(structure, [saved[name] for name in saved.files])
    for key in keys[2:]:
        weights, state = aggregators.weigh_blocks(method, grams, state=state, key=key)
        again, restored = aggregators.weigh_blocks(method, grams, state=restored, key=key)
        np.testing.assert_array_equal(weights, again)
