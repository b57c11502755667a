"""What a run trains: parameters that an expression matches, or adapters on matching layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax import nnx

from jaxmoo.config import Config, lora_of
from jaxmoo.errors import ConfigError
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.adapter import load_adapter
from jaxmoo.hf.load import load_config, load_model
from jaxmoo.models import Decoder, DecoderConfig, segments_for, trainable_filter
from jaxmoo.models.families import FAMILIES
from jaxmoo.models.lora import (
    ADAPTERS,
    ALL_LINEAR,
    NO_DORA,
    PROJECTIONS,
    adapted_layers,
    add_adapters,
    initial_adapters,
)
from jaxmoo.models.paths import compile_regex, parameter_paths
from jaxmoo.models.quantization import quantize_base

__all__ = [
    "begun_model",
    "check_model",
    "given_adapters",
    "load_base",
    "router_coef",
    "run_segments",
    "split_model",
    "trained_filter",
]


_OF_AN_MLP = {"gate_proj", "up_proj", "down_proj"}


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
      ConfigError: rows are longer than the model reads, experts are asked for where there are none
        or none is trained, adapters are larger than what they adapt, of projections that the model
        does not have, or cannot be exported.
    """
    length, longest = config.data.sequence_length, architecture.max_position_embeddings
    if length > longest:
        raise ConfigError(
            f"data.sequence_length is {length}, but {config.model.source} reads at most {longest} "
            "tokens."
        )
    if config.resolve.blocks == "expert":
        _check_trained_experts(config, architecture)
    coef = router_coef(config, architecture)
    if coef and not _has_experts(architecture):
        raise ConfigError(
            f"train.router_aux_loss_coef is {coef:g} (by default that of the model), but "
            f"{config.model.source} has no experts. Set it to 0."
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
    _check_projections(config, architecture)


def router_coef(config: Config, architecture: DecoderConfig) -> float:
    """Return how much of the router's loss is added to every language's."""
    coef = config.train.router_aux_loss_coef
    return architecture.router_aux_loss_coef if coef is None else coef


def _has_experts(architecture: DecoderConfig) -> bool:
    return any(map(architecture.has_experts, range(architecture.num_hidden_layers)))


def _check_trained_experts(config: Config, architecture: DecoderConfig) -> None:
    pattern = config.model.trainable
    if not _has_experts(architecture):
        why = "has no experts"
    elif config.lora.rank is not None:
        if _adapts_experts(config, architecture):
            return
        why = "has experts, but lora.targets or model.trainable leave them without adapters"
    elif not any(
        ".experts." in path and compile_regex(pattern).search(path)
        for path in parameter_paths(architecture)
    ):
        why = f"has experts, but model.trainable ({pattern!r}) matches none of them"
    else:
        return
    raise ConfigError(
        f"resolve.blocks is 'expert': {config.model.source} {why}. Use 'layer' blocks."
    )


def _adapts_experts(config: Config, architecture: DecoderConfig) -> bool:
    if not architecture.num_experts or {ALL_LINEAR, *_OF_AN_MLP}.isdisjoint(config.lora.targets):
        return False
    layers = adapted_layers(architecture, config.model.trainable)
    return any(map(architecture.has_experts, layers))


def _check_projections(config: Config, architecture: DecoderConfig) -> None:
    lora, source = config.lora, config.model.source
    every = ALL_LINEAR in lora.targets or set(lora.targets) == set(PROJECTIONS)
    named = {*([] if every else lora.targets), *lora.rank_pattern, *lora.alpha_pattern}
    of_experts = _adapts_experts(config, architecture)
    if lora.dora and of_experts:
        raise ConfigError(f"lora.dora: {source} has experts, and {NO_DORA}")
    if architecture.num_experts and not of_experts and _OF_AN_MLP.issuperset(lora.targets):
        raise ConfigError(
            f"lora.targets: in {source}, {', '.join(lora.targets)} are projections of experts, and "
            "the layers that model.trainable chooses have no experts. Choose other layers, or "
            "adapt attention (q_proj, k_proj, v_proj, o_proj)."
        )
    if "gate_proj" in named and not architecture.gated_mlp:
        raise ConfigError(f"lora: the layers of {source} have no gate_proj. Leave it out.")
    if not config.export or lora.export == "merged":
        return
    family = FAMILIES[architecture.family]
    if family.part is not None:
        raise ConfigError(
            f"lora: {source} is the text model of a larger one ({architecture.family}), for which "
            "adapters cannot be exported by themselves. Save the text model alone, as the "
            "documentation of models shows, and use that; or set lora.export to 'merged', not "
            f"{lora.export!r}."
        )
    adapted = set(PROJECTIONS if every else lora.targets)
    for whole, parts in family.names.fused.items():
        fused = adapted & {part.rpartition(".")[2] for part in parts}
        if lora.dora and fused:
            raise ConfigError(
                f"lora.dora: adapters of {whole.rpartition('.')[2]}, which {source} keeps in one "
                f"matrix, cannot be exported by themselves. Set lora.export to 'merged', not "
                f"{lora.export!r}."
            )


def trained_filter(config: Config) -> Callable[[Any, Any], bool]:
    """Return the filter for `flax.nnx.split` of what a run trains of its model."""
    return trainable_filter(config.model.trainable if config.lora.rank is None else ADAPTERS)


def load_base(
    config: Config, source: Path, *, shardings: Callable[[Any], Any], **options: Any
) -> Decoder:
    """Load the model that a run trains, or that its adapters are on, before any training.

    Args:
      config: the run's settings.
      source: the model's Hugging Face directory.
      shardings: ``state -> pytree of shardings``.
      **options: the others of :func:`jaxmoo.hf.load_model`.

    Returns:
      The decoder, with the segments of :func:`run_segments`, and quantised if it is to be.

    Raises:
      CheckpointError, ConfigError: as :func:`jaxmoo.hf.load_model` and :func:`run_segments`.
    """
    return load_model(
        source,
        segments=run_segments(config, load_config(source)),
        shardings=shardings,
        quantize=config.lora.quantize_base,
        **options,
    )


def begun_model(config: Config, decoder: Decoder, shardings: Callable[[Any], Any]) -> Decoder:
    """Return the model that a run begins with: with the first adapters, if it trains adapters.

    Args:
      config: the run's settings.
      decoder: the base model, from :func:`load_base`; it may be changed.
      shardings: ``state -> pytree of shardings`` of the adapters.

    Raises:
      CheckpointError: the adapters of ``lora.adapter`` cannot be read.
    """
    if config.lora.rank is None:
        return decoder
    graph, shapes, frozen = split_model(config, decoder)
    first = given_adapters(config, shapes, shardings)
    if first is None:
        first = initial_adapters(shapes, config.seed, shardings(shapes), frozen=frozen)
    return nnx.merge(graph, first, frozen)


def given_adapters(
    config: Config, shapes: nnx.State, shardings: Callable[[Any], Any]
) -> nnx.State | None:
    """Read the adapters that a run begins with; None where it begins with new ones, or none.

    Args:
      config: the run's settings.
      shapes: what is trained, from :func:`split_model`.
      shardings: see :func:`begun_model`.

    Raises:
      CheckpointError: the adapters of ``lora.adapter`` cannot be read.
    """
    lora = lora_of(config.lora)
    if lora is None or config.lora.adapter is None:
        return None
    return load_adapter(typed_path(config.lora.adapter), shapes, lora, shardings(shapes))


def split_model(config: Config, decoder: Decoder) -> tuple[Any, nnx.State, nnx.State]:
    """Part what a run trains from what stays as it is.

    Args:
      config: the run's settings.
      decoder: built with :func:`run_segments`; it gets the adapters, if there are to be any, and
        is quantised, if it is to be and is not yet.

    Returns:
      ``(graph, trained, frozen)``. Adapters are shapes only.

    Raises:
      ConfigError: it cannot be quantised so.
    """
    lora = lora_of(config.lora)
    if config.lora.quantize_base is not None:
        try:
            quantize_base(decoder, config.lora.quantize_base)
        except ConfigError as error:
            raise ConfigError(f"lora.quantize_base: {error}") from None
    if lora is not None:
        add_adapters(decoder, lora, adapted_layers(decoder.config, config.model.trainable))
    graph, trained, frozen = nnx.split(decoder, trained_filter(config), ...)
    return graph, trained, frozen
