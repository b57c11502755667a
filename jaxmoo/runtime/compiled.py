"""Compiled programs that outlive the process: a resumed run begins at once, with the very same."""

from __future__ import annotations

import contextlib
import hashlib
import platform as machine
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxmoo.platforms import default_platform, platform_of
from jaxmoo.slices import by_slice

__all__ = ["compiler_options", "distrust_on_cpus", "kept_programs", "nothing_kept"]

# What makes better programs than the compilers' defaults, by their own account.
_OPTIONS: dict[str, dict[str, Any]] = {
    # Else nothing runs beside the exchange of gradients.
    "tpu": {"xla_tpu_enable_async_all_to_all": True},
}


# Of TPU v5e, slices of more chips than this route messages in a way for which the compiler has no
# asynchronous all-to-all: it ends with an error.
_V5E, _MOST_V5E = "TPU v5 lite", 16


def compiler_options(devices: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of XLA's compiler with which a training step is compiled.

    Args:
      devices: those that run it.
      given: options that are set as well, or instead; None leaves one to the compiler.

    Example:
      >>> compiler_options(jax.devices("cpu"), {"xla_embed_ir_in_executable": None})
      {}
    """
    own = _OPTIONS.get(platform_of(devices), {})
    if devices[0].device_kind == _V5E and len(by_slice(devices)[0]) > _MOST_V5E:
        own = {}
    options = {**own, **given}
    return {name: value for name, value in options.items() if value is not None}


def distrust_on_cpus(devices: Sequence[Any]) -> None:
    """Use no compilation cache, not even the user's, where several CPU devices work together.

    A CPU's program that was compiled here does its collective operations in one order. Read from
    the cache it does those that do not need each other in any order (jaxlib 0.10.2), on every
    device another, and they mistake each other's messages.

    Args:
      devices: those that work together.
    """
    if len(devices) > 1 and platform_of(devices) == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)


@contextlib.contextmanager
def kept_programs(directory: Path, platform: str | None = None) -> Iterator[None]:
    """Keep what is compiled meanwhile in a directory, and take from there what is there already.

    JAX's persistent compilation cache with its own limits: programs that took a second or more. It
    does nothing where the user keeps them elsewhere (``JAX_COMPILATION_CACHE_DIR``) or nowhere
    (``JAX_ENABLE_COMPILATION_CACHE=0``), nor after :func:`distrust_on_cpus`.

    Args:
      directory: where; made when it is needed.
      platform: the kind of devices that programs are for; by default that of JAX's.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder, kept_programs(Path(folder)):
      ...     print(jax.jit(lambda x: x + 1)(1))
      2
    """
    settings: Any = jax.config  # whose names are made when JAX is imported
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        yield
        return
    compilation_cache.reset_cache()
    place = directory / _place(default_platform() if platform is None else platform)
    jax.config.update("jax_compilation_cache_dir", str(place))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Use no compilation cache: what is compiled meanwhile could not be loaded here.

    Example:
      >>> with nothing_kept():
      ...     print(jax.config.jax_enable_compilation_cache)
      False
    """
    settings: Any = jax.config
    before = settings.jax_enable_compilation_cache
    compilation_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _place(platform: str) -> str:
    """Name what programs run on as far as JAX's own keys do not: the instructions of a CPU."""
    if platform != "cpu":
        return platform
    description = machine.machine() + machine.processor()
    # Programs for another CPU would be loaded, and end in an illegal instruction.
    file = Path("/proc/cpuinfo")
    if file.exists():
        lines = file.read_text().splitlines()
        description += next((x for x in lines if x.startswith(("flags", "Features"))), "")
    return f"cpu-{hashlib.sha256(description.encode()).hexdigest()[:8]}"
