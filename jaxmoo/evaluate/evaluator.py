"""What scores with a model: likelihoods and generated replies, in batches over all devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo import mesh
from jaxmoo.data.example import Example
from jaxmoo.data.tokenization.tokenize import Tokenized
from jaxmoo.evaluate.generated import reply_text, score_generated
from jaxmoo.evaluate.generator import Generator
from jaxmoo.evaluate.nll import Likelihoods, evaluate_nll, length_batches, likelihoods
from jaxmoo.evaluate.questions import Questions, digest
from jaxmoo.evaluate.results import LanguageResult
from jaxmoo.models import Decoder, token_nll
from jaxmoo.models.branches import branch_nll
from jaxmoo.runs.scores import LanguageScore
from jaxmoo.runtime.processes import place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Evaluator"]

# Per example, by name. Texts and lists are kept for people to read; measures sum numbers.
Columns = dict[str, list[Any]]


class Evaluator:
    """Scores texts with a decoder, in batches whose rows are spread over all devices.

    Weights stay where they lie and are given with every call: one evaluator, and what it has
    compiled, serves a model before, while and after it is trained. In several processes all of
    them make the same calls.

    Args:
      decoder: ``weights -> Decoder``, for any pytree of weights; traced.
      device_mesh: the devices.
      batch_size: rows at a time; rounded up to a multiple of the number of devices.
      pad_id: the token to pad with.
      tokenizer: turns generated tokens into text; needed where replies are generated.
      stop: tokens that end a generated reply.
      new_tokens: the most tokens to generate.
    """

    def __init__(
        self,
        decoder: Callable[[Any], Decoder],
        device_mesh: Mesh,
        *,
        batch_size: int,
        pad_id: int = 0,
        tokenizer: PreTrainedTokenizerFast | None = None,
        stop: Sequence[int] = (),
        new_tokens: int = 0,
    ):
        self.batch_size = -(-batch_size // device_mesh.size) * device_mesh.size
        self.pad_id = pad_id
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._rows = mesh.rows_sharding(device_mesh)
        everywhere = NamedSharding(device_mesh, P())
        self._nll = jax.jit(
            lambda weights, batch: token_nll(decoder(weights), batch),
            out_shardings=everywhere,
        )
        self._branches = jax.jit(
            lambda weights, tokens, branch: branch_nll(decoder(weights), tokens, branch),
            out_shardings=everywhere,
        )
        self._generator = Generator(
            decoder,
            device_mesh,
            batch_size=self.batch_size,
            new_tokens=new_tokens,
            pad_id=pad_id,
        )

    def scores(
        self,
        weights: Any,
        tokenized: Mapping[str, Sequence[Tokenized]],
        *,
        before_batch: Callable[[], object] = lambda: None,
        progress: bool = True,
    ) -> dict[str, LanguageScore]:
        """Score the likelihood of every language's replies, rows of all languages together.

        Args:
          weights: what the decoder is made of.
          tokenized: per language its examples, each with at least one target token.
          before_batch: called before every batch; what it raises ends the evaluation there.
          progress: show a progress bar.

        Returns:
          Per language its score.

        Raises:
          DataError: a language has no examples, or an example no target tokens.
        """

        def nll(batch: dict[str, np.ndarray]) -> jax.Array:
            before_batch()
            return self._nll(weights, place(batch, self._rows))

        return evaluate_nll(
            nll, tokenized, batch_size=self.batch_size, pad_id=self.pad_id, progress=progress
        )

    def answer(
        self, weights: Any, questions: Questions, advance: Callable[[int], object]
    ) -> LanguageResult:
        """Score every example by every measure that its questions were prepared for.

        Args:
          weights: what the decoder is made of.
          questions: one language's.
          advance: called with the number of sequences of each batch that is done.

        Returns:
          Numbers per example, and scores of all.
        """
        replies = questions.replies
        if questions.choices and all(map(_follows, replies, questions.choices)):
            texts = [[reply, *some] for reply, some in zip(replies, questions.choices, strict=True)]
            found = self._branch_nats(weights, texts, advance)
            nats, chosen = [one[0] for one in found], [one[1:] for one in found]
            own = Likelihoods(
                nats,
                tokens=[int(one.scored[1:].sum()) for one in replies],
                bytes=[one.reply_bytes for one in replies],
            )
        else:
            own = self._likelihoods(weights, replies, advance)
            chosen = self._branch_nats(weights, questions.choices, advance)
        columns: Columns = own._asdict()
        extra = {}
        if questions.choices:
            columns |= _choose(questions.examples, chosen)
        if questions.prompts:
            texts = self._continue(weights, questions.prompts, advance)
            scores = score_generated(texts, [e.reply for e in questions.examples])
            columns |= {"exact": scores.exact, "chrf": scores.chrf, "generated": texts}
            extra["corpus_chrf"] = scores.corpus_chrf
        return LanguageResult(digest(questions.examples), questions.units, columns, extra)

    def _likelihoods(
        self, weights: Any, tokenized: Sequence[Tokenized], advance: Callable[[int], object]
    ) -> Likelihoods:
        return likelihoods(
            lambda batch: self._nll(weights, place(batch, self._rows)),
            {"": tokenized},
            batch_size=self.batch_size,
            pad_id=self.pad_id,
            advance=advance,
        )[""]

    def _branch_nats(
        self, weights: Any, texts: list[list[Tokenized]], advance: Callable[[int], object]
    ) -> list[list[float]]:
        """Nats of texts, some per example; what those of an example begin with is read once."""
        rows = [_branched(some) for some in texts]
        found: list[list[float]] = [[] for _ in rows]
        for length, chosen in length_batches([len(one.tokens) for one in rows], self.batch_size):
            tokens = np.full((self.batch_size, length), self.pad_id, np.int32)
            branch = np.full((self.batch_size, length), -1, np.int32)
            branch[:, 0] = 0  # rows without an example begin, too
            for row, number in enumerate(chosen):
                size = len(rows[number].tokens)
                tokens[row, :size], branch[row, :size] = rows[number].tokens, rows[number].branch
            placed = place((tokens, branch), self._rows)
            nats = np.asarray(self._branches(weights, *placed), np.float64)
            for row, number in enumerate(chosen):
                one = rows[number]
                own = np.where(one.scored, nats[row, : len(one.tokens)], 0.0)
                sums = np.bincount(one.branch, own, minlength=len(texts[number]) + 1)
                found[number] = sums[1:].tolist()
            advance(sum(len(texts[number]) for number in chosen))
        return found

    def _continue(
        self, weights: Any, prompts: list[np.ndarray], advance: Callable[[int], object]
    ) -> list[str]:
        assert self._tokenizer is not None, "generated tokens need a tokenizer"
        stop = [self._stop] * len(prompts)
        found = self._generator(weights, prompts, stop, advance)
        return [reply_text(tokens, self._stop, self._tokenizer)[0] for tokens in found]


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
