"""Checkpoints of a run: what they hold, and how they are read back."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxmoo.errors import CheckpointError, DamagedError
from jaxmoo.files.buckets import is_bucket
from jaxmoo.files.digests import (
    DIGESTS,
    agree_whole,
    files_below,
    note_own_digests,
    read_checked,
    read_digests,
    write_digests,
)
from jaxmoo.files.scratch import copy_files
from jaxmoo.runs.parts import Parts
from jaxmoo.runtime.processes import barrier, from_first, is_first

__all__ = [
    "ABOUT",
    "DAMAGED",
    "STATE",
    "Checkpoints",
    "UnsavedError",
    "fetch_step",
    "free_name",
    "lowest",
    "named_as",
    "read_about",
    "read_item",
    "unchecked",
]

T = TypeVar("T")

# What a checkpoint is made of, each in a directory of that name.
STATE, ABOUT = "state", "about"
# Where damaged ones are put; not the name of a step, so nothing takes it for one.
DAMAGED = "damaged"
_ADVICE = (
    "If it is damaged, remove that directory; the run resumes from an older one, or from the "
    "beginning."
)


class UnsavedError(CheckpointError):
    """A checkpoint could not be written; those before it are whole."""

    exit_code = 1


def fetch_step(source: Path, target: Path, item: str | None = None) -> None:
    """Copy a checkpoint from a bucket to this machine; it appears when it is whole.

    Args:
      source: the checkpoint.
      target: a new directory.
      item: the part that is wanted; by default all of it.

    Raises:
      CheckpointError: the checkpoint cannot be fetched: a file is missing, say.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        names = files_below(source)
        if item is not None:  # what lies beside the parts is small
            names = [name for name in names if "/" not in name or name.startswith(f"{item}/")]
        copy_files(source, partial, names)
        os.replace(partial, target)
    except OSError as error:
        raise CheckpointError(f"The checkpoint {source} cannot be fetched: {error}") from error


