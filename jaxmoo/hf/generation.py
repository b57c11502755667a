"""How a model of a Hugging Face directory generates: what ends a text, and how it is drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmoo.errors import CheckpointError, ConfigError
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.load import read_json
from jaxmoo.models.sampling import Sampling

__all__ = ["generation_config", "left_to_callers", "sampling_of", "stop_tokens"]

FILE = "generation_config.json"


def stop_tokens(source: Path) -> list[int]:
    """Return the tokens that end a text, in the order of the files, as transformers takes them.

    Args:
      source: the model's directory: its ``generation_config.json``, else its ``config.json``.

    Raises:
      CheckpointError: a file is damaged.
    """
    for name in (FILE, "config.json"):
        file = typed_path(source) / name
        if not file.is_file():
            continue
        found = read_json(file).get("eos_token_id")
        if found is not None:
            tokens = found if isinstance(found, list) else [found]
            if not all(type(token) is int for token in tokens):
                raise CheckpointError(
                    f"{file} has eos_token_id={found!r}, expected a token's number or a list of "
                    "such numbers"
                )
            return tokens
    return []


# Settings of how tokens are drawn, and those that do nothing: of others that change what is drawn.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_IDLE: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "min_length": 0,
    "min_new_tokens": None,
    "num_beams": 1,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "sequence_bias": None,
    "guidance_scale": None,
}


def sampling_of(source: Path) -> tuple[Sampling, list[str]]:
    """Read how a model's makers draw tokens from it.

    Args:
      source: the model's directory; its ``generation_config.json``, if it has one. transformers'
        own default of the 50 likeliest tokens is not taken where the file does not say it.

    Returns:
      The settings, and what else the file asks for that would change what is drawn, such as
      ``repetition_penalty=1.1``.

    Raises:
      CheckpointError: the file is damaged.
    """
    file = typed_path(source) / FILE
    found = read_json(file) if file.is_file() else {}
    settings = {name: found[name] for name in _SAMPLING if found.get(name) is not None}
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(
            value, int if name == "top_k" else int | float
        ):
            raise CheckpointError(f"{file} has {name}={value!r}, expected a number")
    if settings.get("top_k") == 0:  # which transformers takes for no limit
        del settings["top_k"]
    try:
        sampling = Sampling(**settings)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    others = [
        f"{name}={found[name]}"
        for name, idle in _IDLE.items()
        if found.get(name) not in (None, idle)
    ]
    return sampling, others


def generation_config(source: Path, stop: Sequence[int]) -> str | None:
    """Make a ``generation_config.json`` by which these tokens end a text, too.

    Args:
      source: the model's directory; its own tokens come first.
      stop: more of them.

    Returns:
      The file's text; None where ``source`` says all of it already.

    Raises:
      CheckpointError: a file of ``source`` is damaged.
    """
    tokens = _together(source, stop)
    if tokens == stop_tokens(source):
        return None
    file = typed_path(source) / FILE
    config: dict[str, Any] = {}
    if file.is_file():
        config = read_json(file)
        # Said of a file that holds nothing but what the model's config says.
        config.pop("_from_model_config", None)
    else:
        # Without the file, transformers takes these from the model's config; with it, it does not.
        model = read_json(typed_path(source) / "config.json")
        config = {
            name: model[name]
            for name in ("bos_token_id", "pad_token_id")
            if model.get(name) is not None
        }
    config["eos_token_id"] = tokens if len(tokens) > 1 else tokens[0]
    return json.dumps(config, indent=2) + "\n"


def left_to_callers(source: Path, stop: Sequence[int]) -> str | None:
    """Say what a caller must know who generates with adapters, which have no such file.

    Args:
      source: the directory of the model without them.
      stop: tokens that end a reply.

    Returns:
      A line; None where ``source`` says all of it already.
    """
    tokens = _together(source, stop)
    if tokens == stop_tokens(source):
        return None
    return (
        "Adapters do not say where a reply ends, and their base model ends texts with other "
        f"tokens: generate with eos_token_id={tokens}."
    )


def _together(source: Path, stop: Sequence[int]) -> list[int]:
    return list(dict.fromkeys([*stop_tokens(source), *stop]))
