"""The directory of a run, its rows and its checkpoints in a bucket."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from bucket_servers import upload
from jaxmoo.config import load_config
from jaxmoo.errors import CheckpointError, ConfigError, DamagedError
from jaxmoo.files.at_hand import copy_file
from jaxmoo.files.digests import DIGESTS
from jaxmoo.hf.directory import new_directory
from jaxmoo.runs.bucket_checkpoints import open_checkpoints
from jaxmoo.runs.checkpoint import STATE as STATE_PART
from jaxmoo.runs.checkpoint import UnsavedError, read_about, read_item
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.train.metrics import MetricsWriter, read_metrics

STATE = {"a": jnp.arange(6.0), "b": {"c": jnp.ones((2, 3), jnp.bfloat16)}}


def save(directory, *steps, keep=2, scores=None):
    with open_checkpoints(directory, keep=keep) as checkpoints:
        for step in steps:
            if scores:
                checkpoints.score(step, scores[step])
            state = {"a": STATE["a"] + step, "b": STATE["b"]}
            checkpoints.save(step, state, {"step": step, "digests": True})
        return checkpoints.latest()


def restored(directory, step):
    with open_checkpoints(directory, keep=2) as checkpoints:
        return checkpoints.about(step), checkpoints.restore(step, STATE)


@pytest.fixture
def run(s3_bucket):
    return RunDirectory(s3_bucket / "run")


def test_two_runs_do_not_share_a_bucket(run, monkeypatch):
    monkeypatch.setattr("jaxmoo.runs.directory._PATIENCE", 0.2)
    config = load_config("quickstart", [f"output={run.path}"])
    with run.claim(config):
        assert run.config.is_file()
        with (
            pytest.raises(ConfigError, match=r"another run is at work in s3://.*/run"),
            RunDirectory(run.path).claim(config),
        ):
            pass
    with RunDirectory(run.path).claim(config):
        pass
    with (
        pytest.raises(ConfigError, match=r"holds a run with other settings:\n  seed"),
        RunDirectory(run.path).claim(load_config("quickstart", [f"output={run.path}", "seed=3"])),
    ):
        pass
    assert sorted(p.name for p in run.path.iterdir()) == ["config.yaml"]


def test_processes_that_look_whether_they_may_write_are_in_nobodys_way():
    run = RunDirectory("memory://probed/run")
    (run.path / ".probe-0").write_bytes(b"")
    run.check(load_config("quickstart", [f"output={run.path}"]))
    (run.path / "notes.txt").write_bytes(b"")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        run.check(load_config("quickstart", [f"output={run.path}"]))


def test_a_full_scratch_disk_ends_the_run(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    run = RunDirectory("memory://full/run")
    monkeypatch.setattr("jaxmoo.runs.checkpoint.write_digests", full)
    with (
        pytest.raises(UnsavedError, match="No space left"),
        open_checkpoints(run, keep=2) as checkpoints,
    ):
        checkpoints.save(1, STATE)
        checkpoints.wait()
    assert run.steps() == []


def test_checkpoints_are_kept_found_and_restored(run):
    assert save(run, 1, 2, 3, 4, scores={1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}) == 4
    assert run.steps() == [2, 3, 4]  # the two newest, and the best
    about, state = restored(run, 4)
    assert about["step"] == 4 and read_about(run.checkpoints, 3)["step"] == 3
    np.testing.assert_array_equal(state["a"], STATE["a"] + 4)
    assert state["b"]["c"].dtype == jnp.bfloat16
    assert not list(run.scratch.glob("checkpoints-*"))


def test_of_what_is_said_of_a_checkpoint_the_state_is_not_fetched(run, monkeypatch):
    def noted(source, target):
        fetched.append(source.relative_to(run.checkpoints / "1").parts[0])
        copy_file(source, target)

    fetched: list[str] = []
    save(run, 1)
    monkeypatch.setattr("jaxmoo.files.scratch.copy_file", noted)
    assert read_about(run.checkpoints, 1)["step"] == 1
    assert {"about", DIGESTS} <= set(fetched) and STATE_PART not in fetched


def test_what_a_killed_run_began_to_send_is_no_checkpoint(run):
    save(run, 1, 2)
    (run.checkpoints / "2" / DIGESTS).unlink()
    (run.checkpoints / "7/state/d/x").write_bytes(b"half")
    assert run.steps() == [1]
    assert save(run, 3) == 3
    assert run.steps() == [1, 3] and not (run.checkpoints / "7").exists()


def test_damage_in_a_bucket_is_found_and_the_one_before_is_used(run):
    save(run, 1, 2)
    file = next(p for p in (run.checkpoints / "2/state").rglob("*") if p.stat().st_size > 64)
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=rf"{run.checkpoints}/2 .*is not what was written"):
        read_item(run.checkpoints, 2, STATE_PART, lambda place: None)
    with open_checkpoints(run, keep=2) as checkpoints:
        with pytest.raises(DamagedError, match=rf"{run.checkpoints}/2 .*is not what was written"):
            checkpoints.restore(checkpoints.latest(), STATE)
        assert checkpoints.before(2) == 1
        np.testing.assert_array_equal(checkpoints.restore(1, STATE)["a"], STATE["a"] + 1)
        [(number, place)] = checkpoints.set_aside([2]).items()
        assert number == 2 and (place / file.relative_to(run.checkpoints / "2")).is_file()
        assert checkpoints.latest() == 1
    assert run.steps() == [1]


def test_a_bucket_that_takes_nothing_more_loses_nothing(faulty):
    proxy, bucket = faulty
    run = RunDirectory(bucket / "run")
    save(run, 1)
    try:
        proxy.spoil = lambda asked: "denied" if asked.startswith("PUT") else None
        with pytest.raises(
            UnsavedError,
            match=r"could not be sent to s3://.*access denied[^\n]*\n.*step 1 is whole",
        ):
            save(run, 2)
    finally:
        proxy.spoil = lambda _: None
    assert run.steps() == [1] and save(run, 2) == 2 and run.steps() == [1, 2]


def test_rows_of_metrics_are_there_before_a_checkpoint_is(run):
    with MetricsWriter(run.path) as metrics:
        metrics.write({"step": 1})
        assert not run.metrics.exists()
        save(run, 1)
        assert [row["step"] for row in read_metrics(run.path)] == [1]
        metrics.write({"step": 2})
    assert [row["step"] for row in read_metrics(run.path)] == [1, 2]
    with MetricsWriter(run.path, resume_step=1) as metrics:
        metrics.write({"step": 2, "loss": {"en": 1.0}})
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2, "loss": {"en": 1.0}},
    ]


def test_an_export_that_was_not_finished_is_made_anew(run, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"other")
    with pytest.raises(ZeroDivisionError), new_directory(run.export) as directory:
        upload(tmp_path, directory)
        raise ZeroDivisionError
    assert (run.export / "a.bin").exists()
    with new_directory(run.export) as directory:
        (directory / "b.bin").write_bytes(b"b")
    assert sorted(p.name for p in run.export.iterdir()) == ["b.bin", DIGESTS]
    with (
        pytest.raises(CheckpointError, match="is not an empty directory"),
        new_directory(run.export),
    ):
        pass
