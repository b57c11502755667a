"""Where a directory in a bucket has what only works on this machine."""

import os
import tempfile

import pytest

from jaxmoo.errors import ConfigError
from jaxmoo.files.outputs import typed_path
from jaxmoo.files.scratch import scratch_of

BUCKET = typed_path("memory://bucket/run")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("JAXMOO_SCRATCH", raising=False)
    return tmp_path


def test_it_is_the_users_alone(temporary):
    place = scratch_of(BUCKET)
    assert place == scratch_of(BUCKET) and place.parent.parent == temporary
    assert place.parent.stat().st_mode & 0o077 == 0


def test_one_that_another_has_laid_out_is_refused(temporary):
    (temporary / "theirs").mkdir()
    (temporary / f"jaxmoo-{os.getuid()}").symlink_to(temporary / "theirs")
    with pytest.raises(ConfigError, match="belongs to another user"):
        scratch_of(BUCKET)


def test_it_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXMOO_SCRATCH", str(tmp_path))
    assert scratch_of(BUCKET).parent == tmp_path
