"""``jaxmoo plan``: what a training run will cost, before there are devices, weights or data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax

from jaxmoo.commands.command import add_settings, command
from jaxmoo.config import load_config
from jaxmoo.errors import ConfigError
from jaxmoo.sizes import parse_size
from jaxmoo.train.planning import plan, shape_of

__all__ = ["main"]

MOST_DEVICES = 10_000


@command()
def main(arguments: Sequence[str] | None = None, prog: str = "jaxmoo plan") -> int:
    """Run the command; return its exit code: 0 it fits, 1 it does not, else see `command`."""
    options = _parser(prog).parse_intermixed_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    if not 1 <= options.devices <= MOST_DEVICES:
        raise ConfigError(f"--devices takes 1 to {MOST_DEVICES}, found {options.devices}.")
    jax.config.update("jax_num_cpu_devices", options.devices)
    device_memory = parse_size(options.device_memory, what="--device-memory", needs_unit=True)
    config = load_config(options.config, options.overrides)
    found = plan(config, shape_of(options.model or config.model.source))
    print(found.table())
    print(found.advice(device_memory))
    return int(found.total > device_memory)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="What a training run will cost, before there are devices, weights or data: its "
        "step is compiled for so many virtual devices, and per device memory by kind, bytes sent "
        "and floating-point operations are counted.",
    )
    add_settings(parser, "run")
    parser.add_argument("--devices", type=int, default=1, help="number of devices (1)")
    parser.add_argument("--device-memory", default="80GB", help="memory of each (80GB)")
    parser.add_argument(
        "--model",
        help="name of a published model, or a directory with its config.json (the config's "
        "model.source)",
    )
    return parser
