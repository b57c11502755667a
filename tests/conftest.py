"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

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
