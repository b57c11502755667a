"""One pass of a model over parallel sentences, for every measure of its representations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm.auto import tqdm

from jaxmoo import mesh
from jaxmoo.analysis.parallel import Sentence
from jaxmoo.models import Decoder
from jaxmoo.models.paths import STACKED
from jaxmoo.models.probe import LayerStatistics, layer_statistics, neurons_per_layer
from jaxmoo.runtime.processes import place

__all__ = ["Representations", "represent"]

_STEP = 32  # lengths are padded to a multiple of it, so that few programs are compiled


class Representations(NamedTuple):
    """What a model makes of N sentences in K languages; L layers, width D, MLP width F."""

    pooled: np.ndarray  # float32 [L + 1, K, N, D]: mean-pooled residual stream
    active: np.ndarray  # int64 [2, K, L, F]: tokens with a positive gate, in even and odd sentences
    tokens: np.ndarray  # int64 [2, K]: number of tokens, likewise


def represent(
    model: Decoder,
    sentences: Mapping[str, Sequence[Sentence]],
    *,
    batch_size: int = 16,
    device_mesh: Mesh | None = None,
    progress: bool = True,
) -> Representations:
    """Run a model over parallel sentences.

    Args:
      model: the decoder.
      sentences: per language, equally many; see :func:`jaxmoo.analysis.parallel.tokenize_parallel`.
      batch_size: sentences at one time; rounded up to a multiple of the number of devices.
      device_mesh: the devices; by default all of them. Where they belong to several processes, the
        model's parameters lie on it, and all processes call.
      progress: show a progress bar.

    Returns:
      Hidden states and gates, summed up.
    """
    languages, count = list(sentences), len(next(iter(sentences.values())))
    config = model.config
    layers, width = config.num_hidden_layers, neurons_per_layer(config)
    pooled = np.zeros((layers + 1, len(languages), count, config.hidden_size), np.float32)
    active = np.zeros((2, len(languages), layers, width), np.int64)
    tokens = np.zeros((2, len(languages)), np.int64)
    grid = mesh.make_mesh(1) if device_mesh is None else device_mesh
    batch_size = -(-batch_size // grid.size) * grid.size
    graph, state = nnx.split(model)
    state = jax.device_put(state, mesh.parameter_shardings(grid, state, stacked=STACKED))
    run = _program(graph, grid)
    rows = [
        (sentence, k, n)
        for k, language in enumerate(languages)
        for n, sentence in enumerate(sentences[language])
    ]
    rows.sort(key=lambda row: len(row[0].tokens), reverse=True)
    with tqdm(
        total=len(rows),
        desc="reading sentences",
        unit="sentence",
        disable=None if progress else True,  # None: only on a terminal
    ) as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            length = min(
                -(-len(batch[0][0].tokens) // _STEP) * _STEP, config.max_position_embeddings
            )
            ids = np.zeros((batch_size, length), np.int32)
            mask = np.zeros((batch_size, length), bool)
            mask[len(batch) :, 0] = True  # rows to fill up the last batch; not looked at
            for i, (sentence, _, _) in enumerate(batch):
                ids[i, : len(sentence.tokens)] = sentence.tokens
                mask[i, : len(sentence.mask)] = sentence.mask
            found = jax.device_get(run(state, *place((ids, mask), mesh.rows_sharding(grid))))
            for i, (_, k, n) in enumerate(batch):
                pooled[:, k, n] = found.pooled_LBD[:, i]
                active[n % 2, k] += found.active_LBF[:, i]
                tokens[n % 2, k] += mask[i].sum()
            bar.update(len(batch))
    return Representations(pooled, active, tokens)


@functools.lru_cache(maxsize=4)  # compiled once for all checkpoints of a run
def _program(graph: nnx.GraphDef[Decoder], grid: Mesh) -> Callable[..., LayerStatistics]:
    return jax.jit(
        lambda state, ids, mask: layer_statistics(nnx.merge(graph, state), ids, mask),
        out_shardings=NamedSharding(grid, P()),
    )
