"""What checkpoints promise: whole or not there, readable on other devices, the best one kept."""

import random
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from devices import run_python
from jaxmoo import mesh
from jaxmoo.errors import CheckpointError, DamagedError
from jaxmoo.files.digests import DIGESTS
from jaxmoo.runs.bucket_checkpoints import open_checkpoints
from jaxmoo.runs.checkpoint import Checkpoints, unchecked
from jaxmoo.runs.directory import RunDirectory


def state(value):
    return {"w": jnp.full((64, 64), value, jnp.float32), "step": jnp.int32(value)}


def check_other_meshes(path):
    """Save what lies on eight devices; restore it onto other meshes. Return how many."""
    values = {
        "layers.0.kernel": jnp.arange(3 * 8 * 16, dtype=jnp.float32).reshape(3, 8, 16),
        "norm": jnp.arange(16, dtype=jnp.bfloat16),
        "step": jnp.int32(7),
    }

    def placed(devices, **sizes):
        grid = mesh.make_mesh(4, devices=jax.devices()[:devices], **sizes)
        return jax.device_put(values, mesh.parameter_shardings(grid, values, stacked="^layers"))

    others = placed(1), placed(4, language=2, fsdp=2), placed(8, language=1, fsdp=8)
    with Checkpoints(path, keep=1) as checkpoints:
        checkpoints.save(7, placed(8, language=4, fsdp=2))
        checkpoints.wait()
        for like in others:
            found = checkpoints.restore(7, like)
            for name, value in values.items():
                assert found[name].sharding == like[name].sharding, name
                assert found[name].dtype == value.dtype
                assert np.array_equal(found[name], value), name
    return len(others)


def test_a_checkpoint_of_eight_devices_is_restored_onto_one_and_four(eight_devices, tmp_path):
    assert eight_devices("runs.test_checkpoint", "check_other_meshes", tmp_path) == 3


def test_the_newest_and_the_best_are_kept_and_what_was_cut_short_is_cleared(tmp_path):
    scores = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: float("nan")}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, state(step), {"note": step})
            checkpoints.wait()
            checkpoints.score(step, score)
        assert checkpoints.best() == 2
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [2, 4, 5]
    # What a kill leaves of one that was being written.
    (tmp_path / "6.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() == 5
        assert checkpoints.about(5) == {"note": 5}
        assert np.array_equal(checkpoints.restore(5, state(0))["w"], state(5)["w"])
        checkpoints.save(6, state(6))
    assert "6" in {p.name for p in tmp_path.iterdir()}


def test_a_damaged_or_unfitting_checkpoint_is_named(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, state(3))
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=r"3 cannot be restored.*\n.*remove that"):
            checkpoints.restore(3, {**state(0), "w": jnp.zeros((2, 2))})
        files = [p for p in (tmp_path / "3" / "state").rglob("*") if p.is_file()]
        large = max(files, key=lambda p: p.stat().st_size)
        large.write_bytes(large.read_bytes()[:100])
        with pytest.raises(CheckpointError, match=r"3 cannot be restored"):
            checkpoints.restore(3, state(0))


def mutate(file, chance):
    """Damage a file as disks, copies and people do; return how."""
    content = bytearray(file.read_bytes())
    kind = chance.choice(["flip", "cut", "zero", "grow", "remove"])
    if kind == "remove":
        file.unlink()
        return kind
    place = chance.randrange(len(content))
    if kind == "flip":
        content[place] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "zero":
        content[place : place + 16] = b"\xff" * len(content[place : place + 16])
    else:
        content += b"\0"
    file.write_bytes(content)
    return kind


