"""Microbatches that are resolved one by one; accumulating first is exact, see test_exact.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoo
from engine.toy import ROWS, Toy, assert_same, batches, flatten, quick_jit, run_engine, weight

K, PARTS, TOY = 4, 2, Toy()
METHODS = {"layers": "pcgrad", ".*": "moco"}


@pytest.fixture(scope="module")
def batch():
    """Objective 1 has target tokens in the second half only, objective 2 has none."""
    (batch,) = batches(K)
    mask = batch["mask"].at[1, : ROWS // PARTS].set(False).at[2].set(False)
    return batch | {"mask": mask}


def resolved_each(batch):
    """Every part as a step of its own, with keys from the step's key, and the mean of all."""
    tx = jaxmoo.resolve_conflicts(METHODS, stacked=TOY.stacked, num_objectives=K)
    state = tx.init(TOY.params)
    # The transformation folds its step number into its key, as the engine does with parts.
    state = state._replace(key=jax.random.fold_in(state.key, 0))
    update, results = quick_jit(tx.update), []
    for part in range(PARTS):
        rows = slice(part * ROWS // PARTS, (part + 1) * ROWS // PARTS)
        some = jax.tree.map(lambda x, rows=rows: x[:, rows], batch)
        losses, gradients = TOY.gradients(TOY.params, some)
        active = jax.vmap(weight)(some) > 0
        updates, state = update(gradients, state, active=active)
        results.append((losses, active, updates, state))
    losses, active, updates, states = zip(*results, strict=True)
    mean = jax.tree.map(lambda *x: sum(x) / PARTS, *updates)
    report = {
        name: sum(getattr(s, name) for s in states) / PARTS
        for name in ("gram", "weights", "update_norm", "mean_norm")
    }
    return sum(losses) / jnp.maximum(sum(active), 1), mean, state, report


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


def test_parts_with_unequal_numbers_of_tokens_are_not_averaged_as_equals(batch):
    """What makes ``accumulate_first`` exact: gradients are weighted by tokens, not by parts."""
    (whole,) = batches(K)
    tokens = whole["mask"].reshape(K, 4, -1).sum(-1)
    assert np.all(tokens.max(1) > tokens.min(1))
