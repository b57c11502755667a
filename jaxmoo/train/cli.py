"""The command line of ``scripts/train.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jaxmoo.errors import JaxmooError
from jaxmoo.train.config import help_text, load_config, to_yaml
from jaxmoo.train.run import InterruptedRunError, train

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 2 bad input, 1 failed, 128 + N on signal N."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Fine-tune one language model on many languages, conflicts between them "
        "resolved per block. The same command resumes an interrupted run.",
        epilog="settings:\n" + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file with the run's settings")
    parser.add_argument("--print-config", action="store_true", help="print the settings and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="other settings")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        if options.print_config:
            print(to_yaml(config), end="")
            return 0
        train(config)
    except InterruptedRunError as error:
        print(error, file=sys.stderr)
        return 128 + error.signal
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except JaxmooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
