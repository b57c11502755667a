"""A run from config to exported weights: what it leaves, how it resumes, how it refuses."""

import functools
import html
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from devices import ROOT
from jaxmoo.commands.data import main as data_main
from jaxmoo.commands.train import main
from jaxmoo.config import is_date, load_config
from jaxmoo.convert.models import to_hf
from jaxmoo.errors import CheckpointError
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.train import read_metrics, train
from jaxmoo.train.export import check_exports
from small_runs import CHATML, save_config

# The date is read, but not shown.
CLOCK = "{% set today = strftime_now('%Y-%m-%d') %}" + CHATML

# As little as makes a run.
QUIET = {"report": False, "tensorboard": False}
SHORT = QUIET | {
    "train__steps": 1,
    "data__seen": ["it", "pt"],
    "data__unseen": [],
    "data__max_held_out": 2,
}


def trained(run: Path) -> list[dict]:
    """The rows of a run's metrics that are of training steps."""
    return [row for row in read_metrics(run) if "loss" in row]


class Finished(NamedTuple):
    """A run of one step that is done."""

    base: Path  # its model
    config: Path
    run: Path
    said: list[str]

    def copied(self, path):
        """The command that finds it done in another directory; copied there."""
        shutil.copytree(self.run, path)
        return ["--config", str(self.config), f"output={path}"]


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_model, path / "base")
    settings = {
        "output": str(path / "run"),
        "model": {"source": str(path / "base"), "trainable": r"^layers\.[23]\."},
        "data": {"source": "chatterbot", "batch_size": 2, "sequence_length": 96},
        "optimizer": {"decay": "constant"},
    }
    config = save_config(path / "config.yaml", settings, SHORT)
    said: list[str] = []
    train(load_config(config), said.append)
    return Finished(path / "base", config, path / "run", said)


@pytest.fixture(scope="module")
def longer(finished, tmp_path_factory):
    """The same run after another step, for which it was started again."""
    path = tmp_path_factory.mktemp("longer") / "run"
    assert main([*finished.copied(path), "train.steps=2"]) == 0
    return path


def weights(run):
    return load_file(run / "export" / "model.safetensors")


def largest_difference(a, b):
    """Largest difference between two sets of weights, relative to the largest entry."""
    assert a.keys() == b.keys()
    return max(
        np.abs(a[name].astype(np.float64) - b[name]).max() / np.abs(b[name]).max() for name in a
    )


