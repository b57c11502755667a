"""``jaxmoo launch``: train in several processes of one machine, and go on with those left."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from jaxmoo.commands.command import command
from jaxmoo.commands.train import make_parser
from jaxmoo.config.training import Config, load_config
from jaxmoo.errors import ConfigError
from jaxmoo.runtime.workers import LOST, Workers

__all__ = ["main"]

# Seconds in which processes that have lost another may end by themselves, and say what they saw.
_PATIENCE = 40
_KILLED = 128 + signal.SIGKILL


@command()
def main(arguments: Sequence[str] | None = None, prog: str = "jaxmoo launch") -> int:
    """Run the command; return its exit code: see `command`."""
    options, training = _parser(prog).parse_known_args(arguments)
    if options.devices < 1:
        raise ConfigError(f"--devices must be at least 1, found {options.devices}.")
    if options.processes < 1 or not 1 <= options.min_processes <= options.processes:
        raise ConfigError(
            "--processes must be at least 1, and --min-processes from 1 to --processes; found "
            f"{options.processes} and {options.min_processes}."
        )
    if not any(text == "--config" or text.startswith("--config=") for text in training):
        raise ConfigError("Give --config and the other arguments of jaxmoo train, too.")
    from jaxmoo.train.setup import check_devices

    train = make_parser(f"{prog} -> jaxmoo train").parse_intermixed_args(training)
    config = load_config(train.config, train.overrides)
    check_devices(config, options.processes * options.devices)
    workers = Workers(
        [sys.executable, "-m", "jaxmoo", "train", *training],
        patience=_PATIENCE,
        devices=options.devices,
    )
    with workers.passing_signals():
        return _run(workers, config, options)


def _run(workers: Workers, config: Config, options: argparse.Namespace) -> int:
    places, count = list(range(options.processes)), options.processes
    for again in range(options.max_restarts + 1):
        if again:
            _tell(f"starting {count} processes ({again} of {options.max_restarts} restarts)")
        ended = workers.run(
            places[:count], lambda place, pid: _tell(f"process {place} is PID {pid}")
        )
        if workers.asked is not None or not (ended.lost or ended.code in (LOST, _KILLED)):
            return ended.code
        places = [place for place in places if place not in ended.lost]
        which = ", ".join(map(str, ended.lost)) or "none that is known"
        _tell(f"lost: {which}; {len(places)} of {options.processes} processes are left")
        count = _most(config, len(places), options)
        if not count:
            _tell("too few are left to go on")
            break
    return LOST


def _most(config: Config, left: int, options: argparse.Namespace) -> int:
    """The largest number of processes among which a step can be divided, 0 if there is none."""
    from jaxmoo.train.setup import check_devices

    for count in range(left, options.min_processes - 1, -1):
        try:
            check_devices(config, count * options.devices)
        except ConfigError:
            continue
        return count
    return 0


def _tell(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train in several processes of this machine, with GPUs of their own where "
        "there are any. When a process is lost, all are started again, as many as are left and "
        "divide the batch, and go on from the last checkpoint.",
        epilog="All other arguments are those of `jaxmoo train`. For several machines see launch/.",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="to begin with")
    parser.add_argument(
        "--min-processes", type=int, default=1, metavar="N", help="to go on with (%(default)s)"
    )
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="of each process (%(default)s)"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=3, metavar="N", help="in all (%(default)s)"
    )
    return parser
