"""Signals and hangs: when a process stops, how it ends, what it says."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from devices import ROOT
from jaxmoo.config import load_config, to_yaml
from jaxmoo.data import LanguageBatches
from jaxmoo.data.tokenization.tokenize import Tokenized
from jaxmoo.errors import CheckpointError, ConfigError
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.runs.provenance import check_settings
from jaxmoo.runtime.hang import HangTimeout
from jaxmoo.runtime.launch import Launch
from jaxmoo.runtime.processes import start
from jaxmoo.runtime.saving import SaveRequest
from jaxmoo.runtime.signals import InterruptedRunError, StopRequest
from jaxmoo.train.job import Job
from jaxmoo.train.resume import batch_digest, check_data


def test_signals_are_noted_and_obeyed_where_the_work_allows():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.requested() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested() == signal.SIGTERM
        with pytest.raises(InterruptedRunError, match="SIGTERM"), stop.at_once():
            pytest.fail("what could be stopped at once is not begun")
    with StopRequest() as stop, pytest.raises(InterruptedRunError) as stopped, stop.at_once():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
    assert stopped.value.signal == signal.SIGINT
    # Whatever the work makes of it: another error, or nothing.
    with StopRequest() as stop, pytest.raises(InterruptedRunError), stop.at_once():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        except Exception as error:
            raise CheckpointError("the file cannot be read") from error
    swallowed = contextlib.suppress(Exception)
    with StopRequest() as stop, pytest.raises(InterruptedRunError), stop.at_once(), swallowed:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    with StopRequest() as stop, pytest.raises(CheckpointError), stop.at_once():
        raise CheckpointError("without any signal it is what it is")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_notice_stops_a_run_as_a_signal_does_in_any_thread():
    with StopRequest() as stop:
        stop.ask()
        assert stop.requested() == signal.SIGTERM
    with StopRequest() as stop, pytest.raises(InterruptedRunError), stop.at_once():
        threading.Timer(0.05, stop.ask).start()
        time.sleep(30)
    found = []

    def elsewhere():  # where no handler of signals can be set
        with StopRequest() as stop:
            stop.ask()
            found.append(stop.requested())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.SIGTERM]


def test_checkpoints_by_time_are_taken_where_all_have_agreed(write_config, monkeypatch):
    config = load_config(write_config())
    now = [100.0]
    monkeypatch.setattr(time, "time", lambda: -1e9)  # somebody sets the clock back
    saves = SaveRequest(60, clock=lambda: now[0])
    job = Job(config, None, None, StopRequest(), saves, HangTimeout(0), print)
    job.point(1)
    assert not saves.take()
    now[0] += 61
    job.point(2)  # during an evaluation, where nothing can be saved
    job.point(2)
    assert saves.take() and not saves.take(), "one checkpoint, after it"
    now[0] += 59
    saves.restart()  # another has been saved, as the best so far
    now[0] += 59
    job.point(3)
    assert not saves.take()
    saves.ask()  # a maintenance is announced
    job.point(4)
    assert saves.take()
    by_steps = SaveRequest(None, clock=lambda: now[0])
    now[0] += 1e6
    assert not by_steps.wanted()


STUCK = """
import hashlib
from jaxmoo.runtime.signals import StopRequest
with StopRequest():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C, where no handler runs
"""


def test_a_second_sigint_ends_a_process_that_is_busy_outside_python():
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT
    assert "SIGINT: stopping where nothing is lost" in errors


HANGING = """
import time
from jaxmoo.runtime.hang import HangTimeout
with HangTimeout(1.0) as hang:
    for _ in range(4):
        time.sleep(0.5)
        hang.progress()
    print("alive", flush=True)
    def waiting_for_the_others():
        time.sleep(60)
    waiting_for_the_others()
"""


def test_a_hang_shows_where_and_ends_with_an_exit_code():
    done = subprocess.run(
        [sys.executable, "-c", HANGING], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    assert done.stdout == "alive\n"
    assert "Timeout" in done.stderr and "waiting_for_the_others" in done.stderr


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (Launch(processes=2), "all three"),
        (Launch("localhost:1", processes=2, process=2), "counts from 0"),
    ],
)
def test_contradictory_flags_are_refused_before_anything_is_waited_for(launch, message):
    with pytest.raises(ConfigError, match=message):
        start(launch)


def test_one_directory_is_one_run_at_a_time(write_config, tmp_path, monkeypatch):
    config = load_config(write_config())
    monkeypatch.setattr("jaxmoo.runs.directory._PATIENCE", 0.1)
    run = RunDirectory(tmp_path / "run")
    other = RunDirectory(tmp_path / "run").claim(config)
    with run.claim(config), pytest.raises(ConfigError, match="another run is at work"), other:
        pytest.fail("both are at work")
    with run.claim(config):
        assert run.config.exists()


def test_a_directory_in_which_a_run_was_killed_before_it_had_a_config_is_free(
    write_config, tmp_path
):
    (tmp_path / "run").mkdir()
    for name in (".lock", ".config.yaml.partial"):
        (tmp_path / "run" / name).write_text("")
    RunDirectory(tmp_path / "run").check(load_config(write_config()))


def test_a_checkpoint_of_a_run_with_other_settings_is_refused(write_config):
    mine = load_config(write_config())
    others = load_config(write_config(), ["optimizer.learning_rate=0.5", "train.hang_timeout=7"])
    check_settings({"config": to_yaml(mine)}, 2, mine)
    with pytest.raises(CheckpointError, match="other settings") as refused:
        check_settings({"config": to_yaml(others)}, 2, mine)
    assert "optimizer.learning_rate: 0.5 -> 0.001" in str(refused.value)
    assert "hang_timeout" not in str(refused.value)
    moved = load_config(write_config(), ["model.source=else/where", "data.source=there"])
    check_settings({"config": to_yaml(moved)}, 2, mine)
    # A setting that came later is not in the checkpoint of an earlier version.
    check_settings({"config": "seed: 0\noptimizer: {learning_rate: 0.001}"}, 2, mine)


def test_other_data_behind_the_same_settings_are_refused():
    class Data:
        def __init__(self, first):
            tokens = [np.array([first, 6, 7]), np.array([8, 9, 10])]
            mask = np.array([False, True, True])
            examples = [Tokenized(t.astype(np.int32), mask, 2, 3) for t in tokens]
            self.batches = LanguageBatches({"en": examples}, ["en"], 2, 4, seed=0)

    described = {"step": 4, "next_batch": batch_digest(Data(5).batches, 4)}
    check_data(described, Data(5))
    with pytest.raises(CheckpointError, match="batch of step 5 would be another"):
        check_data(described, Data(11))
