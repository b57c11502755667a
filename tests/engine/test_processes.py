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
import numpy as np
from engine.cases import on_mesh
out, name = arguments
np.savez(out, **on_mesh("4x2", name))
"""
NAME = "bytes within layers, tied, five objectives"


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
        # On the devices of both.
        run_python(["-c", PROGRAM, address, number, out, NAME], devices=4, PYTHONPATH="tests")
        return out

    with ThreadPoolExecutor(2) as pool:
        return [dict(np.load(out)) for out in list(pool.map(run, range(2)))]


@pytest.mark.slow
def test_both_processes_have_the_result_of_one(found):
    for seen in found:
        assert_same(seen, wanted(NAME))
