"""A whole analysis: a training run, its base model and their checkpoints become a report."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmoo import mesh
from jaxmoo.analysis.gradient_sections import (
    conflict_section,
    interference_section,
    stationarity_section,
)
from jaxmoo.analysis.interference import interference
from jaxmoo.analysis.parallel import Sentence, read_parallel, tokenize_parallel
from jaxmoo.analysis.representation_sections import neurons_section, separability_section
from jaxmoo.analysis.representations import Representations, represent
from jaxmoo.analysis.request import MEASURES, Request
from jaxmoo.analysis.section import Section
from jaxmoo.analysis.stationarity import PairedGrams, check_examples, measure_grams, paired_batch
from jaxmoo.config.training import Config, load_config
from jaxmoo.convert.models import open_model
from jaxmoo.data.load import load_data
from jaxmoo.errors import ConfigError, did_you_mean
from jaxmoo.files.atomic import replace_text
from jaxmoo.files.outputs import check_writable, typed_path
from jaxmoo.hf import load_config as load_model_config
from jaxmoo.hf import load_tokenizer, resolve_source
from jaxmoo.hf.directory import first_process
from jaxmoo.models import Decoder
from jaxmoo.models.paths import STACKED
from jaxmoo.models.probe import neurons_per_layer
from jaxmoo.report.page import page, table
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.runs.gram_log import GramLog, read_grams
from jaxmoo.runs.provenance import versions
from jaxmoo.runs.trained_parameters import begun_model, load_base
from jaxmoo.runtime.processes import check_same, is_first, said_by_first

__all__ = ["MEASURES", "Request", "analyze"]

_OF_TEXT = ("neurons", "separability")
BASE = "base"


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """All that was read and checked before the first model is loaded."""

    config: Config
    source: Path | None  # None where no model is measured
    measures: tuple[str, ...]
    left_out: Mapping[str, str]
    steps: tuple[int, ...]
    log: GramLog | None
    batch: Mapping[str, np.ndarray] | None
    sentences: Mapping[str, Sequence[Sentence]] | None


def analyze(request: Request, say: Callable[[str], None] = print) -> Path:
    """Measure, draw and write.

    Into the output directory go ``index.html``, which is one file with everything in it,
    ``analysis.json`` with all numbers, and the figures as PNG files.

    In several processes (see :mod:`jaxmoo.runtime.processes`) all of them call this, to run the
    models. They must see the same run, model and data; the first one alone writes.

    Args:
      request: what to analyse.
      say: called with lines for a person to read, in the first process.

    Returns:
      The page.

    Raises:
      ConfigError, DataError, CheckpointError, DownloadError: before any model is run.
    """
    say = said_by_first(say)
    directory = request.output or typed_path(request.run) / "analysis"
    first_process(lambda: check_writable(directory, "--output"), _WRITE)
    inputs = _check(request, say)
    check_same(
        settings=repr(dataclasses.replace(request, output=None)),
        run=json.dumps([inputs.measures, inputs.steps]),
        versions=str(versions()),
    )
    measured = _measure(request, inputs, say)

    def write() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        sections = [*_sections(request, inputs, measured, directory)]
        settings = _settings(request, inputs)
        numbers = {"settings": settings} | {s.name: s.numbers for s in sections}
        text = json.dumps(_plain(numbers), indent=1, allow_nan=False)
        replace_text(directory / "analysis.json", text + "\n")
        replace_text(index, _page(request, inputs, sections, settings) + "\n")

    index = directory / "index.html"
    first_process(write, _WRITE)
    say(f"Analysis: {index}")
    return index


_WRITE = "write the analysis"


def _check(request: Request, say: Callable[[str], None]) -> _Inputs:
    run = RunDirectory(request.run)
    if not run.config.is_file():
        raise ConfigError(f"{run.path} is not the output of a training run: it has no config.yaml.")
    for name in ("sentences", "examples", "samples"):
        if getattr(request, name) < 1:
            raise ConfigError(f"{name} must be at least 1, found {getattr(request, name)}.")
    config = load_config(run.config)
    measures, left_out = _choose(request, run, config)
    log = read_grams(run.grams) if "conflict" in measures else None
    if "interference" in measures:
        interference(run.path, request.singles)
    steps: tuple[int, ...] = ()
    source = batch = sentences = None
    if any(m in measures for m in ("stationarity", *_OF_TEXT)):
        steps = _check_steps(run, request.steps)
        source = resolve_source(request.base or config.model.source)
        if any(m in measures for m in _OF_TEXT):
            sentences = _sentences(request, config, source)
        if "stationarity" in measures:
            data = load_data(config, source, lambda _: None)
            batch = paired_batch(
                data.corpus.at_hand(),
                config.data.seen,
                request.examples,
                seed=request.seed,
                pad_id=data.batches.pad_id,
            )
    say(f"Measuring {', '.join(measures)} of {run.path}.")
    return _Inputs(config, source, measures, left_out, steps, log, batch, sentences)


def _choose(
    request: Request, run: RunDirectory, config: Config
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The measures to take, and why the others are not."""
    lacking = {}
    if not any(run.grams.glob("*.npz")):
        lacking["conflict"] = (
            "the run recorded no inner products of gradients; train with train.gram_every=10, say"
        )
    if len(config.data.seen) < 2:
        for name in ("conflict", "stationarity"):
            lacking[name] = "the run has one language, which conflicts with nothing"
    if not run.steps():
        lacking["stationarity"] = (
            "the run has no complete checkpoint; it saves them every train.checkpoint_every steps "
            "and at its end, and keeps the last train.keep_checkpoints"
        )
    if request.parallel is None:
        lacking |= dict.fromkeys(_OF_TEXT, "needs parallel sentences: --parallel")
    elif not run.steps():
        lacking |= dict.fromkeys(_OF_TEXT, lacking["stationarity"])
    elif not neurons_per_layer(
        load_model_config(resolve_source(request.base or config.model.source))
    ):
        lacking["neurons"] = "of the model's layers some have experts, and others one MLP"
    if not request.singles:
        lacking["interference"] = (
            "needs runs on single languages with the settings of this one (data.seen=[xx]): "
            "--single"
        )
    for name in request.measures or ():
        if name not in MEASURES:
            raise ConfigError(
                f"unknown measure {name!r}.{did_you_mean(name, MEASURES)} There are "
                f"{', '.join(MEASURES)}."
            )
        if name in lacking:
            raise ConfigError(f"{name} cannot be measured: {lacking[name]}.")
    measures = request.measures or tuple(m for m in MEASURES if m not in lacking)
    if not measures:
        reasons = "\n  ".join(f"{name}: {why}" for name, why in lacking.items())
        raise ConfigError(f"nothing of {run.path} can be measured:\n  {reasons}")
    return measures, {m: lacking[m] for m in MEASURES if m not in measures and m in lacking}


