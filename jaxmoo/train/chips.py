"""Chips that need not be here: their memory, and compiling for them with their own compiler.

The compilers for GPUs and TPUs run without the devices. A slice of a machine is named by the chip
and how many of them there are: ``h100:8``, or ``v5e:2x4`` for a TPU's grid. Several slices of TPUs
that work together have their number before: ``2xv5e:16x16``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from jaxmoo.errors import ConfigError, JaxmooError, did_you_mean, shown

__all__ = ["CHIPS", "Chip", "ChipFullError", "Slice", "answering_for", "compile_for", "slice_of"]

GIB = 2**30

# How TPUs are put together, by their maker's documentation.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    *("8x16x16", "16x16x16", "16x16x24"),
)
_GPUS_PER_HOST = 8
_CUDNN = 9, 10, 0


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
      name: what it is called here.
      platform: "gpu" or "tpu".
      memory: bytes that a program may use: of a GPU all it has, of a TPU what its compiler allows.
      grids: the slices that there are of a TPU.
      gpu: what a GPU's compiler must know of it, by the field's name.
      title: what a GPU calls itself.
    """

    name: str
    platform: str
    memory: int
    grids: tuple[str, ...] = ()
    gpu: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    title: str = ""

    def slices(self) -> str:
        """Say which numbers of them can be asked for."""
        if self.platform == "gpu":
            return f"{self.name}:N with N from 1 to {_GPUS_PER_HOST} or a multiple of it"
        return ", ".join(f"{self.name}:{grid}" for grid in self.grids)


def _gpu(name: str, title: str, memory: int, **own: Any) -> Chip:
    common = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "threads_per_core_limit": 2048,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "device_memory_size": memory,
    }
    return Chip(name, "gpu", memory, gpu=common | own, title=title)


def _generation(
    *, cores: int, units: int, ghz: float, l2_mib: int, shared_kib: int, capability: tuple[int, int]
) -> dict[str, Any]:
    return {
        "core_count": cores,
        "fpus_per_core": units,
        "clock_rate_ghz": ghz,
        "l2_cache_size": l2_mib * 2**20,
        "shared_memory_per_core": shared_kib * 2**10,
        "shared_memory_per_block_optin": (shared_kib - 1) * 2**10,  # CUDA keeps 1 KiB
        "cuda_compute_capability": capability,
    }


_HOPPER = _generation(cores=132, units=128, ghz=1.98, l2_mib=50, shared_kib=228, capability=(9, 0))
_AMPERE = _generation(cores=108, units=64, ghz=1.41, l2_mib=40, shared_kib=164, capability=(8, 0))

# Peaks in FLOP/s are in `jaxmoo.train.throughput`, by what the devices call themselves.
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            _gpu(
                "a100",
                "NVIDIA A100-SXM4-80GB",
                85_100_068_864,
                memory_bandwidth=2_039_040_000_000,
                **_AMPERE,
            ),
            _gpu(
                "h100",
                "NVIDIA H100 80GB HBM3",
                84_942_979_072,
                memory_bandwidth=3_352_320_000_000,
                **_HOPPER,
            ),
            _gpu(
                "h200",
                "NVIDIA H200 141GB HBM3e",
                151_397_597_184,
                memory_bandwidth=4_800_000_000_000,
                **_HOPPER,
            ),
            Chip("v5e", "tpu", int(15.75 * GIB), _FLAT),
            Chip("v5p", "tpu", int(95.73 * GIB), _DEEP),
            Chip("v6e", "tpu", int(31.24 * GIB), _FLAT),
        )
    }
)


class ChipFullError(JaxmooError):
    """A program needs more memory than the chip has, says its compiler."""

    exit_code = 1


