"""Checkpoints of a run in a bucket: saved on this machine by Orbax, then sent to the bucket.

Orbax 0.12.8 writes arrays to disks and to Google Cloud Storage, and to no other store. Here it
writes to a scratch directory, as on any disk, and what it has written is sent while training goes
on. A checkpoint's ``digests.json`` is sent when all its other files are there, and removed first: a
step without it is no checkpoint, and nothing in a bucket needs to be renamed.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from filelock import FileLock

from jaxmoo.errors import ConfigError
from jaxmoo.files.appended import send_appended
from jaxmoo.files.buckets import is_bucket
from jaxmoo.files.digests import DIGESTS, files_below
from jaxmoo.files.scratch import copy_files, scratch_of, send_directory
from jaxmoo.hf.directory import remove_directory
from jaxmoo.runs.checkpoint import (
    DAMAGED,
    Checkpoints,
    UnsavedError,
    fetch_step,
    free_name,
    lowest,
    named_as,
)
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.runs.parts import Parts
from jaxmoo.runtime.processes import barrier, everywhere, from_first, is_first

__all__ = ["BucketCheckpoints", "open_checkpoints"]

# Below the run's directory, what other hosts have written of a checkpoint.
_PARTS = ".parts"
_TRIES = 3  # to send a checkpoint; the stores' own libraries repeat single requests


def open_checkpoints(directory: RunDirectory, *, keep: int) -> Checkpoints:
    """Return the checkpoints of a run, wherever they are; arguments as of :class:`Checkpoints`."""
    if is_bucket(directory.path):
        return cast("Checkpoints", BucketCheckpoints(directory, keep=keep))
    return Checkpoints(directory.checkpoints, keep=keep)


class BucketCheckpoints:
    """The checkpoints of one run, in ``directory/STEP`` of a bucket.

    See :class:`Checkpoints`, which does the work here; the same holds of several processes. Hosts
    need not share a disk: the first one gathers what the others have written, and every host
    fetches what it reads.

    Args:
      directory: the run's.
      keep: how many of the newest to keep, besides the best.

    Raises:
      ConfigError: no scratch directory can be made.
      CheckpointError: the newest cannot be fetched, or is damaged.
    """

    def __init__(self, directory: RunDirectory, *, keep: int) -> None:
        self._run, self._remote, self._keep = directory, directory.checkpoints, keep
        self._scores: dict[int, float] = {}
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._stop = threading.Event()
        # A place that no process has used before: what lies in older ones may be of anything.
        root, token = scratch_of(directory.path), from_first(secrets.randbits(31))
        self._local_path = root / f"checkpoints-{token:08x}"
        self._shared = _make_scratch(self._local_path)
        if is_first():
            self._remove_unfinished()
        barrier("the bucket holds only whole checkpoints")
        steps = directory.steps()
        step = from_first(max(steps, default=-1))
        self._latest = None if step < 0 else step
        if self._latest is not None:
            self._fetch(self._latest)
        parts = None if self._shared else Parts(self._run.path / _PARTS / f"{token:08x}")
        self._local = Checkpoints(self._local_path, keep=1, parts=parts)

    def __enter__(self) -> BucketCheckpoints:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._local.__exit__()
        finally:
            self._stop.set()  # what has no name here by now will never have one
            self._join()
            if is_first() or not self._shared:
                shutil.rmtree(self._local_path, ignore_errors=True)
        self._raise()

    def latest(self) -> int | None:
        """Return the step of the newest checkpoint, complete or being sent, or None."""
        return self._latest

    def before(self, step: int) -> int | None:
        """Return the step of the checkpoint before another, or None."""
        steps = self._run.steps() if is_first() else []
        older = from_first(max((s for s in steps if s < step), default=-1))
        return None if older < 0 else older

    def set_aside(self, steps: Iterable[int]) -> dict[int, Path]:
        """Move checkpoints out of the way; see `Checkpoints.set_aside`.

        Nothing in a bucket can be renamed: they are sent to their new place, then removed.

        Raises:
          UnsavedError: they cannot be sent.
        """
        moved, steps = {}, list(steps)
        if is_first():
            with self._sending():
                for step in steps:
                    moved[step] = free_name(self._remote / DAMAGED / str(step))
                    send_directory(self._local_path / str(step), moved[step])
                    remove_directory(self._remote / str(step))
        barrier("damaged checkpoints are set aside")
        if is_first() or not self._shared:
            for step in steps:
                shutil.rmtree(self._local_path / str(step), ignore_errors=True)
        barrier("damaged checkpoints are gone from this machine")
        self._local.reload()
        found = from_first(max(self._run.steps(), default=-1) if is_first() else -1)
        self._latest = None if found < 0 else found
        return moved

    def score(self, step: int, score: float) -> None:
        """Note how good the state of a step is, lower being better, to keep the best."""
        self._scores[step] = score

    def best(self) -> int | None:
        """Return the step with the lowest score among the checkpoints that there are, or None."""
        found = lowest(self._run.steps() if is_first() else [], self._scores)
        step = from_first(-1 if found is None else found)
        return None if step < 0 else step

    def save(self, step: int, state: Any, about: Mapping[str, Any] | None = None) -> None:
        """Write the checkpoint of a step, unless it exists already; see `Checkpoints.save`.

        Raises:
          UnsavedError: this one, or the one before it, cannot be written or sent.
        """
        if self._latest == step:
            return
        self.wait()
        if is_first():
            # The rows of metrics up to a checkpoint are never missing where it is.
            with self._sending():
                send_appended()
                send_directory(self._run.scratch / "tensorboard", self._run.tensorboard)
        self._local.save(step, state, about)
        self._latest = step
        if is_first():
            self._thread = threading.Thread(target=self._deliver, args=(step,), daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait until everything saved is in the bucket.

        Raises:
          UnsavedError: it cannot be written or sent.
        """
        self._local.wait()
        self._join()
        if not self._shared and not is_first():  # on this host it gets no name
            for part in self._local_path.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)
        failed = from_first(self._failure is not None)
        self._raise()
        if failed:
            raise UnsavedError("A checkpoint could not be sent; the first process says why.")

    def about(self, step: int) -> dict[str, Any]:
        """Return what was saved beside the state; see `Checkpoints.about`."""
        self._fetch(step)
        with named_as(self._remote, self._local_path):
            return self._local.about(step)

    def restore(self, step: int, like: Any) -> Any:
        """Read a state straight into place; see `Checkpoints.restore`."""
        self._fetch(step)
        with named_as(self._remote, self._local_path):
            return self._local.restore(step, like)

    def _fetch(self, step: int) -> None:
        """Copy a checkpoint to this host, unless it is here; one process does it for all."""
        target = self._local_path / str(step)
        with FileLock(target.with_suffix(".lock")):
            if not target.exists():
                fetch_step(self._remote / str(step), target)

    def _remove_unfinished(self) -> None:
        """Remove what a killed run had begun to send, or to remove."""
        whole = set(self._run.steps())
        for place in self._remote.iterdir() if self._remote.is_dir() else ():
            if place.name.isdecimal() and int(place.name) not in whole:
                remove_directory(place)
        remove_directory(self._run.path / _PARTS)

    def _deliver(self, step: int) -> None:
        """Send a checkpoint when it is whole here; then remove those that are no longer kept."""
        source, target = self._local_path / str(step), self._remote / str(step)
        # It gets its name when it is whole.
        while not (source / DIGESTS).exists():
            if self._stop.wait(0.05) and not (source / DIGESTS).exists():
                return
        for left in reversed(range(_TRIES)):
            try:
                copy_files(source, target, (n for n in files_below(source) if n != DIGESTS))
                (target / DIGESTS).write_bytes((source / DIGESTS).read_bytes())
                self._prune()
                return
            except Exception as error:
                if not left:
                    self._failure = error
                    return
                time.sleep(2.0 ** (_TRIES - left))

    def _prune(self) -> None:
        steps = self._run.steps()
        kept = {*steps[-self._keep :], lowest(steps, self._scores)}
        for step in set(steps) - kept:
            remove_directory(self._remote / str(step))

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise self._unsent(failure)

    def _unsent(self, failure: Exception) -> UnsavedError:
        try:
            whole = self._run.steps()
        except OSError:
            whole = []
        kept = f"The checkpoint of step {whole[-1]} is whole" if whole else "There is no other"
        return UnsavedError(
            f"A checkpoint could not be sent to {self._remote}: {failure}\n{kept}. When the bucket "
            "can be written to again, the same command goes on from there."
        )

    @contextlib.contextmanager
    def _sending(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unsent(error) from error


def _make_scratch(path: Path) -> bool:
    """Make a directory on each host, rid of what killed runs have left; are all the same one?"""
    mark = path / "shared"
    try:
        path.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob("checkpoints-*"):
            if other != path:
                shutil.rmtree(other, ignore_errors=True)
        if is_first():
            mark.touch()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be made: {error}. Name a directory with room for two checkpoints in "
            "the environment variable JAXMOO_SCRATCH."
        ) from error
    barrier("the scratch directory is made")
    return everywhere(mark.exists())
