"""Run Python in another process with a chosen number of virtual CPU devices."""

import functools
import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_python(arguments, *, devices=1, check=True, **environment):
    """Run ``python ARGUMENTS`` in the repository's root; return the completed process."""
    variables = {**os.environ, **_variables(devices), **environment}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def run_together(arguments, *, processes=2, devices=1, check=True, **environment):
    """Run ``python ARGUMENTS`` in several processes that find each other, by JAX's variables.

    Each has so many devices; ``{process}`` in an argument is its number. Return what each printed.
    """
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"

    def one(number):
        return run_python(
            [str(argument).replace("{process}", str(number)) for argument in arguments],
            devices=devices,
            check=check,
            # Programs of several processes on CPUs do not come from a cache.
            JAX_ENABLE_COMPILATION_CACHE="0",
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=str(processes),
            JAX_PROCESS_ID=str(number),
            PYTHONPATH=str(ROOT),
            **environment,
        )

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(one, range(processes)))


@pytest.fixture(scope="session")
def eight_devices():
    """``(module, function, *arguments) -> result``, called where there are eight virtual devices.

    One process serves the whole session, from the first call on; what was called once is kept. The
    result has to be picklable, such as NumPy arrays.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:

        @functools.cache
        def call(module, function, *arguments):
            with pytest.MonkeyPatch.context() as patch:  # the process starts with the first call
                for name, value in _variables(8).items():
                    patch.setenv(name, value)
                future = pool.submit(_call, module, function, *arguments)
            return future.result(timeout=600)

        yield call


def _variables(devices):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    variables = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    if devices > 1:
        # Read from a cache, a CPU's program does not keep the order of its collective operations.
        variables["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    return variables


def _call(module, function, *arguments):
    return getattr(importlib.import_module(module), function)(*arguments)
