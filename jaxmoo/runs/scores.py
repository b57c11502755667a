"""Held-out scores and sample replies, as a run stores them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

__all__ = ["LanguageScore", "SampleReply"]


class SampleReply(NamedTuple):
    """What a model says to a held-out prompt.

    Attributes:
      prompt: the text before the reply, as the model reads it, without special tokens.
      reference: the reply in the data.
      reply: the model's, its likeliest tokens one by one.
    """

    prompt: str
    reference: str
    reply: str


@dataclass(frozen=True)
class LanguageScore:
    """How well a model predicts one language's held-out replies.

    Attributes:
      nll: mean negative log-likelihood per target token, in nats; the targets are the reply's
        tokens and its end-of-turn token.
      bits_per_byte: the sum of the same likelihoods, in bits, over the replies' UTF-8 bytes. The
        end-of-turn token counts in the sum and has no bytes. Comparable between tokenizers, and
        more so than `nll` between scripts.
      tokens: number of target tokens.
      bytes: number of bytes of the replies.
      examples: number of replies.

    Example:
      >>> LanguageScore.of_sum(nats=6.0, tokens=3, bytes=4, examples=1).nll
      2.0
    """

    nll: float
    bits_per_byte: float
    tokens: int
    bytes: int
    examples: int

    @classmethod
    def of_sum(cls, nats: float, tokens: int, bytes: int, examples: int) -> LanguageScore:
        """Build a score from the negative log-likelihood of all target tokens together.

        Args:
          nats: the sum over target tokens.
          tokens: number of target tokens.
          bytes: number of bytes of the replies.
          examples: number of replies.

        Returns:
          The score.
        """
        return cls(nats / tokens, nats / math.log(2) / bytes, tokens, bytes, examples)

    def to_dict(self) -> dict[str, float | int]:
        """Return the fields as a dictionary that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LanguageScore:
        """Build a score from what `to_dict` returned.

        Args:
          values: the fields by name.

        Returns:
          The score.
        """
        return cls(**values)
