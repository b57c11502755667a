"""A run that gets no better ends early and gives back its best state."""

from __future__ import annotations

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from jaxmoo.config import load_config
from jaxmoo.errors import ConfigError
from jaxmoo.runs.checkpoint import STATE
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.train import read_metrics, train

LANGUAGES = {"it", "pt"}


@pytest.mark.slow
def test_it_ends_early_exports_the_best_state_and_can_be_repeated(write_config):
    path = write_config(
        report=False,
        tensorboard=False,
        data__seen=sorted(LANGUAGES),
        data__unseen=[],
        train__steps=40,
        train__evaluate_every=1,
        train__checkpoint_every=0,
        train__keep_checkpoints=1,
        train__patience=2,
        train__select="best",
        train__profile_from=2,
        train__profile_steps=1,
        train__peak_tflops=0.1,
        # Steps so large that the second or third one already leads away.
        optimizer__learning_rate=0.3,
        optimizer__decay="constant",
        optimizer__name="muon",
        optimizer__ema=0.2,
    )
    config = load_config(path)
    said: list[str] = []
    results = train(config, said.append)
    run = RunDirectory(config.output)

    scores = {s: run.scores(s) for s in range(1, 41) if run.scores(s) is not None}
    means = {s: np.mean([scores[s][code].nll for code in LANGUAGES]) for s in scores}
    best, last = min(means, key=means.get), max(means)
    assert last == best + 2 < 40
    assert any(f"Ended after step {last} of 40" in line for line in said)
    assert results["steps"] == best == json.loads(run.results.read_text())["steps"]
    assert results["after"] == {code: score.to_dict() for code, score in scores[best].items()}
    assert run.steps() == [best, last]

    # The exported weights are the average, not what the last update made.
    exported = load_file(run.export / "model.safetensors")["model.layers.3.mlp.up_proj.weight"]
    with ocp.PyTreeCheckpointer() as checkpointer:
        state = checkpointer.restore((run.checkpoints / str(best) / STATE).absolute())
    average, updated = (
        jax.tree.leaves(state[part]["layers"]["2"]["mlp"]["up_proj"]["kernel"])[0][1].T
        for part in ("ema", "params")
    )
    np.testing.assert_array_equal(exported, average)
    assert np.abs(exported - updated).max() > 1e-3

    before = (run.export / "model.safetensors").stat().st_mtime_ns
    assert train(config, said.append) == results
    assert (run.export / "model.safetensors").stat().st_mtime_ns == before

    rows = [row for row in read_metrics(run.metrics) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, last + 1))
    for row in rows[1:]:
        assert 0 < row["mfu"] < 1 and 0 < row["goodput"] < 1
        assert {"data", "evaluate"} <= set(row["seconds"])
    for row in rows:
        assert set(row["language_norm"]) == set(row["language_conflict"]) == LANGUAGES
        gram_share = np.mean(list(row["language_conflict"].values()))
        assert gram_share == pytest.approx(row["conflict_share"], abs=1e-6)
    assert list(run.profile.rglob("*.xplane.pb"))


@pytest.mark.parametrize("change", [{"train__patience": 2}, {"train__select": "best"}])
def test_choosing_by_evaluations_needs_evaluations(write_config, change):
    with pytest.raises(ConfigError, match=r"set train.evaluate_every"):
        load_config(write_config(**change))
