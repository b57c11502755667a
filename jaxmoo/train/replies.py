"""Sample replies of a run: what the model says to some held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmoo.evaluate.generator import Generator
from jaxmoo.runs.scores import SampleReply
from jaxmoo.runtime.processes import everywhere, is_first
from jaxmoo.train.job import Job

__all__ = ["Replies", "SampleReplies", "side_by_side"]

# Per language, what the model said to a prompt before and after.
Replies = dict[str, list[tuple[SampleReply, SampleReply]]]

# Enough to see in what language a model replies, and whether it stops.
_NEW_TOKENS = 64


class _Prompt(NamedTuple):
    """A held-out example's first reply and what is before it."""

    language: str
    tokens: np.ndarray
    reference: np.ndarray


class SampleReplies:
    """Lets a run's model reply to the first held-out prompts of every language, greedily.

    Args:
      job: the run; ``report_samples`` says how many prompts of a language.
    """

    def __init__(self, job: Job) -> None:
        self._job, setup = job, job.setup
        self._prompts = _prompts(job)
        self._generator = Generator(
            lambda weights: setup.merge(*weights),
            setup.device_mesh,
            batch_size=setup.evaluator.batch_size,
            new_tokens=_new_tokens(job),
            pad_id=setup.evaluator.pad_id,
        )

    def __call__(self, step: int, params: Any) -> dict[str, list[SampleReply]]:
        """Return the replies after a step: those stored, or made and stored now.

        Args:
          step: the steps done.
          params: the trainable parameters after them.

        Raises:
          InterruptedRunError: when the run is asked to stop, between two batches.
        """
        job, setup = self._job, self._job.setup
        if not self._prompts:
            return {}
        stored = job.directory.replies(step)
        if everywhere(stored is not None):
            assert stored is not None
            return stored
        ending = () if setup.ending is None else (setup.ending,)
        replies = self._generator(
            (params, setup.frozen),
            [one.tokens for one in self._prompts],
            [ending] * len(self._prompts),
            lambda _: job.point(step),
        )
        found: dict[str, list[SampleReply]] = {}
        for one, reply in zip(self._prompts, replies, strict=True):
            texts = (self._text(tokens) for tokens in (one.tokens, one.reference, reply))
            found.setdefault(one.language, []).append(SampleReply(*texts))
        if is_first():
            job.directory.store_replies(step, found)
        return found

    def _text(self, tokens: np.ndarray) -> str:
        # Of one sequence it is one text, which the signature does not tell.
        return str(self._job.setup.tokenizer.decode(tokens.tolist(), skip_special_tokens=True))


def side_by_side(
    before: Mapping[str, Sequence[SampleReply]], after: Mapping[str, Sequence[SampleReply]]
) -> Replies:
    """Pair the replies to each prompt; those of one side alone, as of another setting, are left."""
    both = [code for code in before if code in after]
    return {code: list(zip(before[code], after[code], strict=False)) for code in both}


def _new_tokens(job: Job) -> int:
    return min(_NEW_TOKENS, job.setup.model.max_position_embeddings // 2)


def _prompts(job: Job) -> list[_Prompt]:
    """The first held-out prompts of each language that leave room for a reply."""
    room = job.setup.model.max_position_embeddings - _new_tokens(job)
    wanted = job.config.report_samples if job.config.report else 0
    found = []
    for language, examples in job.setup.corpus.held_out.items():
        count = 0
        for example in examples:
            if count == wanted:
                break
            begin = int(np.argmax(example.loss_mask))
            if not 1 < begin <= room:  # a text, with nothing to reply to; or too long
                continue
            rest = example.loss_mask[begin:]
            end = begin + (len(rest) if rest.all() else int(np.argmin(rest)))
            reference = example.tokens[begin : min(end, begin + _new_tokens(job))]
            found.append(_Prompt(language, example.tokens[:begin], reference))
            count += 1
    return found