def _check_steps(run: RunDirectory, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    there = run.steps()
    missing = [step for step in wanted or () if step not in there]
    if missing:
        raise ConfigError(
            f"{run.path} has no checkpoint of step {', '.join(map(str, missing))}. It has "
            f"{', '.join(map(str, there))}; train.checkpoint_every and train.keep_checkpoints "
            "decide which are kept."
        )
    return tuple(there if wanted is None else sorted(set(wanted)))


def _sentences(request: Request, config: Config, source: Path) -> dict[str, list[Sentence]]:
    languages = request.languages or (*config.data.seen, *config.data.unseen)
    texts = read_parallel(
        request.parallel or "", languages, codes=request.codes, limit=request.sentences
    )
    architecture = load_model_config(source)
    return tokenize_parallel(
        texts,
        load_tokenizer(source),
        vocab_size=architecture.vocab_size,
        max_length=architecture.max_position_embeddings,
    )


class _Measured(NamedTuple):
    """What was found in every model."""

    grams: dict[str, PairedGrams]
    representations: dict[str, Representations]


def _measure(request: Request, inputs: _Inputs, say: Callable[[str], None]) -> _Measured:
    """Run every model on the batches and sentences."""
    found = _Measured({}, {})
    if inputs.batch is None and inputs.sentences is None:
        return found
    device_mesh = mesh.make_mesh(2 * len(inputs.config.data.seen), **dict[str, Any](request.mesh))
    if inputs.batch is not None:
        check_examples(request.examples, device_mesh)
    for name, model in _models(request, inputs, device_mesh):
        if inputs.batch is not None:
            say(f"Gradients of {name} ...")
            found.grams[name] = measure_grams(
                model, inputs.config, inputs.batch, blocks=request.blocks, device_mesh=device_mesh
            )
        if inputs.sentences is not None:
            say(f"Sentences in {name} ...")
            found.representations[name] = represent(
                model, inputs.sentences, device_mesh=device_mesh, progress=is_first()
            )
        del model
    return found


def _models(request: Request, inputs: _Inputs, device_mesh: Mesh) -> Iterator[tuple[str, Decoder]]:
    """The base model and the checkpoints, one at a time."""
    config, source = inputs.config, inputs.source
    assert source is not None

    def shardings(state: nnx.State) -> Any:
        return mesh.parameter_shardings(device_mesh, state, stacked=STACKED)

    dtype = jax.numpy.dtype(config.model.param_dtype)
    base = load_base(config, source, shardings=shardings, param_dtype=dtype)
    yield BASE, begun_model(config, base, shardings)
    for step in inputs.steps:
        opened = open_model(
            request.run,
            step=step,
            base=request.base,
            shardings=shardings,
            merge=False,
            say=lambda _: None,
        )
        yield f"step {step}", opened.model


def _sections(
    request: Request, inputs: _Inputs, measured: _Measured, directory: Path
) -> Iterator[Section]:
    config, measures = inputs.config, inputs.measures
    if inputs.log is not None:
        yield conflict_section(inputs.log, config.data.batch_size, directory)
    if measured.grams:
        yield stationarity_section(measured.grams, config.data.seen, request.examples, directory)
    languages = list(inputs.sentences or ())
    if "neurons" in measures:
        unseen = [code for code in languages if code not in config.data.seen]
        yield neurons_section(measured.representations, languages, unseen, directory)
    if "separability" in measures:
        yield separability_section(
            measured.representations,
            languages,
            directory,
            samples=request.samples,
            seed=request.seed,
        )
    if "interference" in measures:
        yield interference_section(interference(request.run, request.singles), directory)


def _settings(request: Request, inputs: _Inputs) -> dict[str, Any]:
    config, resolve = inputs.config, inputs.config.resolve
    settings: dict[str, Any] = {
        "run": typed_path(request.run).name,
        "model": typed_path(config.model.source).name,
        "trained": config.model.trainable
        if config.lora.rank is None
        else f"adapters of rank {config.lora.rank} on {config.model.trainable}",
        "method": f"{resolve.aggregator} over {resolve.blocks} blocks",
        "languages trained on": list(config.data.seen),
        "languages not trained on": list(config.data.unseen),
        "training steps": config.train.steps,
        "examples per language and step": config.data.batch_size,
        "learning rate": config.optimizer.learning_rate,
        "seed of training": config.seed,
        "measures": list(inputs.measures),
    }
    if inputs.steps:
        settings["models"] = [BASE, *(f"step {step}" for step in inputs.steps)]
    if inputs.batch is not None:
        settings["stationarity: examples per language and batch"] = request.examples
        settings["stationarity: blocks"] = request.blocks
    if inputs.sentences is not None:
        settings["sentences"] = len(next(iter(inputs.sentences.values())))
        settings["languages of the sentences"] = list(inputs.sentences)
    settings["seed of the analysis"] = request.seed
    settings["versions"] = versions()
    return settings


_INTRODUCTION = """<p>What a multilingual fine-tuning run did to the languages' gradients and to the
model's representations, beside the model it began with. Every measure is explained where it
stands, with its limits; all numbers are also in <code>analysis.json</code>.</p>"""


def _page(
    request: Request, inputs: _Inputs, sections: Sequence[Section], settings: Mapping[str, Any]
) -> str:
    links = "".join(f'<a href="#{s.name}">{s.heading}</a>' for s in sections)
    body = [_INTRODUCTION, f"<nav>{links}</nav>", *(s.html() for s in sections)]
    if inputs.left_out:
        items = "".join(
            f"<li>{name}: {html.escape(why)}</li>" for name, why in inputs.left_out.items()
        )
        body.append(f"<h2>Not measured</h2><ul>{items}</ul>")
    rows = [[name, _shown(value)] for name, value in settings.items()]
    body.append('<h2 id="settings">Settings</h2>' + table([], rows, "settings"))
    return page(f"Analysis of {typed_path(request.run).name}", "\n".join(body))


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _plain(value: Any) -> Any:
    """What JSON holds; numbers to six digits, null where they are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
