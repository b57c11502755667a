"""Processes of one run on one machine: what becomes of all when something becomes of one."""

import os
import signal
import sys
import threading

import pytest

from jaxmoo.runtime.workers import LOST, Workers

# What each process does is given by its number; as JAX's, they abort when another is gone.
PROGRAM = """
import os, signal, sys, time
number, todo = int(os.environ["JAX_PROCESS_ID"]), sys.argv[1:]
assert os.environ["JAX_NUM_PROCESSES"] == str(len(todo))
host, port = os.environ["JAX_COORDINATOR_ADDRESS"].split(":")
match todo[number]:
    case "killed": os.kill(os.getpid(), signal.SIGKILL)
    case "aborts": time.sleep(0.3); os.abort()
    case "hangs": time.sleep(60)
    case "stops": signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); print(flush=True); time.sleep(60)
    case code: sys.exit(int(code))
"""  # noqa: E501


def workers(*todo, patience=30.0):
    return Workers([sys.executable, "-c", PROGRAM, *todo], patience=patience)


@pytest.mark.parametrize(
    ("todo", "code", "lost"),
    [
        (["0", "0"], 0, ()),
        (["aborts", "killed", "aborts"], 128 + signal.SIGKILL, (5,)),
        (["aborts", "aborts"], LOST, ()),  # nobody knows which
        (["aborts", "2"], 2, ()),
    ],
)
def test_the_first_that_fails_says_why_all_ended_and_a_killed_one_is_lost(todo, code, lost):
    places = [4, 5, 6][: len(todo)]
    assert workers(*todo).run(places) == (code, lost)


def test_those_that_do_not_end_by_themselves_are_killed_and_not_lost():
    assert workers("hangs", "killed", patience=0.2).run([0, 1]) == (128 + signal.SIGKILL, (1,))


def test_each_has_gpus_of_its_own(capfd):
    program = "import os; print(os.environ['JAX_CUDA_VISIBLE_DEVICES'], flush=True)"
    two_each = Workers([sys.executable, "-c", program], patience=30.0, devices=2)
    assert two_each.run([0, 3]) == (0, ())
    assert sorted(capfd.readouterr().out.split()) == ["0,1", "6,7"]


def test_signals_are_passed_on_to_all(capfd):
    running = workers("stops", "stops")
    started = []

    def stop(place, pid):
        started.append(pid)
        if len(started) == 2:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()

    with running.passing_signals():
        assert running.run([0, 1], stop) == (128 + signal.SIGTERM, ())
    assert running.asked == signal.SIGTERM
