"""``jaxmoo configs``: list the example configs, or copy them to where they can be changed."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from jaxmoo.commands.command import command
from jaxmoo.files.bundled import bundled, config_names, copy_bundled
from jaxmoo.files.outputs import typed_path

__all__ = ["main"]


@command()
def main(arguments: Sequence[str] | None = None, prog: str = "jaxmoo configs") -> int:
    """Run the command; return its exit code: see `command`."""
    options = _parser(prog).parse_args(arguments)
    if options.copy is not None:
        written = copy_bundled(options.copy)
        print(f"Written: {len(written)} files in {options.copy / 'configs'} and launch.")
        return 0
    width = max(map(len, config_names())) + 2
    for name in config_names():
        about = _about(bundled("configs") / f"{name}.yaml")
        print(textwrap.fill(name.ljust(width) + about, 100, subsequent_indent=" " * width))
    print("\nUse one as --config NAME, or copy all of them to change them: jaxmoo configs --copy")
    return 0


def _about(config: Path) -> str:
    """The first sentence of the comment that a config begins with."""
    lines = []
    for line in config.read_text("utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line[2:])
    return " ".join(lines).partition(". ")[0].rstrip(".")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="List the example configs that come with the package, or copy them, their chat "
        "templates and the scripts that launch several processes. Nothing is overwritten.",
    )
    parser.add_argument(
        "--copy",
        nargs="?",
        const=Path(),
        type=typed_path,
        metavar="DIR",
        help="copy them into DIR/configs and DIR/launch (DIR: this directory)",
    )
    return parser
