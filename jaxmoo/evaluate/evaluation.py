"""An evaluation from its settings to its results."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo import mesh
from jaxmoo.config import DataConfig, is_date
from jaxmoo.config import load_config as load_run_config
from jaxmoo.convert.kinds import source_of, tokenizer_of
from jaxmoo.data import Example, load_examples
from jaxmoo.data.division import divide
from jaxmoo.data.inspect import notes
from jaxmoo.data.tokenization.tokenizer import NO_ENDING, chat_tokenizer, ending_token
from jaxmoo.errors import ConfigError, DataError
from jaxmoo.evaluate.evaluator import Evaluator
from jaxmoo.evaluate.generated import check_sacrebleu, stop_tokens
from jaxmoo.evaluate.measures import summary_table
from jaxmoo.evaluate.opened import open_on
from jaxmoo.evaluate.questions import (
    COLUMN,
    Questions,
    check_references,
    choose_some,
    digest,
    prepare_questions,
    with_choices,
)
from jaxmoo.evaluate.results import LanguageResult, ResultStore
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf import check_tokenizer, load_config
from jaxmoo.hf.directory import first_process
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.runs.fingerprint import fingerprint
from jaxmoo.runtime.processes import check_same, from_first, is_first, said_by_first
from jaxmoo.runtime.watching import watched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Evaluation", "ask", "evaluate"]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What decides an evaluation.

    Attributes:
      name: what the model is called in the results.
      model: directory of any kind that `jaxmoo.convert.models.open_model` opens.
      output: the results' file, ``*.json``.
      data: where examples come from.
      seen: languages that the model was trained on.
      unseen: the others.
      held_out: evaluate only what a run with these data settings holds out, not all examples.
      step: which of a run's checkpoints; None for the newest.
      base: the model that a run began with, if it has moved.
      choices: what a reply is chosen from, as `jaxmoo.evaluate.questions.with_choices` takes it;
        None to skip it.
      new_tokens: the most tokens of a generated reply; 0 generates none.
      max_examples: the most examples per language; None for all.
      max_length: the most tokens of a sequence; None for the longest the model takes.
      batch_size: sequences at a time.
      dtype: dtype of the computation.
      skip_empty: leave out examples without a reply, or with one that begins too late.
      mesh: sizes of axes of the mesh of devices, ``data``, ``fsdp`` and ``tensor``; see
        :func:`jaxmoo.mesh.make_mesh`. By default parameters are spread over all devices.
    """

    name: str
    model: Path
    output: Path
    data: DataConfig
    seen: list[str]
    unseen: list[str]
    held_out: bool = False
    step: int | None = None
    base: str | None = None
    choices: str | None = None
    new_tokens: int = 0
    max_examples: int | None = None
    max_length: int | None = None
    batch_size: int = 16
    dtype: str = "float32"
    skip_empty: bool = False
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_run(cls, run: str | Path, **changes: Any) -> Evaluation:
        """Ask what a training run asks of itself: the replies that it holds out.

        Args:
          run: its directory.
          **changes: other values of the attributes. By default the results are written to
            ``held_out.json`` in that directory.

        Raises:
          ConfigError: there is no run, or a value is out of range.
        """
        directory = RunDirectory(typed_path(run))
        found: dict[str, Any] = {
            "name": str(run),
            "model": directory.path,
            "output": directory.path / "held_out.json",
        }
        return cls.held_out_by(load_run_config(directory.config).data, **found | changes)

    @classmethod
    def held_out_by(cls, data: DataConfig, /, **others: Any) -> Evaluation:
        """Ask what a training run with these settings of data asks of itself.

        Args:
          data: the settings.
          **others: values of the other attributes, or other ones than the run's.

        Raises:
          ConfigError: a value is out of range.
        """
        found: dict[str, Any] = {
            "data": data,
            "seen": data.seen,
            "unseen": data.unseen,
            "held_out": True,
            "max_examples": data.max_held_out,
            "max_length": data.sequence_length,
            "skip_empty": True,
        }
        return cls(**found | others)

    def __post_init__(self) -> None:
        languages = [*self.seen, *self.unseen]
        if not languages:
            raise ConfigError("Name the languages to evaluate: --languages en fr.")
        twice = sorted({code for code in languages if languages.count(code) > 1})
        if twice:
            raise ConfigError(f"Languages named more than once: {', '.join(twice)}.")
        for name in ("max_examples", "max_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} takes a positive number, found {value}.")
        if self.data.date is not None and not is_date(self.data.date):
            raise ConfigError(f"--date takes a date such as 2026-07-26, found {self.data.date!r}.")
        if self.new_tokens < 0:
            raise ConfigError(f"--generate takes a number of tokens, found {self.new_tokens}.")


