"""Two processes with four devices each give what one process gives."""

import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from devices import run_python
from engine.cases import wanted
from engine.toy import assert_same

PROGRAM = """
import sys
import jax
address, number, *arguments = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(number))
assert jax.process_count() == 2 and jax.device_count() == 8
from engine.on_mesh import main
main(*arguments)
"""
NAME = "tied"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the processes has seen."""
    address, folder = f"localhost:{free_port()}", tmp_path_factory.mktemp("processes")

    def run(number):
        out = folder / f"{number}.npz"
        # The devices of both: 4 groups of languages x 2.
        arguments = ["-c", PROGRAM, address, number, out, 1, 4, 2, NAME]
        run_python(arguments, devices=4, PYTHONPATH="tests")
        return out

    with ThreadPoolExecutor(2) as pool:
        return [dict(np.load(out)) for out in list(pool.map(run, range(2)))]


def test_both_processes_have_the_result_of_one(found):
    for seen in found:
        assert_same({name.split("/")[1]: x for name, x in seen.items()}, wanted(NAME))
