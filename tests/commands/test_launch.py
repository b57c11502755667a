"""``jaxmoo launch``: a run that loses a process goes on with those that are left."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from devices import ROOT
from jaxmoo.commands.launch import main
from jaxmoo.train import read_metrics
from train.test_run import weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "2"], "Give --config"),
        (["--processes", "2", "--min-processes", "3", "--config", "x"], "from 1 to --processes"),
        (["--processes", "3", "--config", "CONFIG"], "must be a multiple of 3"),
    ],
)
def test_what_cannot_be_started_is_refused_before_anything_is(
    arguments, message, write_config, capsys
):
    config = str(write_config())
    assert main([config if text == "CONFIG" else text for text in arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_of_four_processes_one_is_killed_and_two_go_on_as_a_planned_run_of_two(
    write_config, tmp_path
):
    config = write_config(
        model__trainable=r"^layers\.3\.",
        resolve__aggregator="mean",
        data__unseen=[],
        data__max_held_out=1,
        data__sequence_length=32,
        train__steps=24,
        train__keep_checkpoints=100,
        report=False,
        tensorboard=False,
    )
    lost, planned = tmp_path / "lost", tmp_path / "planned"

    def launch(processes, *settings):
        command = ["-m", "jaxmoo", "launch", "--processes", str(processes), "--config", str(config)]
        return subprocess.Popen(
            [sys.executable, *command, *settings],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    running = launch(4, f"output={lost}", "train.checkpoint_every=2")
    numbers, said = {}, []
    for line in running.stdout:
        said.append(line)
        if found := re.match(r"launch: process (\d) is PID (\d+)", line):
            numbers[found[1]] = int(found[2])
        if "Compiling the training step" in line:
            break
    deadline = time.monotonic() + 200
    while not (lost / "checkpoints" / "4").exists():
        assert running.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.01)
    begun = time.monotonic()
    os.kill(numbers["2"], signal.SIGKILL)
    rest, _ = running.communicate(timeout=200)
    said = "".join([*said, rest])
    assert running.returncode == 0, said
    assert time.monotonic() - begun < 200
    # Three are left, among which two examples of four languages cannot be divided.
    assert "launch: lost: 2; 3 of 4 processes are left" in said
    assert "launch: starting 2 processes (1 of 3 restarts)" in said
    assert "2 device(s) of 2 processes" in said
    step = int(re.search(r"Resuming from the checkpoint of step (\d+)", said)[1])
    assert 4 <= step < 24
    assert [row["step"] for row in read_metrics(lost) if "loss" in row] == list(range(1, 25))

    # The same state, gone on from by two on purpose; checkpoints by the first one's clock.
    shutil.copytree(lost, planned, ignore=shutil.ignore_patterns("export", "results.json"))
    for path in (planned / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    by_two = launch(2, f"output={planned}", "train.checkpoint_every=0.1s")
    text, _ = by_two.communicate(timeout=200)
    assert by_two.returncode == 0 and f"the checkpoint of step {step}." in text, text
    assert max(int(path.name) for path in (planned / "checkpoints").iterdir()) == 24
    for name, array in weights(planned).items():
        assert np.array_equal(weights(lost)[name], array), name
