"""``jaxmoo train``: fine-tune one language model on many languages."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jaxmoo.commands.command import add_settings, command
from jaxmoo.commands.processes import add_processes, together
from jaxmoo.config.training import help_text, load_config, to_yaml
from jaxmoo.train.run import train

__all__ = ["main"]


@command()
def main(arguments: Sequence[str] | None = None, prog: str = "jaxmoo train") -> int:
    """Run the command; return its exit code: see `command`."""
    # Settings may stand between flags.
    options = _parser(prog).parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    if options.print_config:
        print(to_yaml(config), end="")
        return 0
    return together(options, lambda: train(config))


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Fine-tune one language model on many languages, conflicts between them "
        "resolved per block. The same command resumes an interrupted run.",
        epilog="settings:\n" + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings(parser, "run")
    parser.add_argument("--print-config", action="store_true", help="print the settings and stop")
    add_processes(parser)
    return parser
