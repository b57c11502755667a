"""A model that answers: likelihoods and generated replies, in batches over all devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo import mesh
from jaxmoo.data.example import Example
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
        if questions.choices and all(map(_follows, replies, questions.choices)):
            texts = [[reply, *some] for reply, some in zip(replies, questions.choices, strict=True)]
            found = self._branch_nats(texts, advance)
            nats, chosen = [one[0] for one in found], [one[1:] for one in found]
        else:
            nats = self._nats(replies, advance).tolist()
            chosen = self._branch_nats(questions.choices, advance)
        columns: Columns = {
            "nats": nats,
            "tokens": [int(one.scored[1:].sum()) for one in replies],
            "bytes": [one.reply_bytes for one in replies],
        }
        extra = {}
        if questions.choices:
            columns |= _choose(questions.examples, chosen)
        if questions.prompts:
            found = self._continue(questions.prompts, advance)
            scores = score_generated(found, [e.reply for e in questions.examples])
            columns |= {"exact": scores.exact, "chrf": scores.chrf, "generated": found}
            extra["corpus_chrf"] = scores.corpus_chrf
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

    def _branch_nats(
        self, texts: list[list[Tokenized]], advance: Callable[[int], object]
    ) -> list[list[float]]:
        """Nats of texts, some per example; what those of an example begin with is read once."""
        rows = [_branched(some) for some in texts]
        found: list[list[float]] = [[] for _ in rows]
        # Longest first: what runs out of memory does so at once.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens), reverse=True)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            length = padded_length(len(rows[chosen[0]].tokens))
            tokens = np.full((self.batch_size, length), self.pad_id, np.int32)
            branch = np.full((self.batch_size, length), -1, np.int32)
            branch[:, 0] = 0  # rows without an example begin, too
            for row, number in enumerate(chosen):
                size = len(rows[number].tokens)
                tokens[row, :size], branch[row, :size] = rows[number].tokens, rows[number].branch
            placed = jax.device_put((tokens, branch), self._rows)
            nats = np.asarray(self._branches(self._params, *placed), np.float64)
            for row, number in enumerate(chosen):
                one = rows[number]
                own = np.where(one.scored, nats[row, : len(one.tokens)], 0.0)
                sums = np.bincount(one.branch, own, minlength=len(texts[number]) + 1)
                found[number] = sums[1:].tolist()
            advance(sum(len(texts[number]) for number in chosen))
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


class _Branched(NamedTuple):
    """Texts with a common beginning as one row.

    Attributes:
      tokens: the beginning, then the rest of each text.
      branch: 0 for the beginning, 1 for the first text, and so on.
      scored: which tokens are scored.
    """

    tokens: np.ndarray
    branch: np.ndarray
    scored: np.ndarray


def _branched(texts: Sequence[Tokenized]) -> _Branched:
    start = _context(texts[-1])
    parts = [texts[0].tokens[:start], *(text.tokens[start:] for text in texts)]
    branch = np.repeat(np.arange(len(parts)), list(map(len, parts)))
    scored = [np.zeros(start, bool), *(text.scored[start:] for text in texts)]
    return _Branched(np.concatenate(parts), branch, np.concatenate(scored))


def _context(choice: Tokenized) -> int:
    """Number of tokens before the first that is scored."""
    return int(np.argmax(choice.scored))


def _follows(reply: Tokenized, choices: Sequence[Tokenized]) -> bool:
    """Whether a reply begins with what comes before its choices; tokenizers may join tokens."""
    start = _context(choices[0])
    same = np.array_equal(reply.tokens[:start], choices[0].tokens[:start])
    return same and not reply.scored[:start].any()


def _choose(examples: Sequence[Example], nats_of_choices: Sequence[Sequence[float]]) -> Columns:
    columns: Columns = {"correct": [], "correct_unnormalised": [], "choice_nats": []}
    for example, some in zip(examples, nats_of_choices, strict=True):
        nats, right = np.asarray(some), example.choices.index(example.reply)
        lengths = np.array([len(choice) for choice in example.choices])
        columns["correct"].append(int(np.argmax(-nats / lengths) == right))
        columns["correct_unnormalised"].append(int(np.argmax(-nats) == right))
        columns["choice_nats"].append(nats.tolist())
    return columns
