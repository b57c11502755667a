"""Compiled programs that outlive the process: a resumed run begins at once, with the very same."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

__all__ = ["distrust_on_cpus", "kept_programs"]


def distrust_on_cpus() -> None:
    """Use no compilation cache, not even the user's, where several CPU devices work together.

    A CPU's program that was compiled here does its collective operations in one order. Read from
    the cache it does those that do not need each other in any order (jaxlib 0.10.2), on every
    device another, and they mistake each other's messages.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)


@contextlib.contextmanager
def kept_programs(directory: Path) -> Iterator[None]:
    """Keep what is compiled meanwhile in a directory, and take from there what is there already.

    JAX's persistent compilation cache with its own limits: programs that took a second or more. It
    does nothing where the user keeps them elsewhere (``JAX_COMPILATION_CACHE_DIR``) or nowhere
    (``JAX_ENABLE_COMPILATION_CACHE=0``), nor after :func:`distrust_on_cpus`.

    Args:
      directory: where; made when it is needed.

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
    jax.config.update("jax_compilation_cache_dir", str(directory / _machine()))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def _machine() -> str:
    """Name what programs run on as far as JAX's own keys do not: the instructions of a CPU."""
    if jax.default_backend() != "cpu":
        return jax.default_backend()
    description = platform.machine() + platform.processor()
    # Programs for another CPU would be loaded, and end in an illegal instruction.
    file = Path("/proc/cpuinfo")
    if file.exists():
        lines = file.read_text().splitlines()
        description += next((x for x in lines if x.startswith(("flags", "Features"))), "")
    return f"cpu-{hashlib.sha256(description.encode()).hexdigest()[:8]}"
