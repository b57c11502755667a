"""Fixtures that several rooms share."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

# The suite's time is the compiler's, much of it spent on machine code that runs once. The passes
# over whole programs, which decide memory and traffic, are not affected. Set before JAX is imported
# and inherited by every process that a test starts.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# By the older code generator, and in one piece, it takes a quarter of the time. Later versions have
# no other, and stop at a flag that they do not know.
if version("jaxlib").startswith("0.10."):
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
# All those processes, and pytest's workers, compile a program once between them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxmoo-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest

from bucket_servers import (  # noqa: F401 -- fixtures of several rooms
    faulty,
    gs_bucket,
    gs_server,
    proxied,
    s3_bucket,
    s3_server,
)
from devices import eight_devices  # noqa: F401 -- a fixture of several rooms
from jaxmoo.errors import DownloadError
from small_runs import (  # noqa: F401 -- fixtures of every room
    conversations,
    tiny_model,
    write_config,
)

# A script, which needs what the tests do without.
collect_ignore = ["aggregators/make_goldens.py"]


@pytest.fixture(autouse=True)
def own_token_cache(tmp_path_factory, monkeypatch):
    """Keep tokenised data of one test, which may have changed what tokenises, from all others."""
    own = functools.cache(tmp_path_factory.mktemp)

    def directory(where, kind):
        if where is None:
            return own(kind)
        where.mkdir(parents=True, exist_ok=True)
        return where

    monkeypatch.setattr("jaxmoo.data.token_cache.cache_directory", directory)


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
