"""Directories of models: there whole or not at all, whatever happened to those before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from devices import ROOT
from jaxmoo.errors import CheckpointError
from jaxmoo.files.digests import DIGESTS, read_digests
from jaxmoo.hf.directory import new_directory, read_unchanged

WRITING = """
import sys, time
from pathlib import Path
from jaxmoo.hf.directory import new_directory
with new_directory(Path(sys.argv[1])) as directory:
    (directory / "weights").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_began_is_cleared_by_the_next_and_no_one_elses(tmp_path: Path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITING, out],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout.readline() == "writing\n"
    begun = {p.name for p in tmp_path.iterdir()}
    assert f".out.{process.pid}.tmp" in begun
    # It is alive: another that makes the same directory leaves it alone.
    with pytest.raises(RuntimeError, match="changed my mind"), new_directory(out):
        raise RuntimeError("changed my mind")
    assert {p.name for p in tmp_path.iterdir()} == begun

    process.send_signal(signal.SIGKILL)
    process.wait()
    others = tmp_path / f".out.more.{process.pid}.tmp"
    others.mkdir()
    with new_directory(out) as directory:
        (directory / "weights").write_text("whole")
    assert {p.name for p in tmp_path.iterdir()} == {"out", others.name}
    assert {p.name for p in out.iterdir()} == {"weights", DIGESTS}


def test_a_directory_is_read_only_as_it_was_written(tmp_path: Path):
    out = tmp_path / "out"
    with new_directory(out) as directory:
        (directory / "config.json").write_text("{}")
        (directory / "README.md").write_text("a card")
        (directory / "weights").write_bytes(bytes(3 << 20))
    assert set(read_digests(out).files) == {"config.json", "README.md", "weights"}
    (out / "README.md").write_text("my own words")
    (out / "notes.txt").write_text("mine")
    assert read_unchanged(lambda: "read", out) == "read"

    # A large file is checked while it is read, a small one before.
    begun = []
    for name, read in (("weights", 1), ("config.json", 1)):
        good = (out / name).read_bytes()
        (out / name).write_bytes(b"\1" + good[1:])
        with pytest.raises(
            CheckpointError, match=f"{name} is not what was written.*\n.*on purpose"
        ):
            read_unchanged(lambda: begun.append(1), out)
        assert len(begun) == read
        (out / name).write_bytes(good)
    (out / "weights").unlink()
    with pytest.raises(CheckpointError, match="weights is missing"):
        read_unchanged(lambda: None, out)
    # Forged digests lead nowhere else.
    (out / DIGESTS).write_text('{"files": {"/dev/zero": ""}, "about": {}, "own": ""}')
    with pytest.raises(CheckpointError, match=rf"{DIGESTS} is damaged"):
        read_unchanged(lambda: None, out)
    (out / DIGESTS).unlink()
    assert read_unchanged(lambda: "read", out) == "read"


def test_a_place_that_cannot_be_written_is_found_before_anything_is_made(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(CheckpointError, match="is a file; name a directory"),
        new_directory(tmp_path / "file" / "out"),
    ):
        pytest.fail("there is nowhere to write")
