"""The command ``jaxmoo``: finds the one that is meant and leaves the rest to it.

Every other module of this package is one command; it is imported once it is known to be meant.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from jaxmoo import __version__
from jaxmoo.commands.command import command
from jaxmoo.errors import ConfigError, did_you_mean

__all__ = ["COMMANDS", "main", "run"]

COMMANDS = {
    "train": "fine-tune one model on many languages, or go on with a run",
    "launch": "train in several processes of one machine, and go on with those left",
    "data": "show the data of a run as training will see it",
    "plan": "what a run will cost, before there are devices, weights or data",
    "evaluate": "score a model language by language, or compare two results",
    "generate": "let a model reply to prompts, many at a time",
    "compare": "compare two runs, exported models or results, with intervals",
    "analyze": "measure what training did: conflict, stationarity, neurons, interference",
    "study": "train a grid of runs and compare them, with confidence intervals",
    "convert": "convert models between formats, exactly; compare and describe them",
    "methods": "list the methods that resolve conflicts, the kinds of blocks, the loss weightings",
    "configs": "list the example configs, or copy them",
    "doctor": "show versions, devices, what is installed and what each part would need",
}


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names.

    Args:
      arguments: those after ``jaxmoo``; the process's own by default.

    Returns:
      The command's exit code; 2 where none is named, or one that there is not.
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"jaxmoo {__version__}")
        return 0
    if not name:
        print(_usage(), file=sys.stderr)
        return 2
    if name not in COMMANDS:
        raise ConfigError(
            f"there is no command {name!r}.{did_you_mean(name, COMMANDS)} There are "
            f"{', '.join(COMMANDS)}; `jaxmoo --help` says what they do."
        )
    return run(name, rest, prog=f"jaxmoo {name}")


@command()
def run(name: str, arguments: Sequence[str] | None = None, *, prog: str) -> int:
    """Run a command.

    Args:
      name: one of `COMMANDS`.
      arguments: its arguments; the process's own by default.
      prog: what its help calls it.

    Returns:
      Its exit code; 2 also where a package that it needs is not installed.
    """
    try:
        module = importlib.import_module(f"jaxmoo.commands.{name}")
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == "jaxmoo":
            raise
        raise ConfigError(
            f"{prog} needs the package {package}, which is not installed here. Install all that "
            "it needs with\n  pip install 'jaxmoo[train]'"
        ) from error
    return module.main(arguments, prog=prog)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: jaxmoo COMMAND ...",
            "",
            "Fine-tune one LLM on many languages without the languages hurting each other.",
            "",
            "commands:",
            *(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()),
            "",
            "`jaxmoo COMMAND --help` describes one; `jaxmoo --version` prints the version.",
        ]
    )
