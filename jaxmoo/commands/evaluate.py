"""``jaxmoo evaluate``: score a model language by language, or compare two results."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmoo.commands.command import command, pairs
from jaxmoo.commands.compare import add_resampling, show
from jaxmoo.commands.processes import add_mesh, add_processes, mesh_axes, together
from jaxmoo.config import ColumnsConfig, DataConfig, load_config
from jaxmoo.errors import ConfigError
from jaxmoo.files.outputs import typed_path
from jaxmoo.runtime.memory import named_when_full

if TYPE_CHECKING:
    from jaxmoo.evaluate.evaluation import Evaluation

__all__ = ["main"]

_EXAMPLES = """examples:
  jaxmoo evaluate --model runs/quickstart --output tuned.json
  jaxmoo evaluate --model smollm2-135m-instruct --config quickstart --output base.json
  jaxmoo evaluate --compare base.json tuned.json
  jaxmoo evaluate --model path/to/model --data 'topics/{language}.jsonl' \\
    --languages en ja --unseen fr --columns prompt=text completion=topic group=id \\
    --choices replies --output topics.json
  jaxmoo evaluate --model path/to/model --data 'questions/{language}.jsonl' \\
    --languages en ja --generate 64 --output answers.json
"""


@command("Stopped. The same command goes on with the next language.")
def main(arguments: Sequence[str] | None = None, prog: str = "jaxmoo evaluate") -> int:
    """Run the command; return its exit code: see `command`. What was done is stored."""
    options = _parser(prog).parse_args(arguments)
    if options.compare is not None:
        with named_when_full("Use a smaller --batch-size, or more devices."):
            a, b = options.compare
            return show(a, b, options)
    return together(options, lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> None:
    from jaxmoo.evaluate.evaluation import evaluate

    with named_when_full("Use a smaller --batch-size or --max-length, or more devices."):
        evaluate(_settings(options))


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Score a model language by language, or compare two such results. The same "
        "command resumes an interrupted evaluation.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("what is evaluated")
    group.add_argument(
        "--model",
        help="Hugging Face directory, adapters (PEFT), checkpoint, training run, built-in name, or "
        "id on a hub",
    )
    group.add_argument("--step", type=int, help="which of a run's checkpoints (the newest)")
    group.add_argument("--base", help="model that the run or adapters began with, if moved")
    group.add_argument("--output", type=typed_path, help="file for the results, .json")

    group = parser.add_argument_group(
        "examples",
        "By default those that a run holds out: of --config, else of the run that --model names. "
        "With --data every example of that source, which --config or the options below describe; a "
        "run that --model names then gives its languages and how it is prompted, no more.",
    )
    group.add_argument("--config", help="settings of a training run, for its data")
    group.add_argument("--data", help="source of examples, in any form that data.source takes")
    group.add_argument("--languages", nargs="+", metavar="CODE", help="languages trained on")
    group.add_argument("--unseen", nargs="+", metavar="CODE", help="other languages")
    group.add_argument(
        "--columns",
        nargs="+",
        metavar="KEY=NAME",
        help="columns of the data, as data.columns: prompt=question completion=answer group=id",
    )
    group.add_argument("--codes", nargs="+", metavar="CODE=NAME", help="as data.codes")
    group.add_argument("--language-column", metavar="NAME", help="as data.language_column")
    group.add_argument("--subset", help="as data.subset")
    group.add_argument("--split", help="as data.split")
    group.add_argument(
        "--date",
        metavar="YYYY-MM-DD",
        help="for chat templates that read the clock (as data.date of the config, else today)",
    )
    group.add_argument("--max-examples", type=int, metavar="N", help="at most N per language (all)")
    group.add_argument(
        "--skip-empty",
        action="store_true",
        help="leave out examples whose reply is empty, or begins beyond --max-length",
    )

    group = parser.add_argument_group(
        "measures", "NLL and bits per byte of the replies are always computed."
    )
    group.add_argument(
        "--choices",
        metavar="WHAT",
        help="also the accuracy of choosing the reply: from all replies of the data (replies), "
        "from a column's list (column:NAME), or from labels (a,b,c)",
    )
    group.add_argument(
        "--generate",
        type=int,
        default=0,
        metavar="N",
        help="also generate at most N tokens for each prompt, and score them",
    )

    group = parser.add_argument_group("computation")
    group.add_argument("--batch-size", type=int, default=16, help="sequences at a time (16)")
    group.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="most tokens of a sequence (data.sequence_length of the config, or of a run on its "
        "own examples; else the model's)",
    )
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_mesh(group, ("data", "fsdp", "tensor"))
    add_processes(parser)

    group = parser.add_argument_group("comparing")
    group.add_argument(
        "--compare",
        nargs=2,
        type=typed_path,
        metavar=("A", "B"),
        help="compare two results of the same examples, runs or exported models, as `jaxmoo "
        "compare` does; --output also writes the numbers",
    )
    add_resampling(group)
    return parser


def _settings(options: argparse.Namespace) -> Evaluation:
    if options.model is None or options.output is None:
        raise ConfigError("Give --model and --output, or --compare A B.")
    from jaxmoo.evaluate.evaluation import Evaluation
    from jaxmoo.evaluate.results import ResultStore
    from jaxmoo.hf.directory import first_process
    from jaxmoo.hf.source import model_directory

    # Raises before anything is fetched.
    first_process(lambda: ResultStore(options.output), "write the results")
    model = model_directory(options.model)
    config, run = _config(options, model)
    held_out = options.data is None
    if config is None and (options.data is None or options.languages is None):
        raise ConfigError(
            f"{options.model} is not a training run: say what to evaluate it on with --data and "
            "--languages, or with --config, the settings of a run."
        )
    data = _data(options, config)
    if options.languages is None and options.unseen is None:
        seen, unseen = data.seen, data.unseen
    else:
        seen, unseen = options.languages or [], options.unseen or []
    limit, length = options.max_examples, options.max_length
    if limit is None and held_out:
        limit = data.max_held_out
    if length is None and config is not None and not run:
        length = data.sequence_length
    return Evaluation(
        name=options.model,
        model=model,
        output=options.output,
        data=data,
        seen=seen,
        unseen=unseen,
        held_out=held_out,
        step=options.step,
        base=options.base,
        choices=options.choices,
        new_tokens=options.generate,
        max_examples=limit,
        max_length=length,
        batch_size=options.batch_size,
        dtype=options.dtype,
        mesh=mesh_axes(options),
        # A run leaves such examples out, and its own scores are without them.
        skip_empty=options.skip_empty or held_out,
    )


def _config(options: argparse.Namespace, model: Path) -> tuple[DataConfig | None, bool]:
    """Settings of data, and whether other data than a run's own is evaluated by its settings."""
    if options.config is not None:
        return load_config(options.config).data, False
    from jaxmoo.convert.kinds import kind_of
    from jaxmoo.runs.directory import RunDirectory

    if kind_of(model) != "run":
        return None, False
    data = load_config(RunDirectory(model).config).data
    if options.data is None:
        return data, False
    # The run says how its model is prompted, and nothing about data that is not its own, so that
    # the same command evaluates a model before and after it was trained.
    own = DataConfig(
        source=options.data,
        seen=data.seen,
        unseen=data.unseen,
        chat_template=data.chat_template,
        date=data.date,
        special_tokens=data.special_tokens,
    )
    return own, True


def _data(options: argparse.Namespace, config: DataConfig | None) -> DataConfig:
    if config is None:
        config = DataConfig(source=options.data, seen=options.languages)
    changes = {
        "source": options.data,
        "sources": None if options.data is None else [],
        "options": None if options.data is None else {},
        "codes": pairs("--codes", options.codes),
        "language_column": options.language_column,
        "subset": options.subset,
        "split": options.split,
        "date": options.date,
    }
    columns = pairs("--columns", options.columns)
    if columns is not None:
        known = [field.name for field in dataclasses.fields(ColumnsConfig)]
        for key in columns:
            if key not in known:
                raise ConfigError(f"--columns takes {', '.join(known)}, found {key!r}.")
        changes["columns"] = ColumnsConfig(**columns)
        config = dataclasses.replace(config, prompt=None, completion=None)
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(config, **given)
