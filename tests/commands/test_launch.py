"""``jaxmoo launch``: a run that loses a process goes on with those that are left."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest

from devices import ROOT
from jaxmoo.commands.launch import _most, main
from jaxmoo.commands.train import main as train
from jaxmoo.config import load_config
from jaxmoo.runs.directory import RunDirectory
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


def test_it_goes_on_with_as_many_as_divide_the_batch(write_config):
    config = load_config(write_config())  # four languages, two examples of each

    def most(left, **options):
        return _most(config, left, Namespace(**{"min_processes": 1, "devices": 1, **options}))

    assert [most(left) for left in (0, 1, 2, 3, 5, 7, 8)] == [0, 1, 2, 2, 4, 4, 8]
    assert most(3, devices=4) == 2 and most(3, min_processes=3) == 0


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_the_other_goes_on_as_a_planned_run_of_one(
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
        # By the clock of the first process, which both must follow at the same steps.
        train__checkpoint_every="0.1s",
        report=False,
        tensorboard=False,
    )
    lost, planned = tmp_path / "lost", tmp_path / "planned"
    running = subprocess.Popen(
        [
            *(sys.executable, "-m", "jaxmoo", "launch", "--processes", "2"),
            *("--config", str(config), f"output={lost}"),
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    numbers, said = {}, []
    for line in running.stdout:
        said.append(line)
        if found := re.match(r"launch: process (\d) is PID (\d+)", line):
            numbers[found[1]] = int(found[2])
        if "Compiling the training step" in line:
            break
    deadline = time.monotonic() + 200
    while not RunDirectory(lost).steps():
        assert running.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.01)
    os.kill(numbers["1"], signal.SIGKILL)
    rest, _ = running.communicate(timeout=200)
    said = "".join([*said, rest])
    assert running.returncode == 0, said
    assert "2 device(s) of 2 processes" in said
    assert "launch: lost: 1; 1 of 2 processes are left" in said
    assert "launch: starting 1 processes (1 of 3 restarts)" in said
    step = int(re.search(r"Resuming from the checkpoint of step (\d+)", said)[1])
    assert 0 < step < 24
    assert [row["step"] for row in read_metrics(lost) if "loss" in row] == list(range(1, 25))

    # The same state, gone on from by one process on purpose.
    shutil.copytree(lost, planned, ignore=shutil.ignore_patterns("export", "results.json"))
    for later in RunDirectory(planned).steps():
        if later > step:
            shutil.rmtree(planned / "checkpoints" / str(later))
    assert train(["--config", str(config), f"output={planned}"]) == 0
    for name, array in weights(planned).items():
        assert np.array_equal(weights(lost)[name], array), name
