"""From a run to a report, as the command makes it; and what it refuses before any work."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from browser import look_at, needs_chromium
from devices import run_together
from jaxmoo.analysis import representations, stationarity
from jaxmoo.commands.analyze import main
from jaxmoo.runs.gram_log import read_grams

FIGURES = {
    "conflict_steps", "conflict_languages", "conflict_layers", "conflict_modules",
    "stationarity", "cosines", "cosines_modules", "neurons", "neurons_layers", "separability",
    "interference",
}  # fmt: skip


@pytest.fixture(scope="module")
def report(finished_run, sentences, tmp_path_factory) -> Path:
    """All measures of the run."""
    directory = tmp_path_factory.mktemp("analysis")
    single = directory / "single"
    single.mkdir()
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    config["data"] |= {"seen": ["en"], "unseen": []}
    (single / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(finished_run / "results.json", single)
    out = directory / "out"
    code = main(
        [
            str(finished_run), "--output", str(out), "--parallel", sentences, "--steps", "3",
            "--sentences", "24", "--samples", "20", "--examples", "4", "--single", str(single),
        ]
    )  # fmt: skip
    assert code == 0
    return out


@pytest.fixture(scope="module")
def numbers(report) -> dict:
    return json.loads((report / "analysis.json").read_text())


@pytest.mark.slow
def test_everything_is_written(report):
    assert {p.stem for p in report.glob("*.png")} == FIGURES
    assert sorted(p.name for p in report.iterdir() if p.suffix != ".png") == [
        "analysis.json",
        "index.html",
    ]


def test_a_run_records_its_gram_matrices(finished_run):
    log = read_grams(finished_run / "grams")
    assert log.steps == (1, 2, 3)  # every second, the first and the last
    assert log.languages == ("en", "es", "it") and len(log.blocks) == 8
    rows = [json.loads(x) for x in (finished_run / "metrics.jsonl").read_text().splitlines()]
    norms = np.sqrt(np.diagonal(log.grams, axis1=2, axis2=3))
    cosines = (log.grams / norms[..., :, None] / norms[..., None, :]).mean(1)
    for row, cosine in zip([r for r in rows if "cosine" in r], cosines, strict=True):
        np.testing.assert_allclose(row["cosine"], cosine, atol=1e-5)


@pytest.mark.slow
def test_conflict_is_that_of_the_records(numbers, finished_run):
    log, found = read_grams(finished_run / "grams"), numbers["conflict"]
    assert found["blocks"] == list(log.blocks) and found["steps"] == [1, 2, 3]
    pairs = log.grams[:, :, [0, 0, 1], [1, 2, 2]]
    np.testing.assert_allclose(found["conflict_share"], (pairs < 0).mean(-1), atol=1e-5)
    assert found["cosine_by_layers"]["names"] == ["layers.1", "layers.2"]
    assert set(found["cosine_by_modules"]["names"]) >= {"mlp", "self_attn"}


@pytest.mark.slow
def test_models_are_measured_side_by_side(numbers):
    models = numbers["stationarity"]["models"]
    assert list(models) == ["base", "step 3"]
    assert {"whole", "layers.1", "layers.2", "layers.1.mlp"} <= set(models["base"]["blocks"])
    assert models["base"]["blocks"]["whole"] != models["step 3"]["blocks"]["whole"]
    assert np.mean(models["step 3"]["loss"]) < np.mean(models["base"]["loss"])
    for measure in ("neurons", "separability"):
        assert list(numbers[measure]["models"]) == ["base", "step 3"]
        assert numbers[measure]["languages"] == ["en", "es", "it", "de"]
    layers = numbers["separability"]["models"]["base"]
    assert len(layers) == 4  # embeddings and three layers
    # What has not been trained has not changed.
    assert layers[:2] == numbers["separability"]["models"]["step 3"][:2]
    assert layers[3] != numbers["separability"]["models"]["step 3"][3]
    assert numbers["neurons"]["models"]["base"]["overlap_with_base"] in ([1, 1, 1, 1],) or all(
        x in (1, None) for x in numbers["neurons"]["models"]["base"]["overlap_with_base"]
    )
    assert numbers["interference"] == {"en": numbers["interference"]["en"] | {"interference": 0.0}}


@pytest.mark.slow
def test_all_models_are_measured_by_the_same_programs(numbers):
    assert len(numbers["stationarity"]["models"]) == 2
    for measure in (representations, stationarity):
        assert measure._program.cache_info().hits  # not compiled for the second


@pytest.mark.slow
def test_two_processes_measure_what_one_does(finished_run, sentences, numbers, tmp_path):
    said = run_together(
        [
            "-m", "jaxmoo", "analyze", finished_run, "--output", tmp_path / "{process}",
            "--what", "stationarity", "neurons", "separability", "--parallel", sentences,
            "--steps", "3", "--sentences", "24", "--samples", "20", "--examples", "4",
            "--mesh", "language=2",
        ]
    )  # fmt: skip
    assert "Analysis: " in said[0].stdout and "Analysis: " not in said[1].stdout
    assert not (tmp_path / "1").exists()
    found = json.loads((tmp_path / "0" / "analysis.json").read_text())
    for measure in ("stationarity", "neurons", "separability"):
        assert_near(found[measure], numbers[measure])


def assert_near(found, wanted):
    """Raise unless two structures have the same numbers, but for rounding."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_near(found[key], value)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, two in zip(found, wanted, strict=True):
            assert_near(one, two)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=2e-3, abs=1e-4)
    else:
        assert found == wanted


