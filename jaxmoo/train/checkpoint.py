"""Checkpoints of a run: what they hold, and how they are read back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxmoo.errors import CheckpointError
from jaxmoo.train.distributed import from_first

__all__ = ["ABOUT", "STATE", "Checkpoints", "UnsavedError"]

# What a checkpoint is made of, each in a directory of that name.
STATE, ABOUT = "state", "about"


class UnsavedError(CheckpointError):
    """A checkpoint could not be written; those before it are whole."""

    exit_code = 1


class Checkpoints:
    """The checkpoints of one run, in ``directory/STEP``.

    A checkpoint appears under its final name only when it is complete. Writing goes on in the
    background; leaving the context, or saving again, waits for it. In several processes, each
    writes and reads its own part, and all must call every method alike.

    Kept are the newest and the one with the lowest score, of those whose score is known.

    Args:
      directory: where checkpoints are kept; made when it does not exist. All processes see it.
      keep: how many of the newest to keep.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        self._directory = directory
        self._kept = _NewestAndBest(keep)
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            item_names=(STATE, ABOUT),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
                create=True,
                # What a killed run left half written.
                cleanup_tmp_directories=True,
            ),
        )
        found = self._manager.latest_step()
        step = from_first(-1 if found is None else found)
        self._latest = None if step < 0 else step

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._writing():
            self._manager.close()

    def latest(self) -> int | None:
        """Return the step of the newest checkpoint, complete or being written, or None."""
        return self._latest

    def score(self, step: int, score: float) -> None:
        """Note how good the state of a step is, lower being better, to keep the best."""
        self._kept.scores[step] = score

    def best(self) -> int | None:
        """Return the step with the lowest score among the checkpoints that there are, or None."""
        return self._kept.best(self._manager.all_steps())

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
        items = {STATE: ocp.args.StandardSave(state), ABOUT: ocp.args.JsonSave(dict(about or {}))}
        with self._writing():
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
        """Return what was saved beside the state."""
        with self._reading(step):
            items = {ABOUT: ocp.args.JsonRestore()}
            return self._manager.restore(step, args=ocp.args.Composite(**items))[ABOUT]

    def restore(self, step: int, like: Any) -> Any:
        """Read a state straight into place.

        Args:
          step: which one.
          like: pytree of arrays, or their shapes, with the dtypes and shardings to restore to;
            these need not be those it was saved with.

        Raises:
          CheckpointError: the checkpoint cannot be read, or does not fit ``like``.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        with self._reading(step):
            items = {STATE: ocp.args.StandardRestore(abstract)}
            return self._manager.restore(step, args=ocp.args.Composite(**items))[STATE]

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        # A damaged checkpoint fails in any way at all inside the library.
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint {self._directory / str(step)} cannot be restored: {error}\n"
                "If it is damaged, remove that directory; the run resumes from an older one, or "
                "from the beginning."
            ) from error

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


class _NewestAndBest:
    """Says which checkpoints are kept when another has been written; the library asks."""

    def __init__(self, newest: int) -> None:
        self._newest = ocp.checkpoint_managers.LatestN(newest)
        self.scores: dict[int, float] = {}

    def best(self, steps: Iterable[int]) -> int | None:
        return min((s for s in steps if s in self.scores), key=self.scores.get, default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        newest = self._newest.should_preserve(checkpoints, context=context)
        best = self.best(checkpoint.step for checkpoint in checkpoints)
        return [new or c.step == best for new, c in zip(newest, checkpoints, strict=True)]