def evaluate(settings: Evaluation, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Score a model on every language, and write the results.

    Everything that can be wrong with data and settings is found before weights are read. Languages
    that are stored from an earlier, interrupted evaluation with the same settings are not repeated.

    In several processes (see :mod:`jaxmoo.runtime.processes`) all of them call this. They must see
    the same model and data; the first one alone reads and writes results.

    Args:
      settings: what to evaluate.
      say: called with lines for a person to read, in the first process.

    Returns:
      What is written to ``settings.output``; nothing in other processes than the first.

    Raises:
      JaxmooError: anything that would make the evaluation fail or be wrong.
    """
    say = said_by_first(say)
    if settings.new_tokens:
        check_sacrebleu()
    store = ResultStore(settings.output, check=is_first())
    source = source_of(settings.model, base=settings.base)
    architecture = load_config(source)
    # An evaluation that goes on another day goes on with its date.
    begun = settings.data.date or _from_first_date(store)
    data = dataclasses.replace(settings.data, date=begun)
    tokenizer, date = chat_tokenizer(tokenizer_of(settings.model, source), data)
    check_tokenizer(tokenizer, architecture.vocab_size, settings.model)
    questions = ask(settings, tokenizer, architecture.max_position_embeddings)
    for note in notes({code: asked.replies for code, asked in questions.items()}, "--max-length"):
        say(f"Note: {note}")
    if settings.new_tokens and ending_token(tokenizer) is None:
        say(NO_ENDING)

    device_mesh = mesh.make_mesh(1, **dict[str, Any](settings.mesh))
    opened, decoder = open_on(
        device_mesh,
        settings.model,
        step=settings.step,
        base=settings.base,
        dtype=settings.dtype,
        say=say,
    )
    weights = fingerprint(opened.model, NamedSharding(device_mesh, P()))
    identities = {
        language: {
            "weights": weights,
            "data": digest(asked.examples),
            "input": asked.fingerprint(),
            "new_tokens": settings.new_tokens,
            "dtype": settings.dtype,
            **({"date": date} if date else {}),
        }
        for language, asked in questions.items()
    }
    check_same(
        data=json.dumps(identities),
        settings=repr(dataclasses.replace(settings, output=Path())),
        versions=str(_versions()),
    )
    done = _done(store, identities)
    missing = _missing(questions, done)
    if len(missing) < len(questions):
        say(f"Already evaluated: {', '.join(code for code in questions if code not in missing)}.")
    parameters = nnx.state(opened.model)
    pad_id: Any = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    evaluator = Evaluator(
        decoder,
        device_mesh,
        batch_size=settings.batch_size,
        pad_id=pad_id,
        tokenizer=tokenizer,
        stop=stop_tokens(source, tokenizer),
        new_tokens=settings.new_tokens,
    )
    total = sum(asked.rows for asked in missing.values())
    with watched(total, "evaluating", unit="row", shown=bool(missing) and is_first()) as advance:
        for code, asked in missing.items():
            found = evaluator.answer(parameters, asked, advance)
            done[code] = found
            keep = functools.partial(store.store, code, identities[code], found)
            first_process(keep, "write the results")

    results = first_process(
        lambda: store.finish(
            done,
            settings.seen,
            settings.unseen,
            model=settings.name + ("" if settings.step is None else f", step {settings.step}"),
            weights=weights,
            settings=_described(settings) | {"date": date},
            versions=_versions(),
        ),
        "write the results",
    )
    if results is None:
        return {}
    say(summary_table(results["languages"], settings.seen, settings.unseen))
    say(f"Wrote {store.output}; numbers of every example are in {store.directory}.")
    return results


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("jaxmoo", "jax", "flax", "transformers")}


def _from_first_date(store: ResultStore) -> str | None:
    """The date in what the first process has stored."""
    found = first_process(store.date, "read the results")
    day = from_first(datetime.date.fromisoformat(found).toordinal() if found else 0)
    return datetime.date.fromordinal(day).isoformat() if day else None


def _done(
    store: ResultStore, identities: Mapping[str, Mapping[str, Any]]
) -> dict[str, LanguageResult]:
    """What the first process has stored; nothing in the others."""

    def read() -> dict[str, LanguageResult]:
        found = {code: store.stored(code, identity) for code, identity in identities.items()}
        return {code: one for code, one in found.items() if one is not None}

    return first_process(read, "read the results") or {}


def _missing(
    questions: Mapping[str, Questions], done: Mapping[str, LanguageResult]
) -> dict[str, Questions]:
    """What the first process has not stored."""
    return {code: asked for code, asked in questions.items() if not from_first(code in done)}


def ask(
    settings: Evaluation, tokenizer: PreTrainedTokenizerFast, longest: int
) -> dict[str, Questions]:
    """Read, check and tokenise every language's examples.

    Args:
      settings: what to evaluate.
      tokenizer: the model's, with the chat template that is used.
      longest: the most tokens that the model reads.

    Returns:
      Per language its questions.

    Raises:
      JaxmooError: the data cannot be used as asked.
    """
    max_length = settings.max_length or min(longest, tokenizer.model_max_length)
    if max_length > longest:
        raise ConfigError(
            f"--max-length is {max_length}, but the model reads at most {longest} tokens."
        )
    examples = _examples(settings)
    if settings.choices is not None or settings.new_tokens:
        plain = [code for code, part in examples.items() if any(e.text is not None for e in part)]
        if plain:
            raise DataError(
                "--choices and --generate need prompts and replies, but the data of "
                f"{', '.join(plain)} is plain text, of which only the likelihood can be scored."
            )
        more = [code for code, part in examples.items() if any(e.says_more for e in part)]
        if more:
            raise DataError(
                "--choices and --generate compare texts, but some replies in the data of "
                f"{', '.join(more)} have more than text (tool_calls, reasoning_content, ...): only "
                "their likelihood can be scored."
            )
    if not settings.skip_empty:
        check_references(examples)
    if settings.choices is not None:
        examples = {
            code: part if not settings.skip_empty else [e for e in part if e.reply]
            for code, part in examples.items()
        }
        examples = with_choices(examples, settings.choices)
    return {
        code: prepare_questions(
            part,
            tokenizer,
            max_length=max_length,
            new_tokens=settings.new_tokens,
            drop_unusable=settings.skip_empty,
            max_malformed=settings.data.max_malformed,
            special_tokens=settings.data.special_tokens,
            asked=settings.data.lengths,
        )
        for code, part in examples.items()
    }


def _examples(settings: Evaluation) -> dict[str, list[Example]]:
    data, wanted = settings.data, [*settings.seen, *settings.unseen]
    choices = settings.choices or ""
    column = choices.removeprefix(COLUMN) if choices.startswith(COLUMN) else None
    # Everything is read, also of what a run streams.
    data = dataclasses.replace(data, streaming=False)
    if not settings.held_out:
        examples = load_examples(data, wanted, choices=column)
        return {code: choose_some(examples[code], settings.max_examples) for code in wanted}
    # What a run holds out of one language depends on what it learns in the others.
    languages = list(dict.fromkeys([*wanted, *data.seen]))
    limited = dataclasses.replace(data, max_held_out=settings.max_examples)
    divided = divide(limited, languages, [], choices=column)
    return {code: divided[code].held_out for code in wanted}


def _described(settings: Evaluation) -> dict[str, Any]:
    """The settings for a reader of the results, paths as they were given."""
    data = settings.data
    return {
        "data": data.named,
        "examples": "held out by the run's settings" if settings.held_out else "all",
        "choices": settings.choices,
        "new_tokens": settings.new_tokens,
        "max_examples": settings.max_examples,
        "max_length": settings.max_length,
        "dtype": settings.dtype,
    }