@pytest.mark.slow
def test_the_page_explains_itself(report, numbers):
    page = (report / "index.html").read_text()
    assert page.count("<h2") == 6 and page.count("Limits:") == 5
    assert page.count("data:image/png;base64,") == len(FIGURES)
    assert "http" not in page
    for name, value in (("training steps", 3), ("sentences", 24), ("seed of training", 0)):
        assert f"<td>{name}</td><td>{value}</td>" in page
        assert numbers["settings"][name] == value


@pytest.mark.slow
@needs_chromium
def test_the_page_in_a_browser(report, tmp_path):
    seen = look_at(report / "index.html", tmp_path)
    assert seen.console == []
    assert seen.requests == []
    assert len(seen.images) == len(FIGURES)
    assert all(name and width > 500 and height > 200 for name, width, height in seen.images)


@needs_chromium
def test_the_browser_sees_what_a_page_does_wrong(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<html><body><img alt="a" src="http://127.0.0.1:9/x.png">'
        '<img alt="b" src="data:image/png;base64,AAAA"><script>undefined_name()</script>'
    )
    seen = look_at(page, tmp_path)
    assert seen.requests == ["http://127.0.0.1:9/x.png"]
    assert [image[1] for image in seen.images] == [0, 0]
    assert any("undefined_name is not defined" in text for text in seen.console)


# --- Bad input -------------------------------------------------------------------------------


@pytest.fixture
def refused(finished_run, tmp_path, capsys):
    """Run the command on a copy of the run, which it refuses; return what it says."""

    def refused(*arguments: str, remove: str = "", change=None) -> str:
        run = tmp_path / "run"
        shutil.copytree(finished_run, run)
        if remove:
            shutil.rmtree(run / remove)
        if change:
            change(run)
        assert main([str(run), "--output", str(tmp_path / "out"), *arguments]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    return refused


def test_what_a_run_did_not_record(refused):
    assert "train.gram_every" in refused("--what", "conflict", remove="grams")


def test_a_run_without_checkpoints(refused):
    assert "train.checkpoint_every" in refused("--what", "stationarity", remove="checkpoints")


def test_a_step_without_checkpoint(refused):
    message = refused("--what", "stationarity", "--steps", "1")
    assert "no checkpoint of step 1. It has 2, 3" in message and "keep_checkpoints" in message


def test_measures_without_what_they_need(refused):
    assert "neurons cannot be measured: needs parallel" in refused("--what", "neurons")


def test_an_unknown_measure(refused):
    assert "Did you mean 'neurons'" in refused("--what", "neuron")


def test_a_language_missing_from_the_sentences(refused, sentences):
    message = refused("--parallel", sentences, "--languages", "en", "es", "fa")
    assert "no language 'fa'" in message and "Available: de, en, es, it" in message


def test_two_batches_that_the_data_cannot_fill(refused):
    assert "two batches of 30 need 60" in refused("--what", "stationarity", "--examples", "30")


def test_a_mesh_of_more_devices_than_there_are(refused):
    message = refused("--what", "stationarity", "--mesh", "data=2")
    assert "data (2) x language" in message and "but there are" in message


def test_a_tokenizer_of_another_model(refused, sentences, finished_run, tmp_path):
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    base = shutil.copytree(config["model"]["source"], tmp_path / "base")
    model = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(model | {"vocab_size": 90}))
    message = refused("--what", "neurons", "--parallel", sentences, "--base", str(base))
    assert "do not belong together" in message and "vocab_size=90" in message


def test_something_that_is_no_run(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "not the output of a training run" in capsys.readouterr().err
