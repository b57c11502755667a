"""Everything a run needs before its first step, each part checked before the next is begun."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxmoo import mesh
from jaxmoo.data import Corpus, LanguageBatches, load_corpus
from jaxmoo.errors import ConfigError
from jaxmoo.hf import load_config as load_model_config
from jaxmoo.hf import load_model, load_tokenizer, resolve_source
from jaxmoo.models import Decoder, language_loss, segments_for, token_nll, trainable_filter
from jaxmoo.train.config import Config
from jaxmoo.train.step import TrainState, make_optimizer, make_train_step

__all__ = ["STACKED", "Setup", "prepare"]

# Layers are stacked by segment; a segment carries the number of its first layer.
STACKED = r"^layers\.(\d+)\."


@dataclasses.dataclass(frozen=True)
class Setup:
    """What :func:`prepare` put together.

    Attributes:
      source: directory of the model that is fine-tuned, in Hugging Face format.
      corpus: tokenised examples.
      batches: training batches by step.
      device_mesh: how the devices are arranged.
      state: the state before the first step.
      frozen: parameters that stay as they are.
      step: the compiled training step.
      nll: compiled ``(params, frozen, batch) -> [B, S]`` per-token negative log-likelihood.
      merge: ``(params, frozen) -> Decoder``.
    """

    source: Path
    corpus: Corpus
    batches: LanguageBatches
    pad_id: int
    device_mesh: Mesh
    state: TrainState
    frozen: Any
    step: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]
    nll: Callable[[Any, Any, Any], jax.Array]
    merge: Callable[[Any, Any], Decoder]


def prepare(config: Config, say: Callable[[str], None] = print) -> Setup:
    """Load data and model and build the training step.

    Cheap checks come before expensive work: settings, data, then weights.

    Args:
      config: the run's settings.
      say: called with lines that tell a person what is going on.

    Raises:
      JaxmooError: anything that would make the run fail or be wrong.
    """
    data, model = config.data, config.model
    device_mesh = mesh.make_mesh(
        len(data.seen), language=config.mesh.language, fsdp=config.mesh.fsdp
    )
    if data.batch_size % device_mesh.shape[mesh.FSDP]:
        raise ConfigError(
            f"data.batch_size ({data.batch_size}) must be a multiple of the mesh's fsdp axis "
            f"({device_mesh.shape[mesh.FSDP]}): each of its devices takes an equal share."
        )
    source = resolve_source(model.source)
    architecture = load_model_config(source)
    if data.sequence_length > architecture.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length is {data.sequence_length}, but {model.source} reads at most "
            f"{architecture.max_position_embeddings} tokens."
        )
    segments = segments_for(architecture, model.trainable)

    tokenizer = load_tokenizer(source)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    corpus = load_corpus(
        data.source,
        tokenizer,
        seen=data.seen,
        unseen=data.unseen,
        sequence_length=data.sequence_length,
        held_out=data.held_out,
        max_held_out=data.max_held_out,
        disjoint_replies=data.disjoint_replies,
        columns=dataclasses.asdict(data.columns),
        codes=data.codes,
        language_column=data.language_column,
        subset=data.subset,
        split=data.split,
    )
    say(corpus.table())
    batches = LanguageBatches(
        corpus.train, data.seen, data.batch_size, data.sequence_length, config.seed, pad_id=pad_id
    )

    decoder = load_model(
        source,
        segments=segments,
        dtype=jax.numpy.dtype(model.dtype),
        param_dtype=jax.numpy.dtype(model.param_dtype),
        remat=model.remat,
    )
    graph, params, frozen = nnx.split(decoder, trainable_filter(model.trainable), ...)

    def place(tree: Any) -> Any:
        return jax.device_put(tree, mesh.parameter_shardings(device_mesh, tree, stacked=STACKED))

    params, frozen = place(params), place(frozen)
    optimizer = make_optimizer(config, stacked=STACKED)
    opt_state = jax.jit(optimizer.init)(params)

    def merge(params: Any, frozen: Any) -> Decoder:
        return nnx.merge(graph, params, frozen)

    return Setup(
        source=source,
        corpus=corpus,
        batches=batches,
        pad_id=pad_id,
        device_mesh=device_mesh,
        state=TrainState(jax.numpy.zeros((), jax.numpy.int32), params, opt_state),
        frozen=frozen,
        step=make_train_step(
            lambda params, frozen, batch: language_loss(merge(params, frozen), batch),
            optimizer,
            device_mesh,
            params,
            stacked=STACKED,
        ),
        nll=jax.jit(lambda params, frozen, batch: token_nll(merge(params, frozen), batch)),
        merge=merge,
    )