def _check_samples(run, base):
    """Replies before training are those of the base model, by transformers; the page has them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before, after = (RunDirectory(run).replies(step) for step in (0, 2))
    assert before.keys() == after.keys() == {"en", "es", "de"}
    page = (run / "report" / "index.html").read_text()
    assert page == (run / "export" / "report.html").read_text()
    assert "[report.html](report.html)" in (run / "export" / "README.md").read_text()
    for code, (one,) in before.items():
        assert html.escape(one.reply.strip()) in page and one.prompt == after[code][0].prompt
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    (one,) = before["en"]
    asked = one.prompt.rpartition("user\n")[2].rpartition("\nassistant")[0]
    given = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    found = model.generate(**given, max_new_tokens=64, do_sample=False)[0]
    reply = tokenizer.decode(found[given["input_ids"].shape[1] :], skip_special_tokens=True)
    assert one.reply == reply


@pytest.mark.slow
def test_the_quick_start_in_small_on_the_real_model(smollm2_dir, tmp_path, monkeypatch, capsys):
    """The very script and config of the quick start, with fewer steps and languages."""
    run = tmp_path / "run"
    command = [
        "scripts/train.py", "--config", "configs/quickstart.yaml", f"output={run}",
        "data.seen=[en, es]", "data.unseen=[de]", "data.batch_size=1", "data.max_held_out=1",
        "data.sequence_length=64", "train.steps=2",
        "optimizer.warmup_steps=1", "optimizer.learning_rate=1e-4",
    ]  # fmt: skip
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(command[0], run_name="__main__")
    assert not ended.value.code
    results = json.loads((run / "results.json").read_text())
    assert set(results["before"]) == {"en", "es", "de"}
    for language in ("en", "es"):
        assert results["after"][language]["nll"] < results["before"][language]["nll"]
    assert "seen mean" in capsys.readouterr().out
    rows = trained(run)
    assert [row["step"] for row in rows] == [1, 2]
    assert set(rows[0]["blocks"]) == {f"layers.{i}" for i in range(22, 30)}
    assert {p.name for p in (run / "report").iterdir()} >= {"index.html", "loss.png"}
    assert any((run / "tensorboard").iterdir())
    _check_samples(run, smollm2_dir)

    # Only the last 8 layers have changed, and what is exported is what was trained.
    before, after = load_file(smollm2_dir / "model.safetensors"), weights(run)
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    numbers = {int(re.search(r"layers\.(\d+)\.", name)[1]) for name in changed}
    assert numbers == set(range(22, 30))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    chat = [{"role": "user", "content": "Hola"}, {"role": "assistant", "content": "Buenos días"}]
    tokens = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits.numpy()
    from jaxmoo.hf import load_model

    found = np.asarray(load_model(run / "export")(np.array([tokens])))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(write_config, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(CLOCK)
    config = write_config(
        train__steps=6,
        train__checkpoint_every=2,
        data__unseen=[],
        data__max_held_out=2,
        data__packing=True,
        data__languages_per_step=2,
        data__sampling={"temperature": 2.0},
        data__chat_template=str(template),
        resolve__gram="sketch:2048",  # drawn anew at every step
    )
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert main(["--config", str(config), f"output={unbroken}"]) == 0
    assert is_date(load_config(unbroken / "config.yaml").data.date), "that of today"

    command = [sys.executable, "scripts/train.py", "--config", config, f"output={killed}"]
    command.append("data.date=2020-02-03")
    process = subprocess.Popen([*map(str, command)], cwd=ROOT)
    deadline = time.monotonic() + 300
    while not (killed / "checkpoints" / "2").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "results.json").exists()

    assert main(["--config", str(config), f"output={killed}"]) == 0
    for name, array in weights(unbroken).items():
        assert np.array_equal(weights(killed)[name], array), name
    rows, resumed = (trained(run) for run in (unbroken, killed))
    assert [row["step"] for row in resumed] == list(range(1, 7))
    # The held-out curve begins with the model as it was, and ends with the last step.
    curves = [
        [(row["step"], row["held_out"]) for row in read_metrics(run) if "held_out" in row]
        for run in (unbroken, killed)
    ]
    assert curves[0] == curves[1] and [step for step, _ in curves[0]] == [0, 6]
    assert all(0 < row["gram_error"] < 0.5 for row in rows)
    for name in ("loss", "weights", "cosine", "skipped", "tokens", "epochs", "gram_error"):
        assert [row[name] for row in rows] == [row[name] for row in resumed], name

    # Each step has the metrics of its own languages, and rows with more than one example.
    shown = dict.fromkeys(("it", "pt", "es", "fa"), 0)
    for row in rows:
        assert len(row["loss"]) == 2 and row["loss"].keys() == row["weights"].keys()
        assert all((code in row["loss"]) == (row["epochs"][code] > shown[code]) for code in shown)
        shown = row["epochs"]
        assert row["tokens"] > 0.7 * 2 * 2 * 96
        assert np.isfinite(np.array(row["cosine"], float)).sum() == 4
    assert (killed / "report" / "loss.png").exists()
    # The exported model is prompted as it was trained.
    assert (killed / "export" / "chat_template.jinja").read_text() == CLOCK
    assert load_config(killed / "config.yaml").data.date == "2020-02-03", "as it began"
    # It stops where replies ended in training, though the base model says nothing of that.
    generation = json.loads((killed / "export" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 2}  # <|im_end|>


@pytest.mark.slow
def test_sigterm_saves_and_the_exit_code_says_so(write_config, tmp_path, capsys):
    changes = {"train__steps": 10_000, "optimizer__decay": "constant"}  # the others' program
    config = write_config(**SHORT | changes)
    metrics, ended = tmp_path / "run" / "metrics.jsonl", threading.Event()

    def stop():
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            if ended.wait(0.02):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop)
    stopping.start()
    try:
        code = main(["--config", str(config)])
    finally:
        ended.set()
        stopping.join()
    assert code == 128 + signal.SIGTERM
    message = capsys.readouterr().err
    step = int(re.search(r"Stopped by SIGTERM after step (\d+) of 10000", message)[1])
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()


def test_a_finished_run_only_repeats_its_table(finished, tmp_path, capsys):
    command = finished.copied(tmp_path / "run")
    model = tmp_path / "run" / "export" / "model.safetensors"
    stamp = os.stat(model).st_mtime_ns
    assert main(command) == 0
    table = finished.said[-1].splitlines()
    assert "NLL before → after" in table[0]
    assert capsys.readouterr().out.splitlines()[-len(table) :] == table
    assert os.stat(model).st_mtime_ns == stamp


def test_an_export_is_uploaded_at_the_end_and_a_missing_token_known_at_the_start(
    finished, tmp_path, capsys, monkeypatch
):
    command, pushed = finished.copied(tmp_path / "run"), []
    monkeypatch.setattr("jaxmoo.hf.push.get_token", lambda: None)
    assert main([*command, "--push-to-hub", "me/model"]) == 2
    captured = capsys.readouterr()
    assert "there is no token" in captured.err and not captured.out
    monkeypatch.setattr("jaxmoo.train.run.prepare_push", lambda name, private: f"{name} {private}")
    monkeypatch.setattr("jaxmoo.train.run.push", lambda *asked: pushed.append(asked) or "there")
    assert main([*command, "--push-to-hub", "me/model", "--private"]) == 0
    assert pushed == [(tmp_path / "run" / "export", "me/model True", "jaxmoo, step 1")]
    assert capsys.readouterr().out.endswith("Uploaded: there\n")
    assert main([*command, "push_to_hub=me/model", "export=false"]) == 2
    assert "push_to_hub needs export=true" in capsys.readouterr().err


def flip(file, place):
    """Flip one bit of a file, as a disk may."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
