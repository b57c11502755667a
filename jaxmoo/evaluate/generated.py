"""Generated replies beside the references: exact match and chrF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxmoo.data.example import normalise
from jaxmoo.data.tokenization.tokenizer import ending_token
from jaxmoo.errors import ConfigError
from jaxmoo.hf.generation import stop_tokens as model_stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["GeneratedScores", "check_sacrebleu", "reply_text", "score_generated", "stop_tokens"]


class GeneratedScores(NamedTuple):
    """Scores of replies.

    Attributes:
      exact: per reply 1 if it is the reference, but for Unicode's normal form and white space.
      chrf: per reply sacrebleu's sentence-level chrF2, 0 to 100.
      corpus_chrf: sacrebleu's chrF2 of all replies together.
    """

    exact: list[int]
    chrf: list[float]
    corpus_chrf: float


def score_generated(replies: Sequence[str], references: Sequence[str]) -> GeneratedScores:
    """Compare replies with references.

    Args:
      replies: what was generated.
      references: one for each.

    Raises:
      ConfigError: sacrebleu is not installed.

    Example:
      >>> scores = score_generated(["an apple", "two pears"], ["an  apple", "two plums"])
      >>> scores.exact, [round(x, 1) for x in scores.chrf]
      ([1, 0], [100.0, 26.4])
    """
    check_sacrebleu()
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    return GeneratedScores(
        [int(normalise(a) == normalise(b)) for a, b in zip(replies, references, strict=True)],
        [
            metric.sentence_score(reply, [reference]).score
            for reply, reference in zip(replies, references, strict=True)
        ],
        metric.corpus_score(list(replies), [list(references)]).score,
    )


def check_sacrebleu() -> None:
    """Raise ConfigError unless sacrebleu can be imported."""
    try:
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "Scores of generated text need sacrebleu: pip install 'jaxmoo[eval]'."
        ) from error


def stop_tokens(source: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Tokens that end a reply: those that would in transformers, and the one that does in training.

    Args:
      source: the model's directory: its ``generation_config.json``, else its ``config.json``.
      tokenizer: its own end token is one of them, and so is what ends a turn in its chat template.

    Returns:
      Token ids in ascending order.

    Raises:
      CheckpointError: a file of the directory is damaged.
    """
    end: Any = tokenizer.eos_token_id  # a token's number, or None
    stop = {end, ending_token(tokenizer), *model_stop_tokens(source)}
    return tuple(sorted(int(token) for token in stop if token is not None))


def reply_text(
    tokens: np.ndarray, stop: Sequence[int], tokenizer: PreTrainedTokenizerFast
) -> tuple[str, bool]:
    """Turn a reply's tokens into its text, and tell whether a token ended it.

    Args:
      tokens: int [N], at least one.
      stop: tokens that end it.
      tokenizer: the model's.

    Returns:
      The text, without special tokens and white space at its ends, and whether the last token is
      one of ``stop``.
    """
    stopped = bool(tokens[-1] in stop)
    kept = tokens[:-1] if stopped else tokens
    # Of one sequence it is one text, which the signature does not tell.
    return str(tokenizer.decode(kept.tolist(), skip_special_tokens=True)).strip(), stopped
