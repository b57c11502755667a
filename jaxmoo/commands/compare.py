"""``jaxmoo compare``: two runs, models or results of the same examples, side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from jaxmoo.commands.command import command
from jaxmoo.errors import ConfigError
from jaxmoo.files.outputs import typed_path
from jaxmoo.runtime.memory import named_when_full

__all__ = ["add_resampling", "main", "show"]

_EXAMPLES = """examples:
  jaxmoo compare runs/mean runs/mgda
  jaxmoo compare runs/mean/export runs/mgda/export
  jaxmoo compare base.json runs/mgda
"""


@command("Stopped. The same command goes on with the next language.")
def main(arguments: Sequence[str] | None = None, prog: str = "jaxmoo compare") -> int:
    """Run the command; return its exit code: see `command`."""
    options = _parser(prog).parse_args(arguments)
    with named_when_full("Use a smaller --batch-size, or more devices."):
        return show(options.a, options.b, options)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Compare two training runs, exported models or results of evaluations on the "
        "same held-out examples, with intervals. What was not evaluated yet is, and its results "
        "are kept beside it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = "run, exported model, or results (*.json) of `jaxmoo evaluate`"
    parser.add_argument("a", type=typed_path, metavar="A", help=what)
    parser.add_argument("b", type=typed_path, metavar="B", help="likewise")
    parser.add_argument(
        "--config", help="settings of a run, for the examples that it holds out (the run's own)"
    )
    parser.add_argument("--output", type=typed_path, help="file for the differences, .json")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences at a time (16)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_resampling(parser)
    return parser


def add_resampling(parser: argparse._ActionsContainer) -> None:
    """Let a command say how intervals are drawn."""
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")


def show(a: Path, b: Path, options: argparse.Namespace) -> int:
    """Print the comparison of two sides; return 0."""
    if options.resamples < 100:
        raise ConfigError(f"--resamples takes at least 100, found {options.resamples}.")
    from jaxmoo.evaluate.compare import compare
    from jaxmoo.evaluate.sides import results_of

    how = {
        "config": options.config,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
    }
    # Whatever is no side is said before one is evaluated.
    for side in (a, b):
        if not side.exists():
            raise ConfigError(
                f"There is no {side}: expected a training run, an exported model, or results of "
                "`jaxmoo evaluate` (*.json)."
            )
    one, other = results_of(a, b, **how), results_of(b, a, **how)
    found = compare(one, other, resamples=options.resamples, seed=options.seed)
    print(f"A: {one.path} ({one.model})\nB: {other.path} ({other.model})\n\n{found.table()}")
    if options.output is not None:
        options.output.write_text(json.dumps(found.to_dict(), indent=2) + "\n", "utf-8")
    return 0
