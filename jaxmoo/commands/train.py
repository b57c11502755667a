"""``jaxmoo train``: fine-tune one language model on many languages."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jaxmoo.commands.command import add_settings, command
from jaxmoo.commands.processes import add_processes, together
from jaxmoo.config.training import help_text, load_config, to_yaml

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
    from jaxmoo.train.run import train

    return together(options, lambda: train(config))


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
    add_processes(parser)
    return parser
