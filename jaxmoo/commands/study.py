"""``jaxmoo study``: train a grid of runs and compare them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from jaxmoo.commands.command import add_settings, command
from jaxmoo.config.study_config import help_text, load_study
from jaxmoo.config.yaml_text import dump
from jaxmoo.errors import ConfigError, did_you_mean

__all__ = ["main"]

_EXAMPLES = """examples:
  jaxmoo study --config study/chatterbot --dry-run
  jaxmoo study --config study/chatterbot
  jaxmoo study --config study/sib200 training.data.source='sib200/train.{language}.jsonl' \\
    training.train.steps=300 seeds=[1,2,3,4,5]
  jaxmoo study --config study/sib200 output=docs/study/sib200 --report-only
"""


@command("Stopped. The same command goes on.")
def main(arguments: Sequence[str] | None = None, prog: str = "jaxmoo study") -> int:
    """Run the command.

    Returns:
      Its exit code: see `command`. Rows of finished runs are stored in any case.
    """
    options = _parser(prog).parse_intermixed_args(arguments)
    if options.max_runs is not None and options.max_runs < 1:
        raise ConfigError(f"--max-runs takes a positive number, found {options.max_runs}.")
    if options.jobs < 1:
        raise ConfigError(f"--jobs takes a positive number, found {options.jobs}.")
    if options.jobs > 1 and options.max_runs is not None:
        raise ConfigError("--max-runs is for one process: leave out --jobs.")
    study = load_study(options.config, options.overrides)
    for arm in options.arms or ():
        if arm not in study.arms:
            raise ConfigError(
                f"--arms names {arm!r}, which is not in arms.{did_you_mean(arm, study.arms)}"
            )
    if options.print_config:
        print(dump(dataclasses.asdict(study)), end="")
        return 0
    from jaxmoo.study.grid import make_cells
    from jaxmoo.study.jobs import run_side_by_side
    from jaxmoo.study.outcome import planned
    from jaxmoo.study.outlook import outlook
    from jaxmoo.study.report import write_power, write_report
    from jaxmoo.study.rows import RowStore, check_rows, rows_of
    from jaxmoo.study.runner import left_of, run_missing

    cells = make_cells(study)
    store = RowStore(study.output)
    rows = store.read()
    check_rows(cells, rows, store.path)
    if options.dry_run:
        print(outlook(planned(study, cells, rows_of(cells, rows)), rows))
        return 0
    if options.power:
        print(write_power(study, cells, store))
        return 0
    left = 0
    if not options.report_only:
        wanted = [cell for cell in cells if cell.key.arm in (options.arms or study.arms)]
        if options.jobs > 1:
            run_side_by_side(study, wanted, options.jobs)
        else:
            run_missing(study, wanted, max_runs=options.max_runs)
        left = left_of(study, wanted, store.read())
    needed = planned(study, cells, rows_of(cells, store.read()))
    print(write_report(study, needed, store))
    if left:
        print(f"\n{left} runs are still missing: the same command goes on with them.")
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train every arm of a study with every seed and learning rate, and compare "
        "them. The same command runs what is missing.",
        epilog=_EXAMPLES + "\nsettings:\n" + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings(parser, "study")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print what there is to do, and stop")
    what.add_argument(
        "--report-only",
        action="store_true",
        help="make tables, plots and page from the rows there are",
    )
    what.add_argument(
        "--power",
        action="store_true",
        help="print the noise of the rows there are, as of a pilot, and how small a difference "
        "more seeds or examples would find",
    )
    what.add_argument("--print-config", action="store_true", help="print the settings and stop")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", help="run only these (all); tables show all that ran"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="run N processes at once, each with some of the arms, on the same device (1)",
    )
    parser.add_argument("--max-runs", type=int, metavar="N", help="end after N runs (all)")
    return parser
