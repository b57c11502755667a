"""Kinds of devices, and which kind a program is made for: ``"cpu"``, ``"gpu"`` or ``"tpu"``.

The kind is a property of the devices that a program will run on, those of its mesh, and not of the
process that makes it: a program can be compiled here for chips that are elsewhere. Whatever depends
on it is therefore told, from the mesh down. What JAX has here is only the default of functions that
people call by themselves.

What a program does on GPUs and TPUs can be seen without them: ``"interpret"`` and
``"interpret-tpu"`` stand for the program of a GPU and of a TPU with its kernels interpreted, on any
device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

from jaxmoo.errors import ConfigError

__all__ = [
    "default_platform",
    "interpreted",
    "like_gpu",
    "like_tpu",
    "platform_of",
    "several_devices",
]


def platform_of(devices: Iterable[Any]) -> str:
    """Return the kind of some devices.

    Args:
      devices: devices of JAX, such as ``mesh.devices.flat``; at least one.

    Raises:
      ConfigError: they are of several kinds: one program cannot run on them.

    Example:
      >>> platform_of(jax.devices("cpu"))
      'cpu'
    """
    kinds: list[str] = sorted({_NAMES.get(str(d.platform), str(d.platform)) for d in devices})
    if len(kinds) != 1:
        raise ConfigError(
            f"expected devices of one kind, found {' and '.join(kinds) or 'none'}: one program "
            "runs on all of them. Use those of one kind."
        )
    return kinds[0]


# Devices that are there are called gpu, those of a description by the name of their driver.
_NAMES = {"cuda": "gpu", "rocm": "gpu"}


def like_gpu(platform: str | None) -> bool:
    """Whether a program has the form that GPUs want."""
    return platform in ("gpu", "interpret")


def like_tpu(platform: str | None) -> bool:
    """Whether a program has the form that TPUs want."""
    return platform in ("tpu", "interpret-tpu")


def interpreted(platform: str | None) -> bool:
    """Whether a program's kernels are interpreted.

    Example:
      >>> like_tpu("interpret-tpu"), interpreted("interpret-tpu"), interpreted("tpu")
      (True, True, False)
    """
    return platform in ("interpret", "interpret-tpu")


def default_platform() -> str:
    """Return the kind of JAX's default devices, for who does not say which ones are meant."""
    return jax.default_backend()


def several_devices() -> bool:
    """Tell whether JAX has several devices, for arrays of which nobody says where they lie."""
    return jax.device_count() > 1
