"""Hugging Face directories: finding, loading and saving models and tokenizers."""

from jaxmoo.hf.adapter import load_adapter, save_adapter
from jaxmoo.hf.cache import cache_directory
from jaxmoo.hf.card import ModelCard
from jaxmoo.hf.load import load_config, load_model
from jaxmoo.hf.save import save_model
from jaxmoo.hf.source import resolve_source
from jaxmoo.hf.tokenizer import check_tokenizer, load_tokenizer
from jaxmoo.hf.wheels import fetch_wheel

__all__ = [
    "ModelCard",
    "cache_directory",
    "check_tokenizer",
    "fetch_wheel",
    "load_adapter",
    "load_config",
    "load_model",
    "load_tokenizer",
    "resolve_source",
    "save_adapter",
    "save_model",
]