def test_a_finished_runs_export_is_checked_and_made_anew_when_it_is_gone(
    finished, longer, tmp_path, capsys, monkeypatch
):
    command, export = finished.copied(tmp_path / "run"), tmp_path / "run" / "export"
    first = (export / "model.safetensors").read_bytes()
    # A person's own, and what is there for people to edit, are nobody's business.
    (export / "notes.txt").write_text("mine")
    (export / "README.md").write_text("better")
    flip(export / "model.safetensors", -5)
    (export / "tokenizer.json").unlink()
    assert main(command) == 2
    message = capsys.readouterr().err
    assert f"{export} is no longer what this run exported: " in message
    assert "model.safetensors is not what was written, tokenizer.json is missing. " in message
    assert "Remove that directory" in message and "exported anew" in message

    export.rename(tmp_path / "elsewhere")
    export.mkdir()
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")  # it knows no arrows
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert main(command) == 0
    shown = terminal.buffer.getvalue().decode("ascii")
    assert "or empty: the model is exported again" in shown
    assert "NLL before -> after" in shown
    assert (export / "model.safetensors").read_bytes() == first

    # Training goes on, and would replace the export: what it did not write stops it beforehand.
    for name in ("notes.txt", "README.md"):
        old = (export / name).read_text() if (export / name).exists() else None
        (export / name).write_text("mine")
        assert main([*command, "train.steps=2"]) == 2
        captured = capsys.readouterr()
        assert name in captured.err and "Move that directory away" in captured.err
        assert "Training" not in captured.out
        (export / name).unlink() if old is None else (export / name).write_text(old)
    check_exports(load_config(command[1], ["train.steps=2"]), RunDirectory(tmp_path / "run"))
    assert (longer / "export" / "model.safetensors").read_bytes() != first