@contextlib.contextmanager
def named_as(remote: Path, local: Path) -> Iterator[None]:
    """Let errors about a copy name the place that people know."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(str(error).replace(str(local), str(remote))) from error


def read_item(directory: Path, step: int, item: str, read: Callable[[Path], T]) -> T:
    """Read a part of a checkpoint, and check it meanwhile.

    Several processes call together.

    Args:
      directory: where the run's checkpoints are.
      step: which one.
      item: the part, ``STATE`` or ``ABOUT``.
      read: reads it, given its directory.

    Raises:
      DamagedError: it is damaged. It names the directory, and the file if one is to blame.
      CheckpointError: it cannot be read, or is that of another step.
    """
    if is_bucket(directory):
        with tempfile.TemporaryDirectory() as folder, named_as(directory, Path(folder)):
            fetch_step(directory / str(step), Path(folder) / str(step), item)
            return read_item(Path(folder), step, item, read)
    path = directory.absolute() / str(step)
    says = f"The checkpoint {directory / str(step)} cannot be restored"
    digests, problems = None, []
    try:
        digests = read_digests(path)
    except DamagedError as error:
        problems.append(str(error))
    except CheckpointError as error:
        raise CheckpointError(f"{says}: {error}.\n{_ADVICE}") from None
    agree_whole(problems, says=says, advice=_ADVICE)
    if digests is not None:
        _check_step(directory, step, digests.about.get("step"))
    files = {} if digests is None else digests.files
    files = {name: digest for name, digest in files.items() if name.startswith(f"{item}/")}
    return read_checked(lambda: read(path / item), path, files, says=says, advice=_ADVICE)


def _check_step(directory: Path, step: int, found: Any) -> None:
    if found != step:
        raise CheckpointError(
            f"The checkpoint {directory / str(step)} is that of step {found}: it was renamed or "
            "copied. Give it its own name again, or remove that directory."
        )


def unchecked(directory: Path, step: int, about: Mapping[str, Any]) -> str | None:
    """Return what a person should know about a checkpoint that cannot be checked, if it is one.

    Args:
      directory: where the run's checkpoints are.
      step: which one.
      about: what was saved beside its state.

    Raises:
      DamagedError: it had digests, which are gone.
    """
    path = directory / str(step)
    if (path / DIGESTS).exists():
        return None
    if about.get("digests"):
        raise DamagedError(f"The checkpoint {path} is damaged: {DIGESTS} is missing.\n{_ADVICE}")
    return (
        f"The checkpoint {path} has no digests ({DIGESTS}), as those of earlier versions: it is "
        "not checked for damage."
    )


def read_about(directory: Path, step: int) -> dict[str, Any]:
    """Return what was saved beside the state of a step.

    Args:
      directory: where the run's checkpoints are.
      step: which one.

    Raises:
      CheckpointError: as :func:`read_item` does.
    """
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        about = read_item(directory, step, ABOUT, reader.restore)
    if not isinstance(about, dict):
        raise DamagedError(
            f"The checkpoint {directory / str(step)} is damaged: {ABOUT} holds no JSON object."
            f"\n{_ADVICE}"
        )
    # Those of earlier versions have no digests, which would say so, but may say it themselves.
    _check_step(directory, step, about.get("step", step))
    return about


class Checkpoints:
    """The checkpoints of one run, in ``directory/STEP``.

    A checkpoint appears under its final name only when it is complete, with digests of its files,
    which are checked when it is read (:mod:`jaxmoo.files.digests`). Writing goes on in the
    background; leaving the context, or saving again, waits for it. In several processes, each
    writes and reads its own part, and all must call every method alike.

    Kept are the newest and the one with the lowest score, of those whose score is known.

    Args:
      directory: where checkpoints are kept; made when it does not exist. All processes see it.
      keep: how many of the newest to keep.
      parts: brings together what hosts write that share no disk.
    """

    def __init__(self, directory: Path, *, keep: int, parts: Parts | None = None) -> None:
        self._directory = directory
        self._kept = _NewestAndBest(keep)
        try:
            self._manager = ocp.CheckpointManager(
                directory.absolute(),
                item_names=(STATE, ABOUT),
                item_handlers={STATE: _StateHandler(parts)},
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._kept,
                    create=True,
                    # What a killed run left half written.
                    cleanup_tmp_directories=True,
                    async_options=ocp.options.AsyncOptions(post_finalization_callback=self._digest),
                ),
            )
        # Damaged notes of the library's own, or a directory that cannot be read or made.
        except Exception as error:
            raise CheckpointError(
                f"The checkpoints in {directory} cannot be listed: {error}\n"
                "Remove the one that is damaged, or choose another output=..."
            ) from error
        self._latest = self._newest()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        with self._writing():
            self._manager.close()

    def latest(self) -> int | None:
        """Return the step of the newest checkpoint, complete or being written, or None."""
        return self._latest

    def before(self, step: int) -> int | None:
        """Return the step of the checkpoint before another, or None."""
        found = max((s for s in self._manager.all_steps() if s < step), default=-1)
        older = from_first(found)
        return None if older < 0 else older

    def set_aside(self, steps: Iterable[int]) -> dict[int, Path]:
        """Move checkpoints out of the way, to be looked at by a person.

        Args:
          steps: which ones.

        Returns:
          Where they are now; the first process knows.

        Raises:
          UnsavedError: they cannot be moved.
        """
        aside, moved = self._directory / DAMAGED, {}
        with self._writing():
            if is_first():
                aside.mkdir(exist_ok=True)
                for step in steps:
                    moved[step] = free_name(aside / str(step))
                    (self._directory / str(step)).rename(moved[step])
            barrier("damaged checkpoints are set aside")
        self.reload()
        return moved

    def reload(self) -> None:
        """Look again which there are; all processes see the same."""
        self._manager.reload()
        self._latest = self._newest()

    def score(self, step: int, score: float) -> None:
        """Note how good the state of a step is, lower being better, to keep the best."""
        self._kept.scores[step] = score

    def best(self) -> int | None:
        """Return the step with the lowest score among the checkpoints that there are, or None."""
        return lowest(self._manager.all_steps(), self._kept.scores)

    def save(self, step: int, state: Any, about: Mapping[str, Any] | None = None) -> None:
        """Write the checkpoint of a step, unless it exists already.

        Args:
          step: the steps done.
          state: pytree of arrays; they are copied before this returns.
          about: what else belongs to it, as JSON holds it.

        Raises:
          UnsavedError: this one, or the one before it, cannot be written.
        """
        if self._latest == step:
            return
        items = {STATE: _StateSave(state), ABOUT: ocp.args.JsonSave(dict(about or {}))}
        with self._writing():
            self._manager.wait_until_finished()
            self._saving = int(step)
            self._manager.save(step, args=ocp.args.Composite(**items))
        self._latest = step

    def wait(self) -> None:
        """Wait until everything saved is on disk.

        Raises:
          UnsavedError: it cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def about(self, step: int) -> dict[str, Any]:
        """Return what was saved beside the state.

        Raises:
          CheckpointError: as :func:`read_item` does.
        """
        return read_about(self._directory, step)

    def restore(self, step: int, like: Any) -> Any:
        """Read a state straight into place.

        Args:
          step: which one.
          like: pytree of arrays, or their shapes, with the dtypes and shardings to restore to;
            these need not be those it was saved with.

        Raises:
          CheckpointError: the checkpoint cannot be read, is damaged or of another step, or does
            not fit ``like``.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = ocp.args.Composite(**{STATE: _StateRestore(abstract)})

        def read(_: Path) -> Any:
            found = self._manager.restore(step, args=arguments)[STATE]
            return jax.tree.map(_raw_key, found, abstract)

        return read_item(self._directory, step, STATE, read)

    def _newest(self) -> int | None:
        found = self._manager.latest_step()
        step = from_first(-1 if found is None else found)
        return None if step < 0 else step

    def _digest(self) -> None:
        """Write the digests of a checkpoint that is complete, but has no name yet."""
        name = str(self._saving)
        # While it is written it has a longer one, or on some file systems lacks a mark.
        unnamed = self._directory.glob(f"{name}.orbax-checkpoint-tmp*")
        root = next(unnamed, self._directory / name)
        # The library still writes facts of its own beside these.
        write_digests(root, {"step": self._saving}, within=(STATE, ABOUT))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        # A full disk fails in any way at all inside the library.
        except Exception as error:
            whole = sorted(int(p.name) for p in self._directory.iterdir() if p.name.isdecimal())
            kept = f"The checkpoint of step {whole[-1]} is whole" if whole else "There is no other"
            raise UnsavedError(
                f"A checkpoint could not be written to {self._directory}: {error}\n{kept}. When "
                "there is room, the same command goes on from there."
            ) from error


def lowest(steps: Iterable[int], scores: Mapping[int, float]) -> int | None:
    """Return the step with the lowest score of those that have one, or None."""
    return min((step for step in steps if step in scores), key=scores.__getitem__, default=None)


def free_name(path: Path) -> Path:
    """Return a name like this one that nothing has."""
    names = itertools.chain(
        [path], (path.with_name(f"{path.name}.{i}") for i in itertools.count(1))
    )
    return next(name for name in names if not name.exists())


def _raw_key(found: Any, like: Any) -> Any:
    """Take a key's data where they are wanted: earlier versions stored keys as such."""
    if jnp.issubdtype(found.dtype, jax.dtypes.prng_key) and found.dtype != like.dtype:
        return jax.device_put(jax.random.key_data(found), like.sharding)
    return found


