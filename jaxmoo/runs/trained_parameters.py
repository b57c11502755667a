"""What a run trains: parameters that an expression matches, or adapters on matching layers."""

from __future__ import annotations

from typing import Any

from flax import nnx

from jaxmoo.config import Config, lora_of
from jaxmoo.errors import ConfigError
from jaxmoo.models import Decoder, DecoderConfig, segments_for, trainable_filter
from jaxmoo.models.lora import ADAPTERS, adapted_layers, add_adapters

__all__ = ["check_model", "run_segments", "split_model"]


def run_segments(config: Config, architecture: DecoderConfig) -> tuple[int, ...]:
    """Choose the segments of a run's decoder, which part what is trained from what is not.

    Args:
      config: the run's settings.
      architecture: the model's sizes.

    Raises:
      ConfigError: ``model.trainable`` matches nothing, or not whole layers where those get
        adapters.
    """
    pattern = config.model.trainable
    if config.lora.rank is not None:
        try:
            adapted_layers(architecture, pattern)
        except ConfigError as error:
            raise ConfigError(f"model.trainable, with lora.rank: {error}") from None
    return segments_for(architecture, pattern)


def check_model(config: Config, architecture: DecoderConfig) -> None:
    """Raise unless a model has the sizes that a run's settings ask for.

    Args:
      config: the run's settings.
      architecture: the model's sizes.

    Raises:
      ConfigError: rows are longer than the model reads, or adapters larger than what they adapt.
    """
    length, longest = config.data.sequence_length, architecture.max_position_embeddings
    if length > longest:
        raise ConfigError(
            f"data.sequence_length is {length}, but {config.model.source} reads at most {longest} "
            "tokens."
        )
    largest = max(architecture.hidden_size, architecture.intermediate_size)
    lora = config.lora
    if lora.rank is None:
        return
    for name, rank in {"lora.rank": lora.rank, **lora.rank_pattern}.items():
        if rank > largest:
            raise ConfigError(
                f"{name} is {rank}, but no side of a matrix of {config.model.source} is longer "
                f"than {largest}: a smaller rank does the same."
            )


def split_model(config: Config, decoder: Decoder) -> tuple[Any, nnx.State, nnx.State]:
    """Part what a run trains from what stays as it is.

    Args:
      config: the run's settings.
      decoder: built with :func:`run_segments`; it gets the adapters, if there are to be any.

    Returns:
      ``(graph, trained, frozen)``. Adapters are shapes only.
    """
    lora, pattern = lora_of(config.lora), config.model.trainable
    if lora is None:
        graph, trained, frozen = nnx.split(decoder, trainable_filter(pattern), ...)
        return graph, trained, frozen
    add_adapters(decoder, lora, adapted_layers(decoder.config, pattern))
    graph, trained, frozen = nnx.split(decoder, trainable_filter(ADAPTERS), ...)
    return graph, trained, frozen
