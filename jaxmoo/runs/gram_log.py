"""Inner products of the languages' gradients, per block, as a run records them.

One small file per recorded step: ``grams/00000010.npz`` with ``gram`` float32 [B, K, K], the names
of the ``blocks`` [B] and the ``languages`` [K]. A language without part in a block of a step has
zeros there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmoo.errors import ConfigError, DataError
from jaxmoo.files.atomic import replacing
from jaxmoo.files.outputs import typed_path

__all__ = ["GramLog", "read_grams", "write_grams"]


class GramLog(NamedTuple):
    """Gram matrices over the steps of a run: T records, B blocks, K languages."""

    steps: tuple[int, ...]
    blocks: tuple[str, ...]
    languages: tuple[str, ...]
    grams: np.ndarray  # float64 [T, B, K, K]


def write_grams(
    directory: Path, step: int, blocks: Sequence[str], languages: Sequence[str], gram: np.ndarray
) -> None:
    """Record a step's Gram matrices; a reader sees a file whole or not at all.

    Args:
      directory: where to; made if need be.
      step: the step, counted from 1.
      blocks: names of the blocks [B].
      languages: the languages [K].
      gram: [B, K, K].
    """
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / f"{step:08d}.npz") as file:
        np.savez_compressed(
            file,
            gram=np.asarray(gram, np.float32),
            blocks=np.array(blocks, dtype=np.str_),
            languages=np.array(languages, dtype=np.str_),
        )


def read_grams(directory: Path) -> GramLog:
    """Read all that a run has recorded.

    Args:
      directory: ``grams/`` of a run.

    Returns:
      The records in the order of their steps.

    Raises:
      ConfigError: there are none.
      DataError: a file is damaged, or they are not all of the same run.
    """
    directory = typed_path(directory)
    files = sorted(directory.glob("[0-9]*.npz"))
    if not files:
        raise ConfigError(
            f"{directory} holds no Gram matrices: the run did not record them. Train with "
            "train.gram_every=10, say, to have them every 10 steps."
        )
    grams, names = [], set()
    for file in files:
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                gram = np.asarray(stored["gram"], np.float64)
                name = (tuple(map(str, stored["blocks"])), tuple(map(str, stored["languages"])))
        # A damaged archive fails in any way at all.
        except Exception as error:
            raise DataError(f"{file} cannot be read ({error}); remove it.") from error
        names.add(name)
        sizes = (len(name[0]), len(name[1]), len(name[1]))
        if len(names) > 1 or gram.shape != sizes:
            raise DataError(
                f"{file} does not belong to the run of {files[0]}: it has other blocks or "
                "languages. Remove what another run left there."
            )
        grams.append(gram)
    blocks, languages = names.pop()
    steps = tuple(int(file.stem) for file in files)
    return GramLog(steps, blocks, languages, np.stack(grams))
