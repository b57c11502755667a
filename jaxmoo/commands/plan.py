"""``jaxmoo plan``: what a training run will cost, before there are devices, weights or data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jaxmoo.commands.command import add_settings, command
from jaxmoo.config import load_config
from jaxmoo.errors import ConfigError
from jaxmoo.sizes import parse_size
from jaxmoo.train.chips import CHIPS, slice_of

__all__ = ["main"]

MOST_DEVICES = 10_000


@command()
def main(arguments: Sequence[str] | None = None, prog: str = "jaxmoo plan") -> int:
    """Run the command; return its exit code: 0 it fits, 1 it does not, else see `command`."""
    options = _parser(prog).parse_intermixed_args(arguments)
    import jax

    from jaxmoo.train.gradient_source import ordinary, ordinary_gradients
    from jaxmoo.train.planning import plan, shape_of

    jax.config.update("jax_platforms", "cpu")
    place = None if options.chip is None else slice_of(options.chip)
    if place is None:
        devices = 1 if options.devices is None else options.devices
        if not 1 <= devices <= MOST_DEVICES:
            raise ConfigError(f"--devices takes 1 to {MOST_DEVICES}, found {devices}.")
        jax.config.update("jax_num_cpu_devices", devices)
    elif options.devices is not None:
        raise ConfigError(
            f"--devices is a number of virtual devices; --chip {place.name} says how many there "
            "are. Leave out one of them."
        )
    memory = place.chip.memory if place else parse_size("80GB")
    if options.device_memory is not None:
        memory = parse_size(options.device_memory, what="--device-memory", needs_unit=True)
    config = load_config(options.config, options.overrides)
    architecture = shape_of(options.model or config.model.source)
    found = plan(config, architecture, place=place)
    plain = None
    if options.against == "plain":
        plain = plan(ordinary(config), architecture, ordinary_gradients, place)
    print(found.table(plain))
    print(found.advice(memory))
    return int(found.total > memory)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="What a training run will cost, before there are devices, weights or data: its "
        "step is compiled for so many virtual devices, or for the chips named, and per device "
        "memory by kind, bytes sent and floating-point operations are counted.",
    )
    add_settings(parser, "run")
    parser.add_argument("--devices", type=int, help="number of virtual devices (1)")
    parser.add_argument(
        "--chip",
        metavar="NAME:SIZE",
        help="compile for these chips by their own compiler, such as h100:8, v5e:2x4 or two "
        f"slices, 2xv5e:16x16; of {', '.join(CHIPS)}",
    )
    parser.add_argument("--device-memory", help="memory of each (80GB, or what the chip has)")
    parser.add_argument(
        "--against", choices=["plain"], help="put ordinary fine-tuning on the same tokens beside it"
    )
    parser.add_argument(
        "--model",
        help="name of a published model, or a directory with its config.json (the config's "
        "model.source)",
    )
    return parser