@dataclasses.dataclass(frozen=True)
class Slice:
    """Several chips of one kind that work together.

    Attributes:
      chip: the kind.
      grid: how many along each axis.
      number: how many of such slices there are, which talk over a data centre's network.
    """

    chip: Chip
    grid: tuple[int, ...]
    number: int = 1

    @property
    def name(self) -> str:
        """What it is called: ``h100:8``, or ``2xv5e:16x16`` for two slices."""
        several = f"{self.number}x" if self.number > 1 else ""
        return f"{several}{self._one}"

    @property
    def _one(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.grid))}"

    def devices(self) -> list[Any]:
        """Describe its devices, for which programs can be compiled, but on which none can run.

        Raises:
          ConfigError: the compiler for them is not installed, or does not know them.
        """
        _check_compiler(self.chip)
        from jax.experimental import topologies

        try:
            if self.chip.platform == "tpu":
                # Else it asks a metadata server, and a second process on this machine is refused.
                os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
                os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
                several = {"num_slices": self.number} if self.number > 1 else {}
                found = topologies.get_topology_desc(self._one, platform="tpu", **several)
                return list(found.devices)
            number = self.grid[0]
            hosts = -(-number // _GPUS_PER_HOST)
            found = topologies.get_topology_desc(
                platform="cuda",
                target_config=_description(self.chip),
                topology=f"1x{hosts}x{number // hosts}",
            )
        except NotImplementedError as error:
            # JAX looks for GPUs first, and gives their compiler up where it finds none.
            raise ConfigError(
                f"--chip {self.name}: JAX found no GPU and gave their compiler up. "
                "Set JAX_PLATFORMS=cpu before JAX is first used."
            ) from error
        except RuntimeError as error:
            raise ConfigError(f"--chip {self.name}: its compiler says: {error}") from error
        return list(found.devices)


def slice_of(text: str) -> Slice:
    """Read the name of a slice.

    Args:
      text: a chip's name, a colon and how many of them there are: ``h100:8``, ``v5e:2x4``; before
        it, for several slices of TPUs, their number and an x: ``2xv5e:2x4``.

    Raises:
      ConfigError: there is no such chip, or no such slice of it; says which there are.

    Example:
      >>> slice_of("v5e:2x4").grid
      (2, 4)
      >>> slice_of("2xv5e:2x4").number
      2
      >>> slice_of("h100:12")
      Traceback (most recent call last):
      ...
      jaxmoo.errors.ConfigError: --chip h100:12: there is no such slice. There are h100:N with N
      from 1 to 8 or a multiple of it.
    """
    if "," in text or "+" in text or " " in text.strip():
        raise ConfigError(
            f"--chip {text}: expected one kind of chips, since one program runs on all of them, "
            "such as v5e:2x4."
        )
    several = re.fullmatch(r"([1-9]\d{0,3})x(\D.*)", text.strip())
    number, one = (int(several[1]), several[2]) if several else (1, text.strip())
    name, _, size = one.partition(":")
    chip = CHIPS.get(name)
    if chip is None:
        known = "; ".join(one.slices() for one in CHIPS.values())
        raise ConfigError(
            f"--chip {text}: there is no chip {shown(name)}.{did_you_mean(name, CHIPS)} "
            f"There are {known}."
        )
    numbers = tuple(map(int, size.split("x"))) if re.fullmatch(r"\d{1,5}(x\d{1,5})*", size) else ()
    if chip.platform == "tpu":
        known_size = size in chip.grids
    else:
        known_size = len(numbers) == 1 and _is_number_of_gpus(numbers[0])
    if not known_size:
        near = did_you_mean(one, [f"{name}:{grid}" for grid in chip.grids])
        raise ConfigError(
            f"--chip {text}: there is no such slice.{near} There are {chip.slices()}."
        )
    if number > 1 and chip.platform != "tpu":
        raise ConfigError(
            f"--chip {text}: only TPUs come in slices. For hosts of GPUs ask for all of them, such "
            f"as {name}:16, and set mesh.slices=2 and mesh.data=2 for a replica in each."
        )
    return Slice(chip, numbers, number)


def _is_number_of_gpus(number: int) -> bool:
    return 1 <= number <= _GPUS_PER_HOST or (number > 0 and number % _GPUS_PER_HOST == 0)


def _check_compiler(chip: Chip) -> None:
    names = {"gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin"), "tpu": ("libtpu",)}[chip.platform]
    if not any(importlib.util.find_spec(name) for name in names):
        raise ConfigError(
            f"--chip {chip.name} is compiled for by its own compiler, which is not installed: "
            f"pip install 'jaxmoo[plan-{chip.platform}]' (in an environment of its own: some GB)."
        )


def _description(chip: Chip) -> str:
    """What XLA is told of a GPU that is not there, a GpuTargetConfigProto as text."""

    def field(name: str, value: Any) -> str:
        if isinstance(value, tuple):
            return f"{name} {{ major: {value[0]} minor: {value[1]} }}"
        return f"{name}: {value}"

    fields = "\n".join(field(*item) for item in chip.gpu.items())
    major, minor, patch = _CUDNN
    return (
        f'gpu_device_info {{\n{fields}\n}}\nplatform_name: "CUDA"\n'
        f"dnn_version_info {{ major: {major} minor: {minor} patch: {patch} }}\n"
        f'runtime_version {{ major: 13 }}\ndevice_description_str: "{chip.title}"\n'
    )


@contextlib.contextmanager
def answering_for(chip: Chip) -> Iterator[None]:
    """Answer for a GPU that is not there what JAX asks of it before it calls cuDNN.

    It asks for versions that decide which cases of attention there are, and has no other way of
    being told. Nothing is answered for other chips, or where JAX asks in another way; then cuDNN is
    taken to be missing.
    """
    module = _asking() if chip.platform == "gpu" else None
    if module is None:
        yield
        return
    capability = chip.gpu["cuda_compute_capability"]
    major, minor, patch = _CUDNN

    def pair(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    answers = {
        "check_cudnn_version": lambda: major * 10_000 + minor * 100 + patch,
        "check_compute_capability": lambda least: capability >= pair(least),
        "is_cuda_compute_capability_equal": lambda other: capability == pair(other),
    }
    before = {name: getattr(module, name) for name in answers if hasattr(module, name)}
    try:
        for name in before:
            setattr(module, name, answers[name])
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def _asking() -> Any:
    """JAX's own module that asks; None where a version has no such."""
    try:
        return importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    except ImportError:
        return None


def compile_for(place: Slice, traced: Any) -> Any:
    """Compile a traced program for a slice.

    Args:
      place: the slice, on whose devices the program's arguments lie.
      traced: ``jax.jit(f).trace(...)``.

    Returns:
      The compiled program, to be looked at; it cannot be called here.

    Raises:
      ChipFullError: it does not fit the chip's memory, and the compiler refuses.
    """
    from jaxmoo.runtime.compiled import nothing_kept

    platform = {"gpu": "cuda"}.get(place.chip.platform, place.chip.platform)
    try:
        with answering_for(place.chip), nothing_kept():
            return traced.lower(lowering_platforms=(platform,)).compile()
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0].split("RESOURCE_EXHAUSTED: ")[-1]
        raise ChipFullError(
            f"Does not fit {place.name}, says its compiler: {reason} Use a larger slice, more "
            "train.microbatches, a smaller data.batch_size or data.sequence_length, or "
            "model.remat=full."
        ) from error
