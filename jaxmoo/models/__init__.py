"""Decoder-only language models and their losses."""

from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.layers import DecoderLayer, rope_frequencies, rope_tables
from jaxmoo.models.lora import LoRA, add_adapters, initial_adapters, merge_adapters
from jaxmoo.models.loss import (
    language_loss,
    router_loss,
    summed_loss,
    target_mask,
    token_nll,
)
from jaxmoo.models.paths import (
    logical_paths,
    named_leaves,
    parameter_paths,
    segments_for,
    trainable_filter,
)
from jaxmoo.models.rope import Llama3Rope

__all__ = [
    "Decoder",
    "DecoderConfig",
    "DecoderLayer",
    "Llama3Rope",
    "LoRA",
    "add_adapters",
    "initial_adapters",
    "language_loss",
    "logical_paths",
    "merge_adapters",
    "named_leaves",
    "parameter_paths",
    "rope_frequencies",
    "rope_tables",
    "router_loss",
    "segments_for",
    "summed_loss",
    "target_mask",
    "token_nll",
    "trainable_filter",
]
