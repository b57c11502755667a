"""A whole fine-tuning run: from its settings to weights, metrics, a table and a report."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxmoo.config import Config, dated, to_yaml, validate
from jaxmoo.config.interval import parse_interval
from jaxmoo.evaluate import LanguageScore, before_after_table, summarise
from jaxmoo.hf.directory import first_process
from jaxmoo.hf.push import prepare_push, push
from jaxmoo.models.quantization import count_parameters
from jaxmoo.platforms import platform_of
from jaxmoo.report import check_drawing, write_report
from jaxmoo.runs.bucket_checkpoints import open_checkpoints
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.runs.provenance import versions
from jaxmoo.runtime.compiled import kept_programs
from jaxmoo.runtime.hang import HangTimeout
from jaxmoo.runtime.memory import named_when_full
from jaxmoo.runtime.notices import check_stop_file, watch_for_notices
from jaxmoo.runtime.processes import barrier, check_same, is_first, said_by_first
from jaxmoo.runtime.saving import SaveRequest
from jaxmoo.runtime.signals import InterruptedRunError, StopRequest
from jaxmoo.sizes import format_size
from jaxmoo.train.condition import examine, largest
from jaxmoo.train.evaluation import evaluate
from jaxmoo.train.export import check_exports, export, exports
from jaxmoo.train.facts import facts
from jaxmoo.train.job import Job
from jaxmoo.train.kept import Kept
from jaxmoo.train.loop import Loop
from jaxmoo.train.metrics import read_metrics
from jaxmoo.train.replies import Replies, SampleReplies, side_by_side
from jaxmoo.train.reporter import NonFiniteLossError
from jaxmoo.train.resume import batch_digest, resume
from jaxmoo.train.setup import Setup, prepare, step_spec
from jaxmoo.train.trackers import check_packages, trackers_of

__all__ = ["InterruptedRunError", "NonFiniteLossError", "train"]


# At once, so that a log file holds it when the process is killed.
_say = functools.partial(print, flush=True)


def train(
    config: Config,
    say: Callable[[str], None] = _say,
    *,
    kept: Kept | None = None,
    measure: Callable[[Setup, Any], None] | None = None,
) -> dict[str, Any]:
    """Run, or resume, the fine-tuning that the settings describe.

    Everything is written below ``config.output``; see
    :class:`~jaxmoo.runs.directory.RunDirectory`. A run that is already complete only prints its
    table again. In several processes (see :mod:`jaxmoo.runtime.processes`) all of them call this.

    Args:
      config: the settings.
      say: called with lines for a person to read, in the first process.
      kept: see :func:`~jaxmoo.train.setup.prepare`.
      measure: called at the end with what was set up and the trained parameters.

    Returns:
      The results that are also in ``results.json``: settings of the method, held-out scores
      before and after, their means and the worst language.

    Raises:
      ConfigError, DataError, CheckpointError, DownloadError: before any training.
      NonFiniteLossError: a loss is NaN or infinite; checkpoints stay as they are.
      UnsavedError: a checkpoint cannot be written; those before it stay as they are.
      PushError: all is done but uploading the model; the same command tries it again.
      MemoryFullError: memory has run out; checkpoints stay as they are.
      InterruptedRunError: on SIGINT or SIGTERM, once everything is saved.
    """
    validate(config)
    say = said_by_first(say)
    directory = RunDirectory(config.output)
    check_stop_file(config.train.stop_file)
    # The first process's clock decides for all.
    seconds = parse_interval(config.train.checkpoint_every).seconds if is_first() else None
    saves = SaveRequest(seconds)
    with (
        named_when_full(_LESS_MEMORY),
        StopRequest() as stop,
        watch_for_notices(config.train.stop_file, stop=stop.ask, save=saves.ask),
    ):
        with stop.at_once():
            config = directory.resumed(config)
            directory.check(config)
            check_exports(config, directory)
            check_packages(trackers_of(config))
            if config.report:
                check_drawing()
            # Before the first thing that they do together: others would wait there for ever.
            check_same(
                settings=to_yaml(dataclasses.replace(config, output="")), versions=str(versions())
            )
            repository = _repository(config)
            setup = prepare(config, say, kept=kept)
            config = dated(config, setup.date)
            say(_plan(config, setup))
        with (
            HangTimeout(config.train.hang_timeout) as hang,
            directory.claim(config),
            kept_programs(directory.compiled, platform_of(setup.device_mesh.devices.flat)),
        ):
            check_same(date=str(config.data.date), data=batch_digest(setup.batches, 0))
            results = _train(Job(config, setup, directory, stop, saves, hang, say), measure)
        if config.push_to_hub is not None:
            # Beyond the hang timer: it takes as long as it takes.
            with stop.at_once():
                first_process(
                    lambda: _push(config, directory, repository, results["steps"], say),
                    "upload the model",
                )
        return results


def _repository(config: Config) -> str:
    """The repository that the export goes to, which is there from here on; empty if none."""
    name = config.push_to_hub
    if name is None:
        return ""
    made = first_process(lambda: prepare_push(name, config.hub_private), "upload to the hub")
    return made or ""


def _push(
    config: Config, directory: RunDirectory, repository: str, step: int, say: Callable[[str], None]
) -> None:
    path = exports(config, directory)[0]
    say(f"Uploading {path} to {repository} ...")
    say(f"Uploaded: {push(path, repository, f'jaxmoo, step {step}')}")


_LESS_MEMORY = (
    "`jaxmoo plan` shows what a step needs, and of what it is made. Use more train.microbatches, "
    "a smaller data.batch_size or data.sequence_length, or more devices."
)


def _train(job: Job, measure: Callable[[Setup, Any], None] | None) -> dict[str, Any]:
    directory = job.directory
    before = evaluate(job, 0, job.setup.state.params)
    _check_start(job, before)
    samples = SampleReplies(job)
    first = samples(0, job.setup.state.params)
    with open_checkpoints(directory, keep=job.config.train.keep_checkpoints) as checkpoints:
        state, done = resume(job, checkpoints)
        state, step = Loop(job, checkpoints, state, done).run()
    after = evaluate(job, step, state.weights)
    replies = side_by_side(first, samples(step, state.weights))
    results = _finish(job, state.weights, step, before, after, replies)
    if measure is not None:
        measure(job.setup, state.weights)
    return results


def _check_start(job: Job, before: Mapping[str, LanguageScore]) -> None:
    """Raise where losses before the first step would end the run after it."""
    config, setup = job.config, job.setup
    bad = [code for code in config.data.seen if not math.isfinite(before[code].nll)]
    if bad and (config.resolve.nonfinite == "raise" or len(bad) == len(config.data.seen)):
        found = examine(setup.state.params, setup.everywhere)
        found |= examine(setup.frozen, setup.everywhere)
        adapter = f", the adapter {config.lora.adapter}" if config.lora.adapter else ""
        raise NonFiniteLossError(
            f"The held-out loss of {', '.join(bad)} is not finite before the first step, so no "
            f"setting of the optimiser is at fault but the model in {setup.source}{adapter}: "
            f"{largest(found)}. Take its files from their source again; with model.dtype="
            f"{config.model.dtype}, try float32."
        )


def _plan(config: Config, setup: Setup) -> str:
    trained = count_parameters(setup.state.params)
    total = trained + count_parameters(setup.frozen)
    part = setup.gradients.partition
    axes = " x ".join(f"{name} {size}" for name, size in setup.device_mesh.shape.items())
    processes = jax.process_count()
    spread = f" of {processes} processes" if processes > 1 else ""
    return _late(config, setup) + (
        f"Training {trained:,} of {total:,} parameters on {len(config.data.seen)} languages: "
        f"{config.resolve.aggregator} over {len(part)} blocks ({config.resolve.blocks}), "
        f"{config.resolve.engine} engine; {setup.device_mesh.size} device(s){spread}, {axes}."
    )


def _late(config: Config, setup: Setup) -> str:
    """Say what blocks cost that cannot be resolved inside the backward pass."""
    engine = setup.gradients.engine
    if engine is None:
        return ""
    spec = step_spec(config.data).items()
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in spec}
    kept = engine.kept_bytes(engine.usage(setup.state.params, batch, setup.frozen))
    if not kept:
        return ""
    return (
        f"The gradients of {len(kept)} arrays are kept for all languages until the end of the "
        f"backward pass, where their blocks ({config.resolve.blocks}, train.accumulation="
        f"{config.train.accumulation}) are resolved: {format_size(sum(kept.values()))} per "
        "device.\n"
    )


def _finish(
    job: Job,
    params: Any,
    step: int,
    before: Mapping[str, LanguageScore],
    after: Mapping[str, LanguageScore],
    replies: Replies,
) -> dict[str, Any]:
    """Export the model, record the results, draw the report and show the table."""
    config, directory = job.config, job.directory
    results = _results(config, step, before, after)
    with job.stop.at_once():
        if is_first() and config.report:
            _report(job, step, before, after, replies)
        results["exported"] = export(job, params, step)
        job.point(step)
        if is_first():
            directory.write_results(results)
            if config.report:
                job.say(f"Report: {directory.report / 'index.html'}")
    job.say(before_after_table(before, after, config.data.seen, config.data.unseen))
    # None leaves before the first one is done: it would be waited for in vain.
    barrier("the run is complete")
    return results


def _report(
    job: Job,
    step: int,
    before: Mapping[str, LanguageScore],
    after: Mapping[str, LanguageScore],
    replies: Replies,
) -> None:
    """Draw the report, of which the exported model gets a copy."""
    config, directory = job.config, job.directory
    rows = read_metrics(directory.metrics)
    write_report(
        directory.report,
        rows=rows,
        seen=config.data.seen,
        unseen=config.data.unseen,
        before=before,
        after=after,
        evaluations=directory.all_scores(),
        replies=replies,
        facts=facts(job, step, rows),
    )


def _results(
    config: Config,
    step: int,
    before: Mapping[str, LanguageScore],
    after: Mapping[str, LanguageScore],
) -> dict[str, Any]:
    seen, unseen = config.data.seen, config.data.unseen
    return {
        "aggregator": config.resolve.aggregator,
        "blocks": config.resolve.blocks,
        "steps": step,
        "before": {code: score.to_dict() for code, score in before.items()},
        "after": {code: score.to_dict() for code, score in after.items()},
        "summary_before": summarise(before, seen, unseen).to_dict(),
        "summary_after": summarise(after, seen, unseen).to_dict(),
    }