class _StateHandler(ocp.StandardCheckpointHandler):
    """Writes a state; of several processes, each also the digests of the files it has written."""

    def __init__(self, parts: Parts | None = None) -> None:
        super().__init__()
        self._parts = parts

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[Any]:
        if self._parts is not None and jax.process_index() > 0:
            # The library makes these on the first host, and waits here until they are there.
            place = Path(getattr(directory, "path", directory), "array_metadatas")
            place.mkdir(parents=True, exist_ok=True)
        written = await super().async_save(directory, *args, **kwargs) or []
        if jax.process_count() == 1:
            return written
        return [*written, _OwnDigests(directory, written, self._parts)]

    def finalize(self, directory: Any) -> None:
        if self._parts is not None:
            self._parts.collect(Path(directory))
        super().finalize(directory)


@ocp.args.register_with_handler(_StateHandler, for_save=True)
class _StateSave(ocp.args.StandardSave):
    """A state to be saved."""


@ocp.args.register_with_handler(_StateHandler, for_restore=True)
class _StateRestore(ocp.args.StandardRestore):
    """A state to be restored."""


class _OwnDigests:
    """Notes the digests of a process's own files when these are written; as Orbax waits for it."""

    def __init__(self, directory: Any, written: Sequence[Any], parts: Parts | None) -> None:
        self._directory = Path(getattr(directory, "path", directory))
        self._written, self._parts = written, parts

    def result(self, timeout: float | None = None) -> None:
        for future in self._written:
            future.result(timeout)
        note_own_digests(self._directory)
        if self._parts is not None:
            self._parts.send(self._directory)


class _NewestAndBest:
    """Says which checkpoints are kept when another has been written; the library asks."""

    def __init__(self, newest: int) -> None:
        self._newest = ocp.checkpoint_managers.LatestN(newest)
        self.scores: dict[int, float] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        newest = self._newest.should_preserve(checkpoints, context=context)
        best = lowest((checkpoint.step for checkpoint in checkpoints), self.scores)
        return [new or c.step == best for new, c in zip(newest, checkpoints, strict=True)]
