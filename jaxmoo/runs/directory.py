"""The directory of a run: what lies where, and to which run it belongs."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxmoo.config import Config, dated, differences, load_config, to_yaml
from jaxmoo.config.optimizer_section import steps_advice
from jaxmoo.errors import CheckpointError, ConfigError
from jaxmoo.files.atomic import replace_text
from jaxmoo.files.buckets import is_bucket
from jaxmoo.files.digests import DIGESTS
from jaxmoo.files.locks import Lock, Timeout, lock_of
from jaxmoo.files.outputs import PROBE, check_writable, typed_path
from jaxmoo.files.scratch import scratch_of, send_directory
from jaxmoo.runs.scores import LanguageScore, SampleReply
from jaxmoo.runtime.processes import barrier, is_first

__all__ = ["RunDirectory"]

# What a run may have left that was killed before its directory had a config.
_FIRST_FILES = {".lock", ".config.yaml.partial"}
# Seconds for which a run waits for another to leave its directory, and for files to be seen by all.
_PATIENCE = 10


class RunDirectory:
    """The output directory of one run.

    ::

        config.yaml      the settings it was started with
        metrics.jsonl    one row per step
        grams/           inner products of the languages' gradients, by step
        tensorboard/     the same as TensorBoard events
        checkpoints/     by step
        evaluation/      held-out scores and sample replies by step
        results.json     held-out scores before and after, their means, and what was exported
        compiled/        programs, so that a resumed run need not compile them again
        profile/         what devices and host did in a few steps, if asked
        report/          plots and a page that shows them
        export/          the trained model in Hugging Face format
        adapter/         the trained adapters in PEFT format

    What is being written, or says who writes, begins with a dot.

    Args:
      path: the directory; need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = typed_path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.grams = self.path / "grams"
        # What libraries write that know no buckets; of a run on this machine its own directory.
        self.scratch = scratch_of(self.path)
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.evaluation = self.path / "evaluation"
        self.compiled = self.scratch / "compiled"
        self.profile = self.scratch / "profile"
        self.report = self.path / "report"
        self.export = self.path / "export"
        self.adapter = self.path / "adapter"
        self.results = self.path / "results.json"

    def resumed(self, config: Config) -> Config:
        """Return settings with the date that the run here began with, where they give none."""
        if config.data.date is not None or not self.config.is_file():
            return config
        return dated(config, load_config(self.config).data.date)

    def check(self, config: Config) -> None:
        """Raise unless a run with these settings may start, or resume, here.

        Raises:
          ConfigError: the directory belongs to a run with other settings, or to something else,
            or nothing can be written there.
        """
        check_writable(self.path, "output")
        there: set[str] = set()
        with contextlib.suppress(FileNotFoundError):
            there = {p.name for p in self.path.iterdir() if not p.name.startswith(PROBE)}
        if there <= _FIRST_FILES:
            return
        if not self.config.exists():
            raise ConfigError(
                f"output: {self.path} is not empty and holds no run (no config.yaml). Choose "
                "another directory with output=..."
            )
        old, done = load_config(self.config), max(self.steps(), default=0)
        changed = differences(old, config, done)
        if changed:
            advice = ""
            if any(text.startswith("train.steps:") for text in changed):
                advice = "\n" + steps_advice(old.optimizer, old.train.steps, done)
            raise ConfigError(
                f"output: {self.path} holds a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nGo on with that run's settings, or start a new one with output=..."
                + advice
            )

    @contextlib.contextmanager
    def claim(self, config: Config) -> Iterator[None]:
        """Make the directory that of a run with these settings, and of nobody else meanwhile.

        All processes of the run call this together.

        Raises:
          ConfigError: another run is at work here, or the processes do not see the same directory.
        """
        lock = lock_of(self.path / ".lock")
        try:
            if is_first():
                self._make()
                self._acquire(lock)
                self.check(config)
                replace_text(self.config, to_yaml(config))
            barrier("the directory of the run is made")
            self._see(config)
            yield
        finally:
            if is_first():
                self._send()
            lock.release()

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output: {self.path} cannot be made: {error}") from error

    def _send(self) -> None:
        """Send what libraries have written for people; no run fails for it."""
        with contextlib.suppress(OSError):
            for name in ("tensorboard", "profile"):
                send_directory(self.scratch / name, self.path / name)

    def _acquire(self, lock: Lock) -> None:
        try:
            lock.acquire(timeout=_PATIENCE)
        except Timeout as error:
            raise ConfigError(
                f"output: another run is at work in {self.path}. Wait for it, end it, or choose "
                "another directory with output=..."
            ) from error
        except (NotImplementedError, OSError) as error:
            if is_bucket(self.path):
                raise ConfigError(f"output: {self.path} cannot be claimed: {error}") from error
            # A file system without locks: nobody can tell, and the run need not fail for that.
            return

    def _see(self, config: Config) -> None:
        """Make sure that this process sees what the first one writes."""
        # A file system over a network may take its time.
        deadline = time.monotonic() + _PATIENCE
        while not self.config.exists():
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"output: process {jax.process_index()} does not see what process 0 writes to "
                    f"{self.path}. Name a directory on a file system that all hosts share."
                )
            time.sleep(0.1)
        self.check(config)

    def steps(self) -> list[int]:
        """Return the steps of which there is a complete checkpoint, in order."""
        if not self.checkpoints.is_dir():
            return []
        # An incomplete one has a longer name, or, in a bucket, no digests yet.
        found = [p for p in self.checkpoints.iterdir() if p.name.isdecimal()]
        if is_bucket(self.path):
            found = [p for p in found if (p / DIGESTS).is_file()]
        return sorted(int(p.name) for p in found)

    def scores(self, step: int) -> dict[str, LanguageScore] | None:
        """Return the held-out scores stored for a step, or None."""
        file = self.evaluation / f"step_{step:08d}.json"
        if not file.exists():
            return None
        stored = _read(file)
        try:
            return {code: LanguageScore.from_dict(values) for code, values in stored.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _damaged(file, repr(error)) from error

    def store_scores(self, step: int, scores: Mapping[str, LanguageScore]) -> None:
        """Store held-out scores of a step."""
        self.evaluation.mkdir(exist_ok=True)
        text = json.dumps({code: score.to_dict() for code, score in scores.items()}, indent=2)
        replace_text(self.evaluation / f"step_{step:08d}.json", text + "\n")

    def all_scores(self) -> dict[int, dict[str, LanguageScore]]:
        """Return the held-out scores of every step that has some, in order."""
        files = self.evaluation.glob("step_*.json") if self.evaluation.is_dir() else ()
        steps = sorted(int(p.stem.removeprefix("step_")) for p in files)
        return {step: found for step in steps if (found := self.scores(step)) is not None}

    def replies(self, step: int) -> dict[str, list[SampleReply]] | None:
        """Return the sample replies stored for a step, or None."""
        file = self.evaluation / f"replies_{step:08d}.json"
        if not file.exists():
            return None
        stored = _read(file)
        try:
            return {code: [SampleReply(**one) for one in some] for code, some in stored.items()}
        except TypeError as error:
            raise _damaged(file, repr(error)) from error

    def store_replies(self, step: int, replies: Mapping[str, Sequence[SampleReply]]) -> None:
        """Store sample replies of a step."""
        self.evaluation.mkdir(exist_ok=True)
        plain = {code: [one._asdict() for one in some] for code, some in replies.items()}
        text = json.dumps(plain, indent=2, ensure_ascii=False)
        replace_text(self.evaluation / f"replies_{step:08d}.json", text + "\n")

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Record the results of a run that is complete, exported weights included."""
        replace_text(self.results, json.dumps(results, indent=2, ensure_ascii=False) + "\n")

    def exported_step(self) -> int | None:
        """Return the number of steps after which the recorded export was made, or None."""
        if not self.results.exists():
            return None
        steps = _read(self.results).get("steps")
        if not isinstance(steps, int):
            raise _damaged(self.results, f"steps is {steps!r}")
        return steps

    def exported(self, step: int) -> dict[str, str | None]:
        """Return what is recorded of exports after so many steps.

        Returns:
          The names of the directories that hold the model of that step, each with what adapters on
          a quantised base were merged onto (``lora.merge_onto``); None where there is nothing to
          say, or nothing was recorded.
        """
        if self.exported_step() != step:
            return {}
        either = dict.fromkeys((self.export.name, self.adapter.name))
        found = _read(self.results).get("exported", either)
        texts = (str, type(None))
        if not isinstance(found, dict) or not all(isinstance(x, texts) for x in found.values()):
            raise _damaged(self.results, f"exported is {found!r}")
        return found


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    # RecursionError: brackets nested by the thousand.
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(file, "no JSON object")
    return content


def _damaged(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{file} cannot be read ({problem}). Remove it and give the same command again: it is made "
        "anew."
    )
