"""The directory of a run: whose it is, and what happens when what lies in it is damaged."""

from __future__ import annotations

import random
import sys

import pytest

from damage import damages
from jaxmoo.commands.train import main
from jaxmoo.config import load_config, to_yaml
from jaxmoo.errors import CheckpointError, ConfigError
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.runs.scores import LanguageScore


def test_the_home_directory_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDirectory("~/runs/one").path == tmp_path / "runs" / "one"


@pytest.mark.parametrize("name", [".bashrc", ".git", ".DS_Store"])
def test_a_directory_with_dot_files_alone_is_not_empty(write_config, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        RunDirectory(tmp_path / "run").check(load_config(write_config()))


UNWRITABLE = {
    "a file": "file",
    "below a file": "file/run",
    "no file system for files": "/proc/run",
}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc as Linux has it")
@pytest.mark.parametrize("where", UNWRITABLE)
def test_an_output_that_cannot_be_written_is_found_before_anything_is_read(
    write_config, tmp_path, capsys, where
):
    (tmp_path / "file").write_text("mine")
    output = tmp_path / UNWRITABLE[where]  # an absolute path stays what it is
    # There is no such model either, which would be found next.
    changes = [f"output={output}", "model.source=no/where/at/all"]
    assert main(["--config", str(write_config()), *changes]) == 2
    message = capsys.readouterr().err
    assert "output: " in message and str(output) in message
    assert (tmp_path / "file").read_text() == "mine"


def test_looking_whether_an_output_can_be_written_leaves_nothing_behind(write_config, tmp_path):
    run = RunDirectory(tmp_path / "some" / "where")
    run.check(load_config(write_config()))
    assert not (tmp_path / "some").exists()


def test_a_run_may_become_longer_until_its_learning_rate_falls(write_config, tmp_path):
    path = write_config(optimizer__decay="wsd", optimizer__decay_steps=3, train__steps=8)
    run, longer = RunDirectory(tmp_path / "run"), load_config(path, ["train.steps=20"])
    (run.checkpoints / "6").mkdir(parents=True)
    run.config.write_text(to_yaml(load_config(path)))
    run.check(longer)  # rates fall after step 6
    (run.checkpoints / "7").mkdir()
    with pytest.raises(ConfigError, match=r"train.steps: 8 -> 20\n") as error:
        run.check(longer)
    assert "model.source=OUTPUT/export; or delete its checkpoints after step 6" in str(error.value)


def test_of_200_damages_to_results_and_scores_none_is_a_traceback(tmp_path):
    run = RunDirectory(tmp_path)
    run.store_scores(3, {"ja": LanguageScore(2.5, 1.0, 10, 30, 2)})
    after = {"ja": LanguageScore(2.5, 1.0, 10, 30, 2).to_dict()}
    run.write_results({"steps": 3, "after": after, "exported": {"export": "base"}})
    chance, refused = random.Random(0), 0
    others = [[], 3, None, {"ja": []}, {"ja": {"nll": "2"}}]
    scores = next(run.evaluation.iterdir())
    for file, read in ((scores, lambda: run.scores(3)), (run.results, lambda: run.exported(3))):
        good = file.read_bytes()
        for content in damages(good, chance, lambda: chance.choice(others)):
            file.write_bytes(content)
            try:
                read()
            except CheckpointError as error:
                refused += 1
                assert str(file) in str(error) and "Remove it" in str(error)
        file.write_bytes(good)
    assert refused > 120
    (tmp_path / "results.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"results\.json cannot be read"):
        run.exported_step()


def test_what_was_exported_is_that_of_one_step_and_of_older_runs_taken_as_it_is(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.exported(3) == {}
    run.write_results({"steps": 3, "exported": {"export": "quantized"}})
    assert (run.exported(3), run.exported(2)) == ({"export": "quantized"}, {})
    run.write_results({"steps": 3})
    assert run.exported(3) == {"export": None, "adapter": None}
