"""``jaxmoo doctor``: what is installed, on which devices it runs, and what each part would need."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import NamedTuple

from jaxmoo import __version__
from jaxmoo.commands.command import command

__all__ = ["Needed", "main", "needed"]

_PARTS = {
    "": "the library: aggregators, resolve_conflicts, the engine",
    "train": "all commands",
    "eval": "scores of generated text",
    "plan-gpu": "jaxmoo plan --chip of GPUs",
    "plan-tpu": "jaxmoo plan --chip of TPUs",
}


class Needed(NamedTuple):
    """What a part of the package needs.

    Attributes:
      package: its name.
      least: the lowest version, as numbers; empty if any will do.
      extra: the part; empty for the library itself.
    """

    package: str
    least: tuple[int, ...]
    extra: str

    def missing(self) -> str:
        """What is wrong with what is installed here; empty if nothing is."""
        try:
            found = metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return f"{self.package} is not installed"
        if _numbers(found) < self.least:
            return f"{self.package} {found} is older than {'.'.join(map(str, self.least))}"
        return ""


@command()
def main(arguments: Sequence[str] | None = None, prog: str = "jaxmoo doctor") -> int:
    """Run the command; return its exit code: 1 where the library lacks a package, else 0."""
    argparse.ArgumentParser(
        prog=prog,
        description="Show versions, devices and what is installed, and what each part of jaxmoo "
        "would need. For a report of a problem.",
    ).parse_args(arguments)
    print(f"jaxmoo {__version__}, Python {platform.python_version()}, {platform.platform()}")
    requirements = needed(metadata.requires("jaxmoo") or []) if _installed() else []
    for extra, what in _PARTS.items():
        mine = [n for n in requirements if n.extra == extra]
        print(_part(extra, what, [p for n in mine if (p := n.missing())], known=bool(mine)))
    print("\n".join(_devices()))
    return int(any(n.missing() for n in requirements if not n.extra))


def needed(requirements: Sequence[str]) -> list[Needed]:
    """Read a package's requirements.

    Example:
      >>> needed(["jax>=0.10.2", 'jaxmoo[train]; extra == "eval"', 'scipy>=1.14; extra == "train"'])
      [Needed(package='jax', least=(0, 10, 2), extra=''), Needed(package='scipy', least=(1, 14), \
extra='train')]
    """
    found = []
    for text in requirements:
        wanted, _, marker = text.partition(";")
        package = re.match(r"\s*([\w.-]+)", wanted)
        extra = re.search(r"""extra == ["']([\w-]+)["']""", marker)
        least = re.search(r"[>~=]=\s*([\d.]+)", wanted)
        if package and package[1] != "jaxmoo":
            version = _numbers(least[1].rstrip(".")) if least else ()
            ours = extra[1] if extra else ""
            found.append(Needed(package[1], version, ours))
            part = re.search(r"\[([\w-]+)\]", wanted)  # such as jax[cuda13]
            if part and not found[-1].missing():
                theirs = needed(metadata.requires(package[1]) or [])
                found += [n._replace(extra=ours) for n in theirs if n.extra == part[1]]
    return found


def _part(extra: str, what: str, problems: Sequence[str], *, known: bool) -> str:
    name = f"jaxmoo[{extra}]" if extra else "jaxmoo"
    if not known:
        return f"{name} ({what}): not known; what is installed as jaxmoo does not say"
    if not problems:
        return f"{name} ({what}): complete"
    return f'{name} ({what}): {"; ".join(problems)}\n  pip install "{name}"'


def _devices() -> Iterator[str]:
    """What JAX runs on."""
    for package in ("jax", "jaxlib", "flax", "optax", "numpy"):
        try:
            yield f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            yield f"{package}: not installed"
    if importlib.util.find_spec("jax") is None:
        return
    import jax  # only here: the rest of this command is for where it is missing

    try:
        devices = jax.devices()
    except RuntimeError as error:
        yield f"devices: {error}"
        return
    kinds = [f"{d.platform} ({d.device_kind})" for d in devices]
    counted = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    yield f"devices: {counted}; {os.cpu_count()} CPU cores"


def _installed() -> bool:
    try:
        metadata.version("jaxmoo")
    except metadata.PackageNotFoundError:
        return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