def test_of_200_damages_to_any_file_none_changes_what_is_restored(tmp_path):
    random_bits = jnp.asarray(np.random.default_rng(0).standard_normal((40, 30), np.float32))
    saved = {"w": random_bits, "layers": jnp.ones((3, 5), jnp.bfloat16), "step": jnp.int32(7)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(7, saved, {"step": 7, "config": "seed: 0"})
    files = sorted(p for p in (tmp_path / "7").rglob("*") if p.is_file())
    good = {file: file.read_bytes() for file in files}
    chance, refused = random.Random(0), 0
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for _ in range(200):
            file = chance.choice(files)
            how = mutate(file, chance)
            try:
                about, found = checkpoints.about(7), checkpoints.restore(7, saved)
                assert about == {"step": 7, "config": "seed: 0"}
                assert jax.tree.all(jax.tree.map(np.array_equal, found, saved)), (file, how)
                # The library's notes for itself, or the digests as a whole, which are missed aloud.
                unread = {"_CHECKPOINT_METADATA", "commit_success.txt", DIGESTS}
                assert file.parent == tmp_path / "7" and file.name in unread, (file, how)
            except CheckpointError as error:
                refused += 1
                assert str(tmp_path / "7") in str(error) and file.name in str(error)
            file.write_bytes(good[file])
        assert refused > 150
        assert np.array_equal(checkpoints.restore(7, saved)["w"], saved["w"])


def test_damage_to_large_files_is_found_while_they_are_read_and_is_the_last_word(tmp_path, capfd):
    random_bits = np.random.default_rng(0).standard_normal((24, 256, 256), np.float32)
    saved = {f"w{i}": jnp.asarray(x) for i, x in enumerate(random_bits)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, saved)
        checkpoints.wait()
        large = max((tmp_path / "1").rglob("*"), key=lambda p: p.stat().st_size)
        content = bytearray(large.read_bytes())
        for place in range(0, len(content), len(content) // 50):
            content[place : place + 100] = bytes(100)
        large.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{large.name} is not what was written"):
            checkpoints.restore(1, saved)
    # What the library had begun to read complains, unless it is told not to.
    assert "Traceback" not in capfd.readouterr().err


def test_damaged_ones_are_set_aside_and_never_deleted(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 4):
            checkpoints.save(step, state(step), {"step": step})
        checkpoints.wait()
        assert (checkpoints.before(4), checkpoints.before(1)) == (2, None)
        for number in ("4", "4.1"):
            file = next(p for p in (tmp_path / "4" / "about").iterdir() if p.stat().st_size)
            file.write_bytes(file.read_bytes()[1:])
            damaged = file.read_bytes()
            with pytest.raises(DamagedError, match=f"{file.name} is not what was written"):
                checkpoints.about(4)
            place = tmp_path / "damaged" / number
            assert checkpoints.set_aside([4]) == {4: place}
            assert (place / "about" / file.name).read_bytes() == damaged
            assert checkpoints.latest() == 2
            checkpoints.save(4, state(4), {"step": 4})
            checkpoints.wait()
            assert checkpoints.latest() == 4 and checkpoints.about(4) == {"step": 4}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.latest() == 4


def test_in_a_bucket_damaged_ones_are_set_aside_too():
    run = RunDirectory("memory://set-aside/run")
    place = run.checkpoints / "damaged" / "4"
    with open_checkpoints(run, keep=3) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, state(step), {"step": step})
        checkpoints.wait()
    file = next(p for p in (run.checkpoints / "4" / "state").rglob("*") if p.stat().st_size > 99)
    file.write_bytes(bytes(100))
    with open_checkpoints(run, keep=3) as checkpoints:
        with pytest.raises(DamagedError, match=f"{run.checkpoints}/4 .*{file.name} is not what"):
            checkpoints.restore(4, state(0))
        assert checkpoints.before(4) == 2 and checkpoints.before(2) is None
        assert checkpoints.set_aside([4]) == {4: place}
        assert checkpoints.latest() == 2 and run.steps() == [2]
        assert (place / file.relative_to(run.checkpoints / "4")).read_bytes() == bytes(100)
        assert checkpoints.restore(2, state(0))["step"] == 2
        checkpoints.save(4, state(4), {"step": 4})
        checkpoints.wait()
    with open_checkpoints(run, keep=3) as checkpoints:
        assert checkpoints.latest() == 4 and checkpoints.restore(4, state(0))["step"] == 4


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, state(3), {"step": 3})
    shutil.copytree(tmp_path / "3", tmp_path / "9")
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.latest() == 9
        for read in (checkpoints.about, lambda step: checkpoints.restore(step, state(0))):
            with pytest.raises(CheckpointError, match="9 is that of step 3: it was renamed"):
                read(9)
        assert checkpoints.restore(3, state(0))["step"] == 3
        # One of an earlier version says it itself.
        (tmp_path / "9" / DIGESTS).unlink()
        with pytest.raises(CheckpointError, match="9 is that of step 3: it was renamed"):
            checkpoints.about(9)


def test_damaged_notes_of_the_library_are_an_error_that_names_the_directory(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, state(3))
    (tmp_path / "3" / "_CHECKPOINT_METADATA").write_text("[]")
    with pytest.raises(CheckpointError, match=f"{tmp_path} cannot be listed"):
        Checkpoints(tmp_path, keep=2)


def test_keys_of_earlier_versions_become_the_numbers_that_they_stand_for(tmp_path):
    key = jax.random.key(5)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, {"key": key})
        found = checkpoints.restore(3, {"key": jax.random.key_data(jax.random.key(0))})
    assert found["key"].dtype == jnp.uint32
    assert np.array_equal(found["key"], jax.random.key_data(key))


def test_checkpoints_of_earlier_versions_are_read_and_said_to_be_unchecked(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, state(3))
    assert unchecked(tmp_path, 3, {}) is None
    (tmp_path / "3" / DIGESTS).unlink()
    assert "3 has no digests" in unchecked(tmp_path, 3, {})
    with pytest.raises(CheckpointError, match=rf"3 is damaged: {DIGESTS} is missing"):
        unchecked(tmp_path, 3, {"digests": True})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(3, state(0))["step"] == 3


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import jax.numpy as jnp
from jaxmoo.runs.bucket_checkpoints import open_checkpoints
from jaxmoo.runs.checkpoint import Checkpoints, UnsavedError

state = {"w": jnp.arange(1 << 20, dtype=jnp.float32)}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with Checkpoints(Path(sys.argv[1]), keep=1) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        # From here on no file may become larger than this, as if the disk were full.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        checkpoints.save(2, state)
        checkpoints.wait()
except UnsavedError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with Checkpoints(Path(sys.argv[1]), keep=1) as checkpoints:
    assert checkpoints.latest() == 1
    assert (checkpoints.restore(1, state)["w"] == state["w"]).all()
    print("restored")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of file sizes as Linux has them")
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    done = run_python(["-c", FULL_DISK, tmp_path], PYTHONPATH=".")
    assert "could not be written" in done.stdout
    assert "The checkpoint of step 1 is whole" in done.stdout
    assert done.stdout.splitlines()[-1] == "restored"
