"""Microbatches that are resolved one by one; accumulating first is exact, see test_exact.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoo
from engine.toy import (
    ROWS,
    Toy,
    assert_same,
    batches,
    flatten,
    run_engine,
    run_oracle,
    weight,
)
from jaxmoo.engine import block, resolved_value_and_grad

K, PARTS, TOY = 4, 2, Toy()
METHODS = {"layers": "pcgrad", ".*": "moco"}


@pytest.fixture(scope="module")
def batch():
    """Objective 1 has target tokens in the second half only, objective 2 has none."""
    (batch,) = batches(K)
    mask = batch["mask"].at[1, : ROWS // PARTS].set(False).at[2].set(False)
    tokens = mask.reshape(K, PARTS, -1).sum(-1)
    assert (tokens[:, 0] != tokens[:, 1]).sum() == 3
    return batch | {"mask": mask}


def resolved_each(batch):
    """Every part as a step of its own, with keys from the step's key, and the mean of all.

    A part's gradients are sums over the step's tokens per part.
    """
    tx = jaxmoo.resolve_conflicts(METHODS, stacked=TOY.stacked, num_objectives=K)
    state = tx.init(TOY.params)
    # The transformation folds its step number into its key, as the engine does with parts.
    state = state._replace(key=jax.random.fold_in(state.key, 0))
    update, results = jax.jit(tx.update), []

    def weights(batch):
        return np.asarray(jax.vmap(weight)(batch))

    count = weights(batch)
    for part in range(PARTS):
        rows = slice(part * ROWS // PARTS, (part + 1) * ROWS // PARTS)
        some = jax.tree.map(lambda x, rows=rows: x[:, rows], batch)
        losses, gradients = jax.device_get(TOY.gradients(TOY.params, some))
        share = PARTS * weights(some) / np.maximum(count, 1)
        losses, gradients = jax.tree.map(
            lambda x, share=share: x * share.reshape(K, *(1,) * (x.ndim - 1)), (losses, gradients)
        )
        updates, state = update(gradients, state, active=count > 0)
        results.append((losses, *jax.device_get((updates, state._replace(key=None)))))
    losses, updates, states = zip(*results, strict=True)  # what follows is NumPy's
    losses, mean = jax.tree.map(lambda *x: sum(x) / PARTS, *zip(losses, updates, strict=True))
    report = {
        name: sum(getattr(s, name) for s in states) / PARTS
        for name in ("gram", "weights", "update_norm", "mean_norm")
    }
    return losses, mean, state, report


def test_each_part_is_resolved_and_the_results_averaged(batch):
    found = run_engine(TOY, [batch], aggregator=METHODS, microbatches=PARTS)
    losses, updates, state, report = resolved_each(batch)
    expected = flatten([(losses, updates)], state._replace(**report))
    # What the state says of itself: one step was made, from the first key.
    for name in ("state.step", "state.key", "state.conflict"):
        expected[name] = found[name]
    assert_same(found, expected)
    assert found["state.step"] == 1
    assert found["step.0.0"][2] == 0


@pytest.mark.slow
def test_without_a_method_parts_of_unequal_token_counts_are_one_batch(batch):
    options = {"aggregator": {"layers": "mean", ".*": "sum"}, "preference": [1, 2, 3, 4]}
    found = run_engine(TOY, [batch], microbatches=4, **options)
    wanted = run_oracle(TOY, [batch], **options)
    assert_same(*({n: x for n, x in r.items() if n.startswith("step")} for r in (found, wanted)))


def test_parts_of_bfloat16_parameters_are_added_up_in_float32():
    """One rounding, at the end; adding up in bfloat16 makes one per part."""
    x = np.random.default_rng(0).uniform(0.5, 1, (1, 32, 500))
    x = jnp.asarray(x, jnp.bfloat16)
    gradients = resolved_value_and_grad(
        lambda w, x: block(lambda w, x: (w * x).sum())(w, x).astype(jnp.float32),
        jnp.ones(500, jnp.bfloat16),
        num_objectives=1,
        aggregator="mean",
        microbatches=32,
    )
    _, update, _ = jax.jit(gradients)(jnp.ones(500, jnp.bfloat16), x, gradients.init())
    exact = np.asarray(x, np.float64).mean((0, 1))
    assert update.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(update, np.float64), exact, rtol=2**-8)