@pytest.mark.slow
def test_the_checkpoint_before_a_damaged_one_is_used_and_gives_the_same_weights(
    finished, longer, tmp_path, capsys
):
    shutil.copytree(longer, tmp_path / "run")
    command = ["--config", str(finished.config), f"output={tmp_path / 'run'}", "train.steps=2"]
    good, checkpoints = weights(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    shutil.rmtree(tmp_path / "run" / "export")
    files = [path for path in (checkpoints / "2" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    flip(largest, 1000)
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"{largest.relative_to(checkpoints / '2')} is not what was written. It is now in" in said
    assert f"Warning: The checkpoint {checkpoints / '2'} cannot be restored" in said
    assert "Resuming from the checkpoint of step 1." in said
    assert (checkpoints / "damaged" / "2").is_dir() and (checkpoints / "2").is_dir()
    for name, array in weights(tmp_path / "run").items():
        assert np.array_equal(good[name], array), name

    # None is whole: an error, as nothing says whether to begin anew; and nothing is moved.
    shutil.rmtree(checkpoints / "1" / "about")
    (checkpoints / "2" / "digests.json").write_text("{}")
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "2/digests.json is damaged" in error and "remove that directory" in error
    assert {path.name for path in checkpoints.iterdir()} == {"1", "2", "damaged"}


def test_a_run_goes_on_only_with_the_model_that_it_began_with(finished, tmp_path, capsys, request):
    base, run = finished.base, tmp_path / "run"
    command = finished.copied(run)
    for file in (base / "model.safetensors", base / "config.json"):
        # Other tests go on from this model, whatever becomes of this one.
        request.addfinalizer(functools.partial(file.write_bytes, file.read_bytes()))

    def refused(message):
        assert main(command) == 2
        found = capsys.readouterr().err
        assert f"{base} is no longer the model that the run began with" in found
        assert message in found

    # A parameter that is not trained: nothing of it is in the checkpoint.
    stored = load_file(base / "model.safetensors")
    frozen = "model.layers.0.mlp.up_proj.weight"
    save_file(stored | {frozen: stored[frozen][::-1].copy()}, base / "model.safetensors")
    refused("other weights in the parameters that are not trained")
    with pytest.raises(CheckpointError, match="is no longer the model"):
        to_hf(run, tmp_path / "out", say=lambda _: None)

    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    description = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(description | {"rope_theta": 5e5}))
    refused("rope_theta 10000.0 -> 500000.0")

    (base / "config.json").write_text(json.dumps(description))
    to_hf(run, tmp_path / "out", say=lambda _: None)


# --- Bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("resolve.agregator=mgda", "Did you mean 'aggregator'"),
        ("resolve.aggregator=mgad", "Did you mean 'mgda'"),
        ("resolve.blocks=layers", "Did you mean 'layer'"),
        ("train.steps=many", "train.steps"),
        ("data.seen=[it, xx]", "xx"),
        ("data.sequence_length=512", "at most 256"),
        ("model.trainable=^blocks", "match"),
        ("mesh.language=3", "devices"),
        ("model.source=nowhere/to/be/found", "nowhere"),
    ],
)
def test_bad_settings_end_the_command_before_any_work(override, message, write_config, capsys):
    config = write_config()
    assert main(["--config", str(config), override]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_another_runs_directory_is_refused_and_left_as_it_was(finished, tmp_path, capsys):
    command = finished.copied(tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert main([*command, "seed=1"]) == 2
    assert "seed: 0 -> 1" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()} == before

    other = tmp_path / "documents"
    other.mkdir()
    (other / "thesis.tex").write_text("dear")
    assert main([*command, f"output={other}"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
@pytest.mark.parametrize("languages_per_step", ["null", "1"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    languages_per_step, write_config, tmp_path, capsys
):
    changes = {"train__steps": 8, "optimizer__learning_rate": 1e30, "optimizer__warmup_steps": 0}
    config = write_config(**SHORT | changes, resolve__aggregator="mean")
    overrides = ["train.checkpoint_every=1", f"data.languages_per_step={languages_per_step}"]
    assert main(["--config", str(config), *overrides]) == 1
    message = capsys.readouterr().err
    assert "not finite in step" in message and "untouched" in message
    latest = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"step {latest} " in message
    assert not (tmp_path / "run" / "export").exists()


def test_tokens_that_the_model_does_not_know_are_refused_before_training(
    tiny_model, write_config, tmp_path, capsys
):
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 258}))
    for command in (main, data_main):
        assert command(["--config", str(write_config(model__source=str(other)))]) == 2
        assert "tokens up to number 258" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_truncated_weights_are_refused(tiny_model, write_config, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_model, damaged)
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert main(["--config", str(write_config(model__source=str(damaged)))]) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "resolve.aggregator" in text and "optimizer.learning_rate" in text


def test_settings_may_stand_between_flags(write_config, capsys):
    flags = ["--config", str(write_config()), "seed=7", "--print-config", "train.steps=3"]
    assert main(flags) == 0
    text = capsys.readouterr().out
    assert "seed: 7" in text and "steps: 3" in text
