"""Run a piece of Python in a process of its own with a chosen number of virtual CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_python(arguments, *, devices=1, check=True, **environment):
    """Run ``python ARGUMENTS`` in the repository's root; return the completed process."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    variables = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **environment}
    if devices > 1:
        # Read from a cache, a CPU's program does not keep the order of its collective operations.
        variables["JAX_ENABLE_COMPILATION_CACHE"] = "0"
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
