"""``jaxmoo train``: fine-tune one language model on many languages."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax

from jaxmoo.commands.command import add_settings, command
from jaxmoo.config.training import help_text, load_config, to_yaml
from jaxmoo.errors import InterruptedRunError, JaxmooError, failed
from jaxmoo.runtime.processes import Launch, start
from jaxmoo.train.run import train

__all__ = ["main", "make_parser"]


@command()
def main(arguments: Sequence[str] | None = None, prog: str = "jaxmoo train") -> int:
    """Run the command; return its exit code: see `command`."""
    # Settings may stand between flags.
    options = make_parser(prog).parse_intermixed_args(arguments)
    config = load_config(options.config, [*options.overrides, *_short(options)])
    if options.print_config:
        print(to_yaml(config), end="")
        return 0
    try:
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
    except InterruptedRunError:
        raise
    except (JaxmooError, OSError) as error:
        if not jax.distributed.is_initialized():
            raise
        return failed(error, f" (process {jax.process_index()})")
    return 0


def _short(options: argparse.Namespace) -> list[str]:
    """Settings that have flags of their own."""
    pushed = [f"push_to_hub={options.push_to_hub}"] if options.push_to_hub else []
    return [*pushed, *(["hub_private=true"] if options.private else [])]


def make_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command's arguments.

    Args:
      prog: what the command is called.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Fine-tune one language model on many languages, conflicts between them "
        "resolved per block. The same command resumes an interrupted run.",
        epilog="settings:\n" + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings(parser, "run")
    parser.add_argument("--print-config", action="store_true", help="print the settings and stop")
    parser.add_argument(
        "--push-to-hub", metavar="REPO", help="upload the export, with its card (push_to_hub=REPO)"
    )
    parser.add_argument(
        "--private", action="store_true", help="make that a private one (hub_private=true)"
    )
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
    return parser
