"""Slices: devices that are wired to each other; slices talk over a data centre's network.

That network is many times slower, so what is sent over it is chosen with care: see
:mod:`jaxmoo.mesh`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxmoo.errors import ConfigError
from jaxmoo.platforms import platform_of

__all__ = ["by_slice", "wired_axes"]


def by_slice(devices: Sequence[Any], given: int | None = None) -> list[list[Any]]:
    """Divide devices by the slice that they are in.

    Args:
      devices: at least one, all of one kind.
      given: how many slices there must be. None takes as many as TPUs say there are, and one of
        other devices. On GPUs a slice is what shares fast links, in most clusters a host. CPUs are
        in no slices: equal runs of them stand for some, to try things out.

    Returns:
      The devices of each slice, in the order of the slices' numbers and otherwise as given.

    Raises:
      ConfigError: there is another number of slices, they are of different sizes, or the devices
        are of several kinds.

    Example:
      >>> import jax
      >>> len(by_slice(jax.devices("cpu")[:1]))
      1
    """
    platform, number = platform_of(devices), len(devices)
    if platform == "cpu":
        given = given or 1
        if number % given:
            raise ConfigError(
                f"mesh.slices ({given}) must divide the number of devices ({number}): slices are "
                "of one size."
            )
        return [list(devices[i : i + number // given]) for i in range(0, number, number // given)]
    if platform != "tpu" and given in (None, 1):
        return [list(devices)]
    found: dict[int, list[Any]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    if given not in (None, len(found)):
        raise ConfigError(
            f"mesh.slices ({given}): the {number} devices are in {len(found)} "
            f"slice{'s' * (len(found) > 1)}. Use mesh.slices={len(found)}, or leave it out."
        )
    sizes = [len(found[index]) for index in sorted(found)]
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"expected slices of one size, found {', '.join(map(str, sizes))} devices. Use slices "
            "of one size."
        )
    return [found[index] for index in sorted(found)]


def wired_axes(devices: Sequence[Any]) -> int:
    """Count the axes of the torus that TPUs of a slice lie on; 0 for devices that have no place.

    Args:
      devices: all of one kind.
    """
    places = [getattr(device, "coords", None) for device in devices]
    if platform_of(devices) != "tpu" or None in places:
        return 0
    return sum(len(set(along)) > 1 for along in zip(*places, strict=True))
