"""Trackers of experiments: what they get, and that a resumed run goes on in their own run."""

import sys
import time
from types import SimpleNamespace

import pytest

from jaxmoo.errors import ConfigError
from jaxmoo.files.buckets import BucketPath
from jaxmoo.train.metrics import MetricsWriter, read_metrics
from jaxmoo.train.trackers import Trackers

ROW = {"step": 1, "loss": {"en": 2.3456}, "learning_rate": 0.0123, "grad_norm": float("nan")}
SETTINGS = {"seed": 7, "data.source": "https://me:password@host/x"}
SECRETS = {
    "WANDB_API_KEY": "a" * 39 + "7",
    "HF_TOKEN": "hf_secretsecret",
    "MLFLOW_TRACKING_PASSWORD": "topsecret",
}


@pytest.fixture(autouse=True)
def secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def check_no_secret_is_written(path):
    for file in path.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            for secret in [*SECRETS.values(), "me:password"]:
                assert secret.encode() not in content, file


def test_weights_and_biases_gets_the_rows(tmp_path, monkeypatch):
    """Without a connection they are kept in a file."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    with MetricsWriter(run, Trackers(wandb="project"), settings=SETTINGS) as metrics:
        metrics.write(ROW)
    [file] = run.glob("wandb/offline-run-*/*.wandb")
    name = (run / "wandb_id").read_text().strip()
    wanted = {"loss/en", "2.3456", "train/learning_rate", "0.0123", "project", name, "seed"}
    # The package's own process writes it, and may take a moment.
    deadline = time.monotonic() + 30
    while missing := {text for text in wanted if text.encode() not in file.read_bytes()}:
        assert time.monotonic() < deadline, missing
        time.sleep(0.1)
    check_no_secret_is_written(run)


def test_mlflow_gets_the_rows_of_both_halves_of_a_run_as_one(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="pip install 'jaxmoo[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())
    run, wanted = tmp_path / "run", Trackers(mlflow="experiment")
    for step in (1, 2):
        with MetricsWriter(run, wanted, resume_step=step - 1 or None, settings=SETTINGS) as metrics:
            metrics.write(ROW | {"step": step})
    client = mlflow.MlflowClient()
    number = (run / "mlflow_id").read_text().strip()
    found = client.get_run(number)
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert [m.step for m in client.get_metric_history(number, "loss/en")] == [1, 2]
    assert found.data.metrics["train/learning_rate"] == 0.0123
    assert found.data.params["seed"] == "7"
    experiment = client.get_experiment_by_name("experiment")
    assert len(client.search_runs([experiment.experiment_id])) == 1
    check_no_secret_is_written(tmp_path)


def test_trackio_goes_on_in_the_run_of_the_same_name(tmp_path, monkeypatch):
    begun = []

    class Run:
        def __init__(self, **options):
            begun.append((options, []))

        def log(self, values, step):
            begun[-1][1].append((step, values["loss/en"]))

        def finish(self):
            begun[-1][1].append("finished")

    class Library:  # its own brings a server for a page; what is called here it has (0.43)
        __spec__ = sys.__spec__
        init = Run

    monkeypatch.setitem(sys.modules, "trackio", Library)
    for _ in range(2):
        with MetricsWriter(tmp_path / "run", Trackers(trackio="p"), settings=SETTINGS) as metrics:
            metrics.write(ROW)
    (first, rows), (second, _) = begun
    assert first["name"] == second["name"] and first["name"].startswith("run-")
    assert first["resume"] == "allow" and first["project"] == "p"
    assert first["config"] == {"seed": 7, "data.source": "https://host/x"}
    assert rows == [(1, 2.3456), "finished"]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    class Gone:
        def log(self, values, step):
            raise ConnectionError("no route to https://me:password@host")

        def close(self):
            pytest.fail("it is no longer there")

    monkeypatch.setattr("jaxmoo.train.metrics.open_trackers", lambda *_, **__: [Gone()])
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(ROW)
        metrics.write(ROW | {"step": 2})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    said = "Note: Gone gets no more metrics: no route to https://***@host\n"
    assert capsys.readouterr().err == said


def test_a_tracker_that_takes_no_run_is_an_error_that_says_what_to_set(tmp_path, monkeypatch):
    closed = []

    def tried(directory, project, settings):
        raise ConnectionError("no route to https://me:password@host")

    monkeypatch.setattr("jaxmoo.train.trackers._Mlflow", tried)
    monkeypatch.setattr("jaxmoo.train.trackers.check_packages", lambda wanted: None)
    monkeypatch.setattr(
        "jaxmoo.train.trackers._Trackio",
        lambda *_: SimpleNamespace(close=lambda: closed.append(True)),
    )
    with pytest.raises(ConfigError) as found:
        MetricsWriter(tmp_path, Trackers(trackio="p", mlflow="e"))
    text = str(found.value)
    assert text.startswith("mlflow is 'e', but no run can be begun there: no route to https://***@")
    assert "MLFLOW_TRACKING_URI" in text and text.endswith("or set mlflow=null.")
    assert closed == [True]


def test_rows_that_cannot_be_sent_do_not_hide_what_went_wrong_before(monkeypatch):
    def unreachable(*_):
        raise OSError(5, "connection reset")

    monkeypatch.setattr(BucketPath, "write_text", unreachable)
    with pytest.raises(OSError, match="connection reset"), MetricsWriter("memory://a/b") as metrics:
        metrics.write(ROW)
    with pytest.raises(ConfigError, match="first"), MetricsWriter("memory://a/b") as metrics:
        metrics.write(ROW)
        raise ConfigError("first")


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_missing_library_is_explained_by_its_extra(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    message = rf"{name} is 'x', but.*pip install 'jaxmoo\[{name}\]', or set {name}=null"
    with pytest.raises(ConfigError, match=message):
        MetricsWriter(tmp_path, Trackers(**{name: "x"}))
