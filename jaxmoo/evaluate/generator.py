"""Generation for many prompts, in batches over all devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo import mesh
from jaxmoo.errors import ConfigError
from jaxmoo.evaluate.nll import length_batches
from jaxmoo.models import Decoder
from jaxmoo.models.generate import generate
from jaxmoo.models.sampling import Sampling
from jaxmoo.runtime.processes import place

__all__ = ["Generator"]


class Generator:
    """Continues prompts with a decoder, in batches whose rows are spread over all devices.

    In several processes all of them make the same calls.

    Args:
      decoder: ``weights -> Decoder``, for any pytree of weights; traced.
      device_mesh: the devices.
      batch_size: rows at a time; a multiple of the number of devices.
      new_tokens: the most tokens of a reply.
      pad_id: the token to pad with.
      sampling: what tokens are drawn from; None takes the likeliest.
      seed: of all that is drawn.
    """

    def __init__(
        self,
        decoder: Callable[[Any], Decoder],
        device_mesh: Mesh,
        *,
        batch_size: int,
        new_tokens: int,
        pad_id: int = 0,
        sampling: Sampling | None = None,
        seed: int = 0,
    ):
        self._decoder, self._new_tokens = decoder, new_tokens
        self._batch_size, self._pad_id, self._seed = batch_size, pad_id, np.int32(seed)
        self._rows = mesh.rows_sharding(device_mesh)
        self._generate = jax.jit(
            lambda weights, seed, tokens, lengths, stop, rows: generate(
                decoder(weights),
                tokens,
                lengths,
                new_tokens=new_tokens,
                stop=stop,
                pad_id=pad_id,
                sampling=sampling,
                seed=seed,
                rows_B=rows,
            ),
            out_shardings=NamedSharding(device_mesh, P()),
        )

    def __call__(
        self,
        weights: Any,
        prompts: Sequence[np.ndarray],
        stop: Sequence[Sequence[int]],
        advance: Callable[[int], object] = lambda rows: None,
    ) -> list[np.ndarray]:
        """Continue every prompt.

        What is drawn for a prompt depends on the seed and the prompt's number, not on the batch
        that it is in.

        Args:
          weights: what the decoder is made of.
          prompts: int32 [T], at least one token each.
          stop: for each prompt, the tokens that end its reply.
          advance: called with the number of prompts of each batch that is done.

        Returns:
          For each prompt its new tokens; the token that ended them is the last.

        Raises:
          ConfigError: a prompt leaves no room for them.
        """
        config = nnx.eval_shape(self._decoder, weights).config
        room = config.max_position_embeddings - self._new_tokens
        longest = max(map(len, prompts), default=0)
        if longest > room:
            raise ConfigError(
                f"The longest prompt has {longest} tokens; with {self._new_tokens} new ones it "
                f"exceeds {config.max_position_embeddings}, the longest sequence of the model."
            )
        replies: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
        width = max(map(len, stop), default=0)
        for length, chosen in length_batches(list(map(len, prompts)), self._batch_size):
            length = min(length, room)
            tokens = np.full((self._batch_size, length), self._pad_id, np.int32)
            lengths, rows = np.ones((2, self._batch_size), np.int32)
            ends = np.full((self._batch_size, width), -1, np.int32)
            # Rows left over repeat the first prompt, and so end when it does.
            filled = [*chosen, *chosen[:1] * (self._batch_size - len(chosen))]
            for row, number in enumerate(filled):
                size = len(prompts[number])
                tokens[row, :size], lengths[row], rows[row] = prompts[number], size, number
                ends[row, : len(stop[number])] = stop[number]
            placed = place((tokens, lengths, ends, rows), self._rows)
            found = np.asarray(self._generate(weights, self._seed, *placed))
            for row, number in enumerate(chosen):
                at = np.flatnonzero(np.isin(found[row], list(stop[number])))
                replies[number] = found[row, : at[0] + 1] if len(at) else found[row]
            advance(len(chosen))
        return replies
