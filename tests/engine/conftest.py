"""Meshes of virtual devices, each in a process of its own."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from devices import run_python
from engine.cases import MESHES, REPLICAS, RUNS


@pytest.fixture(scope="session", autouse=True)
def mesh_runs(request, tmp_path_factory):
    """What the meshes that tests ask for give; they run one by one, beside the other tests."""
    asked = {
        item.callspec.params["mesh"]
        for item in request.session.items
        if "mesh" in getattr(item, "fixturenames", ()) and hasattr(item, "callspec")
    }

    def run(mesh):
        out = tmp_path_factory.mktemp("meshes") / f"{mesh}.npz"
        sizes = MESHES[mesh]
        names = [*RUNS[mesh], *(REPLICAS if sizes[0] > 1 else ())]
        arguments = ["-m", "engine.on_mesh", out, *sizes, *names]
        run_python(arguments, devices=math.prod(sizes), PYTHONPATH="tests")
        return out

    with ThreadPoolExecutor(max_workers=1) as pool:
        yield {mesh: pool.submit(run, mesh) for mesh in MESHES if mesh in asked}
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def on_mesh(mesh_runs):
    """``(mesh, case) -> arrays by name``."""

    def results(mesh, name):
        # Not read in the thread: reading headers in two at once fails on Python 3.11.
        arrays, prefix = np.load(mesh_runs[mesh].result()), f"{name}/"
        return {k.removeprefix(prefix): arrays[k] for k in arrays if k.startswith(prefix)}

    return results
