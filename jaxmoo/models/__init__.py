"""Decoder-only language models and their losses."""

from jaxmoo.models.config import DecoderConfig, Llama3Rope
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.layers import DecoderLayer, rope_frequencies, rope_tables
from jaxmoo.models.loss import language_loss, target_mask, token_nll
from jaxmoo.models.paths import (
    logical_paths,
    named_leaves,
    parameter_paths,
    segments_for,
    trainable_filter,
)

__all__ = [
    "Decoder",
    "DecoderConfig",
    "DecoderLayer",
    "Llama3Rope",
    "language_loss",
    "logical_paths",
    "named_leaves",
    "parameter_paths",
    "rope_frequencies",
    "rope_tables",
    "segments_for",
    "target_mask",
    "token_nll",
    "trainable_filter",
]
