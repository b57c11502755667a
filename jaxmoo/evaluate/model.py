"""A model that answers: likelihoods and generated replies, in batches over all devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo import mesh
from jaxmoo.data.tokenize import Tokenized
from jaxmoo.evaluate.generated import score_generated
from jaxmoo.evaluate.nll import example_nats, padded_length
from jaxmoo.evaluate.questions import Questions, digest
from jaxmoo.evaluate.results import LanguageResult
from jaxmoo.models import Decoder, token_nll
from jaxmoo.models.branches import branch_nll
from jaxmoo.models.generate import generate_greedily

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Evaluator"]

# Per example, by name. Texts and lists are kept for people to read; measures sum numbers.
Columns = dict[str, list[Any]]


class Evaluator:
    """Scores one language's questions at a time.

    Parameters stay where they lie; the rows of a batch are spread over all devices.

    Args:
      model: the decoder, with parameters on all devices.
      tokenizer: its tokenizer.
      batch_size: rows at a time; rounded up to a multiple of the number of devices.
      dtype: dtype of the computation.
      stop: tokens that end a generated reply.
      new_tokens: the most tokens to generate.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: PreTrainedTokenizerFast,
        *,
        batch_size: int,
        dtype: Any = np.float32,
        stop: Sequence[int] = (),
        new_tokens: int = 0,
    ):
        devices = mesh.make_mesh(1)
        self.batch_size = -(-batch_size // devices.size) * devices.size
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._rows = mesh.rows_sharding(devices)
        self._params = nnx.state(model)
        abstract = Decoder.abstract(model.config, segments=model.segments, dtype=dtype)
        graph = nnx.graphdef(abstract)
        everywhere = NamedSharding(devices, P())
        self._nll = jax.jit(
            lambda params, batch: token_nll(nnx.merge(graph, params), batch),
            out_shardings=everywhere,
        )
        self._branches = jax.jit(
            lambda params, tokens, branch: branch_nll(nnx.merge(graph, params), tokens, branch),
            out_shardings=everywhere,
        )
        self._generate = jax.jit(
            lambda params, tokens, lengths: generate_greedily(
                nnx.merge(graph, params),
                tokens,
                lengths,
                new_tokens=new_tokens,
                stop=self.stop,
                pad_id=self.pad_id,
            ),
            out_shardings=everywhere,
        )

    def answer(self, questions: Questions, advance: Callable[[int], object]) -> LanguageResult:
        """Score every example by every measure that its questions were prepared for.

        Args:
          questions: one language's.
          advance: called with the number of sequences of each batch that is done.

        Returns:
          Numbers per example, and scores of all.
        """
        replies = questions.replies
        columns: Columns = {
            "nats": self._nats(replies, advance).tolist(),
            "tokens": [int(one.loss_mask[1:].sum()) for one in replies],
            "bytes": [one.reply_bytes for one in replies],
        }
        extra = {}
        if questions.choices:
            columns |= self._choose(questions, advance)
        if questions.prompts:
            found = self._continue(questions.prompts, advance)
            scores = score_generated(found, [e.reply for e in questions.examples])
            columns |= {"exact": scores.exact, "chrf": scores.chrf, "generated": found}
            extra["corpus_chrf"] = scores.corpus_chrf
        if questions.choices:
            unnormalised = columns["correct_unnormalised"]
            extra["accuracy_unnormalised"] = sum(unnormalised) / len(unnormalised)
        return LanguageResult(digest(questions.examples), questions.units, columns, extra)

    def _nats(self, tokenized: Any, advance: Callable[[int], object]) -> np.ndarray:
        def nll(batch: dict[str, np.ndarray]) -> jax.Array:
            return self._nll(self._params, jax.device_put(batch, self._rows))

        return example_nats(
            nll,
            {"": tokenized},
            batch_size=self.batch_size,
            pad_id=self.pad_id,
            advance=advance,
        )[""]

    def _choose(self, questions: Questions, advance: Callable[[int], object]) -> Columns:
        parts = self._choice_nats(questions.choices, advance)
        columns: Columns = {"correct": [], "correct_unnormalised": [], "choice_nats": []}
        for example, nats in zip(questions.examples, parts, strict=True):
            right = example.choices.index(example.reply)
            lengths = np.array([len(choice) for choice in example.choices])
            columns["correct"].append(int(np.argmax(-nats / lengths) == right))
            columns["correct_unnormalised"].append(int(np.argmax(-nats) == right))
            columns["choice_nats"].append(nats.tolist())
        return columns

    def _choice_nats(
        self, choices: list[list[Tokenized]], advance: Callable[[int], object]
    ) -> list[np.ndarray]:
        """Nats of every example's choices; their common prompt is read once."""
        rows = [_branched(some) for some in choices]
        found: list[np.ndarray] = [np.zeros(0)] * len(rows)
        # Longest first: what runs out of memory does so at once.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]), reverse=True)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            length = padded_length(len(rows[chosen[0]][0]))
            tokens = np.full((self.batch_size, length), self.pad_id, np.int32)
            branch = np.full((self.batch_size, length), -1, np.int32)
            branch[:, 0] = 0  # rows without an example have a prompt, too
            for row, number in enumerate(chosen):
                size = len(rows[number][0])
                tokens[row, :size], branch[row, :size] = rows[number]
            placed = jax.device_put((tokens, branch), self._rows)
            nats = np.asarray(self._branches(self._params, *placed), np.float64)
            for row, number in enumerate(chosen):
                own = [nats[row, branch[row] == b + 1].sum() for b in range(len(choices[number]))]
                found[number] = np.array(own)
            advance(sum(len(choices[number]) for number in chosen))
        return found

    def _continue(self, prompts: list[np.ndarray], advance: Callable[[int], object]) -> list[str]:
        texts = [""] * len(prompts)
        # Longest first: what runs out of memory does so at once.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            length = padded_length(len(prompts[chosen[0]]))
            tokens = np.full((self.batch_size, length), self.pad_id, np.int32)
            lengths = np.ones(self.batch_size, np.int32)
            for row, number in enumerate(chosen):
                lengths[row] = len(prompts[number])
                tokens[row, : lengths[row]] = prompts[number]
            placed = jax.device_put((tokens, lengths), self._rows)
            found = np.asarray(self._generate(self._params, *placed))
            for row, number in enumerate(chosen):
                texts[number] = self._text(found[row])
            advance(len(chosen))
        return texts

    def _text(self, tokens: np.ndarray) -> str:
        ends = np.flatnonzero(np.isin(tokens, self.stop))
        kept = tokens[: ends[0]] if len(ends) else tokens
        return self.tokenizer.decode(kept.tolist(), skip_special_tokens=True).strip()


def _branched(choices: Sequence[Tokenized]) -> tuple[np.ndarray, np.ndarray]:
    """A prompt and its choices as one row, and which token belongs to which; 0 is the prompt."""
    prompt = choices[0].tokens[: int(np.argmax(choices[0].loss_mask))]
    own = [choice.tokens[len(prompt) :] for choice in choices]
    numbers = np.repeat(np.arange(len(choices) + 1), [len(prompt), *map(len, own)])
    return np.concatenate([prompt, *own]), numbers.astype(np.int32)
