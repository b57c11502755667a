"""What a training run will cost, before there are devices, weights or data.

    python scripts/plan.py --config configs/quickstart.yaml --devices 8 --device-memory 80GB \\
        --model Llama-3.1-8B [section.key=value ...]

Compiles the training step for so many virtual devices and prints, per device, memory by kind,
bytes sent and floating-point operations. ``--model`` is the name of a published model or a
directory with its config.json; by default it is the config's ``model.source``.
"""

from __future__ import annotations

import argparse

import jax

from jaxmoo.config import load_config
from jaxmoo.errors import ConfigError, JaxmooError, failed
from jaxmoo.runtime.terminal import forgiving_output
from jaxmoo.sizes import parse_size
from jaxmoo.train.planning import plan, shape_of

MOST_DEVICES = 10_000


@forgiving_output
def main() -> int:
    """Run the command; return its exit code: 0 it fits, 1 it does not, 2 bad input."""
    parser = argparse.ArgumentParser(prog="plan.py", description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="YAML file with the run's settings")
    parser.add_argument("--devices", type=int, default=1, help="number of devices (1)")
    parser.add_argument("--device-memory", default="80GB", help="memory of each (80GB)")
    parser.add_argument("--model", help="published model or directory (the config's model.source)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="other settings")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    try:
        if not 1 <= options.devices <= MOST_DEVICES:
            raise ConfigError(f"--devices takes 1 to {MOST_DEVICES}, found {options.devices}.")
        jax.config.update("jax_num_cpu_devices", options.devices)
        device_memory = parse_size(options.device_memory, what="--device-memory", needs_unit=True)
        config = load_config(options.config, options.overrides)
        found = plan(config, shape_of(options.model or config.model.source))
    except JaxmooError as error:
        return failed(error)
    print(found.table())
    print(found.advice(device_memory))
    return int(found.total > device_memory)


if __name__ == "__main__":
    raise SystemExit(main())
