"""The command line of ``scripts/train.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jax

from jaxmoo.config.training import help_text, load_config, to_yaml
from jaxmoo.errors import JaxmooError, failed
from jaxmoo.runtime.processes import Launch, start
from jaxmoo.runtime.terminal import forgiving_output
from jaxmoo.train.run import InterruptedRunError, train

__all__ = ["main"]


@forgiving_output
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
      Its exit code: 0 done; 2 bad input, nothing was trained; 1 failed along the way; 128 + N
      stopped by signal N, everything saved.
    """
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Fine-tune one language model on many languages, conflicts between them "
        "resolved per block. The same command resumes an interrupted run.",
        epilog="settings:\n" + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file with the run's settings")
    parser.add_argument("--print-config", action="store_true", help="print the settings and stop")
    _add_processes(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="other settings")
    # Settings may stand between flags.
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        if options.print_config:
            print(to_yaml(config), end="")
            return 0
        start(
            Launch(
                coordinator=options.coordinator_address,
                processes=options.num_processes,
                process=options.process_id,
                detect=options.distributed,
                heartbeat=options.heartbeat_timeout,
                patience=options.connect_timeout,
            )
        )
        train(config)
    except InterruptedRunError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except (JaxmooError, OSError) as error:
        several = jax.distributed.is_initialized()
        return failed(error, f" (process {jax.process_index()})" if several else "")
    return 0


def _add_processes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes",
        "Slurm (srun), Open MPI and the TPU pods of GKE are recognised. Elsewhere, name the "
        "first process, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
    )
    group.add_argument("--coordinator-address", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--num-processes", type=int, metavar="N")
    group.add_argument("--process-id", type=int, metavar="I", help="from 0")
    group.add_argument(
        "--distributed", action="store_true", help="look for other processes, as on a TPU VM"
    )
    group.add_argument(
        "--connect-timeout",
        type=int,
        default=Launch().patience,
        metavar="SECONDS",
        help="to wait at the start until all have come (%(default)s)",
    )
    group.add_argument(
        "--heartbeat-timeout",
        type=int,
        default=Launch().heartbeat,
        metavar="SECONDS",
        help="after which a silent process is taken for dead and all are ended (%(default)s)",
    )
