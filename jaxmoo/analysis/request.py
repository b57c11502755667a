"""What an analysis is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

__all__ = ["MEASURES", "Request"]

MEASURES = ("conflict", "stationarity", "neurons", "separability", "interference")


@dataclasses.dataclass(frozen=True)
class Request:
    """What to analyse.

    Attributes:
      run: directory of a training run.
      output: directory for the report; ``analysis/`` in the run's by default.
      measures: which of :data:`MEASURES`; by default all for which there is what they need.
      steps: checkpoints that are measured beside the base model; by default all that there are.
      base: the model that the run began with, if it is no longer where the run's config says.
      parallel: path of parallel sentences with ``{language}`` in it.
      codes: the sentences' own names of languages.
      languages: languages of the sentences; by default the run's, seen and unseen.
      sentences: the most sentences to take.
      examples: training examples per language in each of two batches.
      blocks: blocks of the stationarity measure; see ``resolve.blocks``.
      singles: runs on single languages.
      samples: of the bootstrap.
      seed: of the choice of examples and of the bootstrap.
      mesh: sizes of axes of the mesh of devices; see :func:`jaxmoo.mesh.make_mesh`. Stationarity
        takes the two batches of every language for languages of its own.
    """

    run: Path
    output: Path | None = None
    measures: tuple[str, ...] | None = None
    steps: tuple[int, ...] | None = None
    base: str | None = None
    parallel: str | None = None
    codes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    languages: tuple[str, ...] | None = None
    sentences: int = 100
    examples: int = 8
    blocks: str = "module"
    singles: tuple[Path, ...] = ()
    samples: int = 200
    seed: int = 0
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
