"""Several processes that run one command: how they are told of each other, and how they fail."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from jaxmoo.errors import ConfigError, InterruptedRunError, JaxmooError, failed
from jaxmoo.runtime.launch import Launch

__all__ = ["add_mesh", "add_processes", "mesh_axes", "together"]


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Let a command run in several processes.

    Args:
      parser: the command's.
    """
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


def together(options: argparse.Namespace, work: Callable[[], object]) -> int:
    """Connect with the other processes, if there are any, and do something with them.

    Args:
      options: of a command to which `add_processes` was added.
      work: what to do; nothing has used a device before it.

    Returns:
      The exit code: 0, or that of the error where there are several processes, for the message says
      which one failed.

    Raises:
      JaxmooError, OSError: where there is one process.
    """
    import jax

    from jaxmoo.runtime.processes import start

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
        work()
    except InterruptedRunError:
        raise
    except (JaxmooError, OSError) as error:
        if not jax.distributed.is_initialized():
            raise
        return failed(error, f" (process {jax.process_index()})")
    return 0


def add_mesh(parser: argparse._ActionsContainer, axes: tuple[str, ...]) -> None:
    """Let a command arrange its devices.

    Args:
      parser: the command's, or a group of it.
      axes: those of :class:`jaxmoo.config.training.MeshConfig` that it knows.
    """
    parser.add_argument(
        "--mesh",
        nargs="+",
        metavar="AXIS=N",
        help=f"how devices are arranged, as mesh of a config: {', '.join(axes)} (chosen)",
    )
    parser.set_defaults(mesh_axes=axes)


def mesh_axes(options: argparse.Namespace) -> dict[str, int]:
    """Read what ``--mesh`` was given.

    Raises:
      ConfigError: there is no such axis, or a size is no positive number.

    Example:
      >>> parser = argparse.ArgumentParser()
      >>> add_mesh(parser, ("data", "tensor"))
      >>> mesh_axes(parser.parse_args(["--mesh", "tensor=2"]))
      {'tensor': 2}
    """
    found = {}
    for text in options.mesh or ():
        name, _, size = text.partition("=")
        if name not in options.mesh_axes or not size.isdecimal() or int(size) < 1:
            raise ConfigError(
                f"--mesh takes AXIS=N with an axis of {', '.join(options.mesh_axes)} and a "
                f"positive number, found {text!r}."
            )
        found[name] = int(size)
    return found
