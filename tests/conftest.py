"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

# The suite's time is the compiler's, much of it spent on machine code that runs once. The passes
# over whole programs, which decide memory and traffic, are not affected. Set before JAX is imported
# and inherited by every process that a test starts.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import pytest

from jaxmoo.errors import DownloadError


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
