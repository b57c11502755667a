"""How two models differ, tensor by tensor and in what they predict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoo.convert.kinds import kind_of
from jaxmoo.convert.models import open_model
from jaxmoo.data.table import plain_table
from jaxmoo.errors import CheckpointError
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.load import progress
from jaxmoo.hf.save import Tensor, model_tensors
from jaxmoo.hf.tokenizer import load_tokenizer
from jaxmoo.hf.weights import Weights
from jaxmoo.models import Decoder

__all__ = ["Comparison", "Difference", "LogitDifference", "compare"]

_PIECE = 1 << 20  # elements compared at a time


@dataclass(frozen=True)
class Difference:
    """What distinguishes one tensor of two models.

    Attributes:
      name: its Hugging Face name.
      what: its dtype, or both dtypes or shapes where they differ, or the model that lacks it.
      max_abs: largest absolute difference of two elements; None where they cannot be compared.
      max_rel: largest difference in proportion to the larger of the two elements.
      identical: whether dtype and bytes are equal.
    """

    name: str
    what: str
    max_abs: float | None
    max_rel: float | None
    identical: bool


@dataclass(frozen=True)
class LogitDifference:
    """What distinguishes the predictions of two models after each token of a prompt.

    Attributes:
      tokens: length of the prompt.
      max_abs: largest absolute difference of two logits.
      same_top: number of positions at which both find the same token the most likely.
    """

    tokens: int
    max_abs: float
    same_top: int


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
      tensors: one entry per tensor of either model.
      logits: of a short prompt; None where the tensors' shapes differ.
    """

    tensors: tuple[Difference, ...]
    logits: LogitDifference | None

    def within(self, tolerance: float) -> bool:
        """Whether the models are the same: to the byte if ``tolerance`` is 0.

        Args:
          tolerance: largest relative difference of two elements that is let pass, whatever the
            dtypes.
        """
        if tolerance == 0:
            return all(d.identical for d in self.tensors)
        return all(d.max_rel is not None and d.max_rel <= tolerance for d in self.tensors)

    def table(self) -> str:
        """For a person to read: a row per tensor that differs, then the totals."""
        changed = [d for d in self.tensors if not d.identical]
        lines = []
        if changed:
            rows = [[d.name, _shown(d.max_abs), _shown(d.max_rel), d.what] for d in changed]
            header = ["tensor", "max abs", "max rel", ""]
            lines.append(plain_table([header, *rows], ("left", "right", "right", "left")))
        same = len(self.tensors) - len(changed)
        lines.append(f"{same} of {len(self.tensors)} tensors are equal to the byte.")
        if self.logits is None:
            lines.append("Logits cannot be compared: tensors are missing or of other shapes.")
        else:
            lines.append(
                f"Logits after {self.logits.tokens} tokens: largest difference "
                f"{self.logits.max_abs:.3g}; the likeliest token is the same at "
                f"{self.logits.same_top} of {self.logits.tokens} positions."
            )
        return "\n".join(lines)


def compare(
    a: Path,
    b: Path,
    *,
    steps: tuple[int | None, int | None] = (None, None),
    prompt: str = "The quick brown fox jumps over the lazy dog.",
    say: Callable[[str], None] = print,
) -> Comparison:
    """Compare two models, each in a directory of any kind that `open_model` knows.

    Args:
      a: one directory.
      b: the other.
      steps: where one is a training run, which of its checkpoints; the newest by default.
      prompt: text for which logits are computed, in float32; if ``a`` has no tokenizer, a few
        fixed tokens are taken instead.
      say: called with lines for a person to read.

    Raises:
      CheckpointError: when a directory is damaged or of no kind.
    """
    a, b = typed_path(a), typed_path(b)
    left, right = _tensors(a, steps[0], say), _tensors(b, steps[1], say)
    differences = []
    total = sum(left[name].nbytes for name in left)
    with progress(total, "Comparing") as bar:
        for name in [*left, *(name for name in right if name not in left)]:
            if name not in right or name not in left:
                what = f"only in {a if name in left else b}"
                differences.append(Difference(name, what, None, None, False))
            else:
                differences.append(_difference(left[name], right[name]))
            bar.update(left[name].nbytes if name in left else 0)
    logits = None
    if all(d.max_abs is not None for d in differences):
        tokens = _tokens(a, prompt)
        logits = _logit_difference(
            _logits(a, steps[0], tokens, say), _logits(b, steps[1], tokens, say)
        )
    return Comparison(tuple(differences), logits)


def _tensors(path: Path, step: int | None, say: Callable[[str], None]) -> dict[str, Tensor]:
    if kind_of(path) == "hf" and step is None:
        weights = Weights(path)
        return {name: _stored(weights, name) for name in weights.names()}
    opened = open_model(path, step=step, say=say)
    return {t.name: t for t in model_tensors(opened.model, opened.dtypes.__getitem__)}


def _stored(weights: Weights, name: str) -> Tensor:
    dtype = jnp.dtype(weights.dtype(name))
    return Tensor(name, weights.shape(name), dtype, lambda: weights.read(name))


def _difference(a: Tensor, b: Tensor) -> Difference:
    if a.shape != b.shape:
        return Difference(a.name, f"shape {list(a.shape)} / {list(b.shape)}", None, None, False)
    identical, max_abs, max_rel = a.dtype == b.dtype, 0.0, 0.0
    for x, y in _pieces(a.read(), b.read()):
        # Most pieces of most pairs are the same, and that is quickly seen.
        if x.dtype == y.dtype and np.array_equal(x.view(np.uint8), y.view(np.uint8)):
            continue
        identical = False
        x, y = x.astype(np.float64), y.astype(np.float64)
        alike = (x == y) | (np.isnan(x) & np.isnan(y))  # infinities too
        with np.errstate(invalid="ignore", divide="ignore"):
            apart = np.where(alike, 0.0, np.abs(x - y))
            share = np.where(alike, 0.0, apart / np.maximum(np.abs(x), np.abs(y)))
        max_abs = max(max_abs, _largest(apart))
        max_rel = max(max_rel, _largest(share))
    what = a.dtype.name if a.dtype == b.dtype else f"{a.dtype.name} / {b.dtype.name}"
    return Difference(a.name, what, max_abs, max_rel, identical)


def _pieces(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    x, y = x.reshape(-1), y.reshape(-1)
    for start in range(0, x.size, _PIECE):
        yield x[start : start + _PIECE], y[start : start + _PIECE]


def _largest(values: np.ndarray) -> float:
    """The maximum; a number against NaN or an infinity is infinitely far away."""
    return float(np.nan_to_num(values, nan=np.inf, posinf=np.inf).max())


def _tokens(path: Path, prompt: str) -> np.ndarray:
    try:
        tokenizer = load_tokenizer(path)
    except CheckpointError:
        return np.arange(16, dtype=np.int32)[None]
    return np.asarray([tokenizer.encode(prompt)], np.int32)


def _logits(
    path: Path, step: int | None, tokens: np.ndarray, say: Callable[[str], None]
) -> np.ndarray:
    model = open_model(path, step=step, say=say).model
    size = model.config.vocab_size
    return np.asarray(_call(model, jnp.asarray(tokens % size)))[0]


@jax.jit
def _call(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def _logit_difference(a: np.ndarray, b: np.ndarray) -> LogitDifference:
    same = int((a.argmax(-1) == b.argmax(-1)).sum())
    with np.errstate(invalid="ignore"):
        apart = np.where(a == b, 0.0, np.abs(a - b))
    return LogitDifference(len(a), _largest(apart), same)


def _shown(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}"
