"""``jaxmoo analyze``: measure a training run beside the model it began with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jaxmoo.analysis.request import MEASURES, Request
from jaxmoo.commands.command import command, pairs
from jaxmoo.commands.processes import add_mesh, add_processes, mesh_axes, together
from jaxmoo.files.outputs import typed_path

__all__ = ["main"]


@command()
def main(arguments: Sequence[str] | None = None, prog: str = "jaxmoo analyze") -> int:
    """Run the command; return its exit code: see `command`."""
    options = _parser(prog).parse_args(arguments)
    request = Request(
        run=options.run,
        output=options.output,
        measures=None if options.what is None else tuple(options.what),
        steps=None if options.steps is None else tuple(options.steps),
        base=options.base,
        parallel=options.parallel,
        codes=pairs("--codes", options.codes) or {},
        languages=None if options.languages is None else tuple(options.languages),
        sentences=options.sentences,
        examples=options.examples,
        blocks=options.blocks,
        singles=tuple(options.single),
        samples=options.samples,
        seed=options.seed,
        mesh=mesh_axes(options),
    )
    from jaxmoo.analysis.analyze import analyze

    return together(options, lambda: analyze(request))


def _parser(prog: str) -> argparse.ArgumentParser:
    default = Request(Path())
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Analyse a training run beside the model it began with: conflict between "
        "languages, stationarity, language-specific neurons, separability, negative interference.",
    )
    parser.add_argument("run", type=typed_path, help="directory of a training run")
    parser.add_argument("--output", type=typed_path, help="directory of the report (RUN/analysis)")
    parser.add_argument(
        "--what", nargs="+", metavar="MEASURE",
        help=f"measures: {', '.join(MEASURES)} (all for which there is what they need)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", nargs="*", type=int, metavar="N",
        help="checkpoints to measure beside the base model (all that there are)",
    )  # fmt: skip
    parser.add_argument("--base", help="model that the run began with, if it has moved")
    group = parser.add_argument_group("neurons and separability")
    group.add_argument(
        "--parallel", metavar="PATTERN",
        help="parallel text, one sentence per line, such as 'sentences/{language}.txt'",
    )  # fmt: skip
    group.add_argument(
        "--codes", nargs="+", metavar="CODE=NAME",
        help="names of languages in that path where they differ, such as en=eng",
    )  # fmt: skip
    group.add_argument(
        "--languages", nargs="+", metavar="CODE", help="languages to read (all of the run)"
    )
    group.add_argument(
        "--sentences", type=int, default=default.sentences, help="sentences to read (%(default)s)"
    )
    group.add_argument(
        "--samples", type=int, default=default.samples, help="bootstrap samples (%(default)s)"
    )
    group = parser.add_argument_group("stationarity")
    group.add_argument(
        "--examples", type=int, default=default.examples,
        help="training examples per language in each of two batches (%(default)s)",
    )  # fmt: skip
    group.add_argument("--blocks", default=default.blocks, help="blocks (%(default)s)")
    group = parser.add_argument_group("interference")
    group.add_argument(
        "--single", nargs="+", type=typed_path, default=[], metavar="RUN",
        help="runs on one language each, otherwise with this run's settings",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="of all random choices (%(default)s)"
    )
    add_mesh(parser, ("data", "language", "fsdp", "tensor"))
    add_processes(parser)
    return parser
