"""``jaxmoo data``: show the data of a run as training will see it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxmoo.commands.command import add_settings, command
from jaxmoo.config import Config, load_config
from jaxmoo.errors import ConfigError, did_you_mean
from jaxmoo.files.outputs import check_writable, typed_path

if TYPE_CHECKING:
    from jaxmoo.data.load import RunData

__all__ = ["main"]


@command()
def main(arguments: Sequence[str] | None = None, prog: str = "jaxmoo data") -> int:
    """Run the command; return its exit code: see `command`."""
    options = _parser(prog).parse_intermixed_args(arguments)
    from jaxmoo.data.inspect import describe, epochs_table
    from jaxmoo.data.load import load_data, make_batches
    from jaxmoo.hf import load_config as load_model_config
    from jaxmoo.hf import resolve_source
    from jaxmoo.report.data_plot import lengths_and_shares
    from jaxmoo.runs.trained_parameters import check_model

    config = load_config(options.config, options.overrides)
    shown = _languages(config, options.languages)
    out = typed_path(options.out or f"{config.output.rstrip('/')}-data")
    check_writable(out, "--out")
    source = resolve_source(config.model.source)
    check_model(config, load_model_config(source))
    data = load_data(config, source)
    if config.data.streaming:
        corpus = dataclasses.replace(data.corpus, train=data.corpus.at_hand())
        batches = make_batches(config, corpus, data.batches.pad_id)
        data = dataclasses.replace(data, corpus=corpus, batches=batches)
        print(
            "data.streaming: how many examples there are is not known. Records above are those "
            "read to find the held-out examples; what follows counts each language's first "
            f"{config.data.shuffle_buffer:,} records as if they were all."
        )
    description = describe(data.corpus, data.batches, config.train.steps)
    print(f"\n{epochs_table(description)}")
    _show(data, shown, options.examples)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(description, indent=1, ensure_ascii=False)
    (out / "data.json").write_text(text + "\n", encoding="utf-8")
    lengths_and_shares(description, out / "data.png")
    print(f"\nWritten: {out / 'data.json'}, {out / 'data.png'}")
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Show the data of a run as training will see it: counts, token lengths, "
        "truncation, packing, epochs, and examples with what is learnt marked. No weights are "
        "read and nothing is trained.",
    )
    add_settings(parser, "run")
    parser.add_argument(
        "--out", help="directory for data.json and data.png (default: the run's output + '-data')"
    )
    parser.add_argument(
        "--languages", help="languages to show examples of, as en,fa (default: the first three)"
    )
    parser.add_argument("--examples", type=int, default=3, help="examples of each (3)")
    return parser


def _languages(config: Config, wanted: str | None) -> list[str]:
    known = [*config.data.seen, *config.data.unseen]
    if wanted is None:
        return known[:3]
    chosen = [code.strip() for code in wanted.split(",") if code.strip()]
    for code in chosen:
        if code not in known:
            raise ConfigError(
                f"--languages: {code!r} is not in the run; there are {', '.join(known)}."
                f"{did_you_mean(code, known)}"
            )
    return chosen


def _show(data: RunData, languages: Sequence[str], count: int) -> None:
    from jaxmoo.data.inspect import marked, sample

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    how = "\x1b[32mthis colour\x1b[0m" if colour else "\u27e6such brackets\u27e7"
    print(f"\nExamples; what is learnt is in {how}.")
    train = data.corpus.at_hand()
    for language in languages:
        examples = train.get(language) or data.corpus.held_out[language]
        for example in sample(examples, count):
            cut = f", cut from {example.length}" if example.truncated else ""
            learnt = int(example.loss_mask[1:].sum())
            print(f"\n--- {language}: {len(example.tokens)} tokens{cut}, {learnt} learnt")
            print(marked(example, data.tokenizer, colour=colour))
