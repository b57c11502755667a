"""Fixtures that several rooms share."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# The suite's time is the compiler's, much of it spent on machine code that runs once. The passes
# over whole programs, which decide memory and traffic, are not affected. Set before JAX is imported
# and inherited by every process that a test starts.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# All those processes, and pytest's workers, compile a program once between them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxmoo-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest

from devices import QUICK_TO_COMPILE, eight_devices  # noqa: F401 -- a fixture of several rooms

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_TO_COMPILE}".strip()

from jaxmoo.errors import DownloadError
from small_runs import (  # noqa: F401 -- fixtures of every room
    conversations,
    tiny_model,
    write_config,
)

# A script, which needs what the tests do without.
collect_ignore = ["aggregators/make_goldens.py"]


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The embedded model as a Hugging Face directory, in the user's own cache."""
    from jaxmoo.hf import resolve_source

    try:
        return resolve_source("smollm2-135m-instruct")
    except DownloadError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the embedded model is not in the cache and cannot be fetched: {error}")
