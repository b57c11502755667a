"""Several processes that train one model: how they find each other, and how they agree.

Every process runs the same program on the same settings. What decides where it goes next must be
the same in all of them, or some would wait for ever in a collective operation that the others never
reach. So a decision that depends on files, clocks or signals goes through one of the functions
below, or through :mod:`jaxmoo.runtime.signals`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jaxmoo.errors import ConfigError, JaxmooError
from jaxmoo.runtime.compiled import distrust_on_cpus
from jaxmoo.runtime.launch import Launch

__all__ = [
    "Agreement",
    "UnreachableError",
    "barrier",
    "check_same",
    "everywhere",
    "from_first",
    "is_first",
    "launched_together",
    "place",
    "said_by_first",
    "start",
]

# Seconds that a process which is done, or has failed, waits for the others before all are ended.
_SHUTDOWN = 30


class UnreachableError(JaxmooError):
    """The other processes did not come, or went before all were there."""

    exit_code = 1


def launched_together(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell from the environment whether a launcher has started several processes.

    Slurm's ``srun``, Open MPI's ``mpirun`` and the TPU pods of GKE say so. Elsewhere, the
    coordinator is named, or detection asked for.

    Example:
      >>> launched_together({"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"})
      True
      >>> launched_together({"SLURM_NTASKS": "2"})  # in the batch script itself, outside srun
      False
    """
    counts = [
        environment.get("SLURM_NTASKS") if "SLURM_STEP_NODELIST" in environment else None,
        environment.get("OMPI_COMM_WORLD_SIZE"),
        environment.get("MEGASCALE_NUM_SLICES"),
        str(1 + environment.get("TPU_WORKER_HOSTNAMES", "").count(",")),
    ]
    return any(int(count) > 1 for count in counts if count)


def start(launch: Launch) -> bool:
    """Connect with the other processes, if there are any; call before anything uses a device.

    Args:
      launch: what the command line says; the environment variables ``JAX_COORDINATOR_ADDRESS``,
        ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` stand in for what it does not.

    Returns:
      Whether there may be other processes.

    Raises:
      ConfigError: the three contradict each other, or nothing says who the others are.
      UnreachableError: they do not come.
    """
    coordinator = launch.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number(launch.processes, "JAX_NUM_PROCESSES")
    process = _number(launch.process, "JAX_PROCESS_ID")
    given = [coordinator is not None, processes is not None, process is not None]
    if not any(given) and not launch.detect and not launched_together():
        return False
    if any(given) and not all(given) and not launch.detect and not launched_together():
        raise ConfigError(
            "Name all three of --coordinator-address, --num-processes and --process-id (or the "
            "environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID), "
            "or none of them."
        )
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ConfigError(
            f"--process-id counts from 0 to one less than --num-processes ({processes}), found "
            f"{process}."
        )
    # It would take SIGTERM for itself; see jaxmoo.runtime.signals.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=launch.patience,
            heartbeat_timeout_seconds=launch.heartbeat,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except ValueError as error:
        raise ConfigError(
            f"Nothing says where the other processes are: {error}\nName them with "
            "--coordinator-address, --num-processes and --process-id."
        ) from error
    except RuntimeError as error:
        raise UnreachableError(
            f"Not all processes have come together within {launch.patience} seconds: {error}"
        ) from error
    distrust_on_cpus(jax.devices())
    return True


def _number(given: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if given is not None or text is None:
        return given
    if not text.isdecimal():
        raise ConfigError(f"{variable} must be a number, found {text!r}.")
    return int(text)


def is_first() -> bool:
    """Tell whether this is the process that writes reports and talks to people."""
    return jax.process_index() == 0


def said_by_first(say: Callable[[str], None]) -> Callable[[str], None]:
    """Return what says lines to a person in the first process, and nothing in the others."""
    return say if is_first() else lambda _: None


def barrier(name: str) -> None:
    """Wait until every process is here."""
    multihost_utils.sync_global_devices(name)


def from_first(value: int) -> int:
    """Return what the first process gives here; the others' values do not count."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def everywhere(flag: bool) -> bool:
    """Tell whether something holds in every process."""
    return bool(np.all(multihost_utils.process_allgather(np.bool_(flag))))


class Agreement:
    """Numbers that all processes know, one exchange behind.

    Every process calls :meth:`exchange` equally often. A single process knows its own at once.

    Example:
      >>> Agreement().exchange(15, 0)
      (15, 0)
    """

    def __init__(self) -> None:
        self._several = jax.process_count() > 1
        if self._several:
            mesh = Mesh(np.array(jax.devices()), ("device",))
            self._each = NamedSharding(mesh, P("device"))
            self._largest = jax.jit(lambda x: x.max(0), out_shardings=NamedSharding(mesh, P()))
        self._sent: jax.Array | None = None

    def exchange(self, *mine: int) -> tuple[int, ...]:
        """Send this process's numbers; return the largest of each that were sent the time before.

        They are as many every time; the first time each is 0.

        The exchange is queued behind what the devices have to do, and read a call later, when they
        have done it: nobody waits for it.
        """
        if not self._several:
            return mine
        sent, self._sent = self._sent, self.largest(np.array(mine, np.int32))
        return (0,) * len(mine) if sent is None else tuple(map(int, np.asarray(sent)))

    def largest(self, mine: np.ndarray) -> Any:
        """Return the largest of each number over all processes, to be read later.

        Like :meth:`exchange` it is queued behind what the devices have to do.

        Args:
          mine: integers below 2**31, this process's, of any shape.

        Returns:
          An array of that shape that every process can read.
        """
        if not self._several:
            return mine
        rows = np.broadcast_to(mine.astype(np.int32), (len(jax.devices()), *mine.shape))
        return self._largest(place(rows, self._each))


def check_same(**texts: str) -> None:
    """Raise unless every process gives the same texts.

    Args:
      **texts: what must be the same, by what a message calls it.

    Raises:
      ConfigError: names what differs, and where.
    """
    digests = [hashlib.sha256(text.encode()).digest() for text in texts.values()]
    mine = np.stack([np.frombuffer(digest, np.uint8) for digest in digests])
    all_of_them = multihost_utils.process_allgather(mine).reshape(-1, *mine.shape)
    for name, column in zip(texts, all_of_them.swapaxes(0, 1), strict=True):
        others = np.flatnonzero((column != column[0]).any(-1))
        if len(others):
            raise ConfigError(
                f"Processes do not have the same {name}: {', '.join(map(str, others))} differ from "
                "process 0. Start all of them with the same command, on the same files and the "
                "same versions."
            )


def place(batch: Any, sharding: Sharding) -> Any:
    """Make arrays over all devices of what every process holds, or can make, as a whole.

    Args:
      batch: pytree of NumPy arrays, the same in every process.
      sharding: how they lie on the devices; each process copies its own pieces.
    """
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch
    )
