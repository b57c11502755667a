"""Joint against single runs: what is compared, and what cannot be."""

import json
import shutil

import pytest
import yaml

from jaxmoo.analysis.interference import interference
from jaxmoo.errors import ConfigError, DataError


@pytest.fixture
def single(finished_run, tmp_path):
    """Make what a run on one language leaves, with changes."""

    def make(language, nll=1.5, changes=None, scores=None):
        path = tmp_path / f"{language}{len(list(tmp_path.iterdir()))}"
        path.mkdir()
        config = yaml.safe_load((finished_run / "config.yaml").read_text())
        config["data"] |= {"seen": [language], "unseen": []}
        config["resolve"]["aggregator"] = "mean"
        for section, values in (changes or {}).items():
            config[section] |= values
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        stored = json.loads((finished_run / "results.json").read_text())
        before, after = (dict(stored[when][language]) for when in ("before", "after"))
        before |= scores or {}
        after["nll"] = nll
        results = {"before": {language: before}, "after": {language: after}}
        (path / "results.json").write_text(json.dumps(results))
        return path

    return make


def test_interference_is_joint_minus_single(finished_run, single):
    results = json.loads((finished_run / "results.json").read_text())
    found = interference(finished_run, [single("it", nll=1.5), single("en", nll=9.0)])
    assert list(found) == ["en", "it"]  # as the joint run orders them
    joint = results["after"]["it"]["nll"]
    assert found["it"].value == pytest.approx(joint - 1.5)
    assert found["it"].base == results["before"]["it"]["nll"]
    assert found["en"].value < 0 < found["it"].value


def test_runs_that_cannot_be_compared(finished_run, single, tmp_path):
    def refuse(error, match, *paths):
        with pytest.raises(error, match=match):
            interference(finished_run, paths)

    refuse(ConfigError, "trained on de; expected exactly one", single("de"))
    refuse(ConfigError, "two runs on en", single("en"), single("en"))
    refuse(ConfigError, r"train\.steps: 3 -> 30", single("en", changes={"train": {"steps": 30}}))
    rate = single("en", changes={"optimizer": {"learning_rate": 1.0}})
    refuse(ConfigError, r"optimizer\.learning_rate: 0\.001 -> 1\.0", rate)
    refuse(DataError, "different examples of en: 1 replies", single("en", scores={"bytes": 7}))
    refuse(DataError, "different examples of en", single("en", scores={"nll": 7.0}))
    unfinished = single("en")
    (unfinished / "results.json").unlink()
    refuse(ConfigError, "not complete", unfinished)
    (unfinished / "results.json").write_text("{}")
    refuse(DataError, "cannot be read", unfinished)
    shutil.rmtree(unfinished)
    refuse(ConfigError, "not the output of a training run", unfinished)
