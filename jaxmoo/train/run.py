"""A whole fine-tuning run: from its settings to weights, metrics, a table and a report."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmoo import mesh
from jaxmoo.analysis import write_report
from jaxmoo.blocks import Partition
from jaxmoo.data import count_tokens
from jaxmoo.errors import JaxmooError
from jaxmoo.evaluate import LanguageScore, before_after_table, evaluate_nll, summarise
from jaxmoo.hf import save_model
from jaxmoo.train.card import run_card
from jaxmoo.train.checkpoint import Checkpoints
from jaxmoo.train.config import Config
from jaxmoo.train.data import read_template
from jaxmoo.train.directory import RunDirectory
from jaxmoo.train.metrics import MetricsWriter, Progress, read_metrics
from jaxmoo.train.setup import Setup, prepare
from jaxmoo.train.signals import StopRequest
from jaxmoo.train.step import TrainState, learning_rate

__all__ = ["InterruptedRunError", "NonFiniteLossError", "train"]


class NonFiniteLossError(JaxmooError, FloatingPointError):
    """A loss or gradient is NaN or infinite."""


class InterruptedRunError(JaxmooError):
    """The run was asked to stop; it saved a checkpoint and can be resumed.

    Attributes:
      signal: what asked it.
    """

    def __init__(self, message: str, number: signal.Signals) -> None:
        super().__init__(message)
        self.signal = number


def train(config: Config, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run, or resume, the fine-tuning that the settings describe.

    Everything is written below ``config.output``; see
    :class:`~jaxmoo.train.directory.RunDirectory`. A run that is already complete only prints its
    table again.

    Args:
      config: the settings.
      say: called with lines for a person to read.

    Returns:
      The results that are also in ``results.json``: settings of the method, held-out scores
      before and after, their means and the worst language.

    Raises:
      ConfigError, DataError, CheckpointError, DownloadError: before any training.
      NonFiniteLossError: a loss is NaN or infinite; checkpoints stay as they are.
      InterruptedRunError: on SIGINT or SIGTERM, once a checkpoint is saved.
    """
    directory = RunDirectory(config.output)
    directory.check(config)
    setup = prepare(config, say)
    say(_plan(config, setup))
    directory.claim(config)

    with Checkpoints(directory.checkpoints, keep=config.train.keep_checkpoints) as checkpoints:
        state = setup.state
        latest = checkpoints.latest()
        if latest is not None:
            state = checkpoints.restore(latest, state)
            say(f"Resuming from the checkpoint of step {latest}.")
        _evaluate(config, setup, directory, 0, setup.state, say)
        state = _loop(config, setup, directory, checkpoints, state, say)
    after = _evaluate(config, setup, directory, config.train.steps, state, say)
    before = directory.scores(0)
    assert before is not None
    results = _results(config, before, after)
    if config.export:
        _export(config, setup, directory, state, say)
    directory.write_results(results)
    if config.report:
        write_report(
            directory.report,
            rows=read_metrics(directory.metrics),
            seen=config.data.seen,
            unseen=config.data.unseen,
            before=before,
            after=after,
        )
        say(f"Report: {directory.report / 'index.html'}")
    say(before_after_table(before, after, config.data.seen, config.data.unseen))
    return results


def _loop(
    config: Config,
    setup: Setup,
    directory: RunDirectory,
    checkpoints: Checkpoints,
    state: TrainState,
    say: Callable[[str], None],
) -> TrainState:
    """Train from the state's step to the last; return the final state, saved."""
    start, steps, every = int(state.step), config.train.steps, config.train
    if start >= steps:
        return state
    part = setup.gradients.partition
    rate = learning_rate(config.optimizer, steps)
    sharding = mesh.batch_sharding(setup.device_mesh)
    say("Compiling the training step ...")
    with (
        StopRequest() as stop,
        MetricsWriter(
            directory.path, tensorboard=config.tensorboard, resume_step=start or None
        ) as metrics,
        Progress(steps, start=start) as progress,
    ):
        skipped = jax.device_get(setup.gradients.diagnostics(state.resolver).skipped)
        for index in range(start, steps):
            begun = time.perf_counter()
            batch = setup.batches.batch(index)
            state, measured = setup.step(state, setup.frozen, jax.device_put(batch, sharding))
            measured = jax.device_get(measured)
            here = setup.batches.in_step(index)
            row = _row(config, part, batch, here, measured, time.perf_counter() - begun)
            row |= {"step": index + 1, "learning_rate": float(rate(index))}
            row["epochs"] = setup.batches.epochs(index + 1)
            _check_finite(config, row, measured["skipped"] - skipped, checkpoints)
            skipped = measured["skipped"]
            if index > start:  # the first step's time is the compiler's
                row["tokens_per_second"] = row["tokens"] / row["step_seconds"]
            progress.update(row)
            if (index + 1) % every.log_every and index + 1 != steps:
                del row["blocks"]
            done = index + 1
            if every.evaluate_every and done % every.evaluate_every == 0 and done != steps:
                scores = _evaluate(config, setup, directory, done, state, progress.message)
                row["held_out"] = {code: score.nll for code, score in scores.items()}
            metrics.write(row)
            due = every.checkpoint_every and done % every.checkpoint_every == 0
            if due or done == steps or stop.signal:
                checkpoints.save(done, state)
            if stop.signal and done != steps:
                checkpoints.wait()
                raise InterruptedRunError(
                    f"Stopped by {stop.signal.name} after step {done} of {steps}; its checkpoint "
                    "is saved. The same command goes on from there.",
                    stop.signal,
                )
        checkpoints.wait()
    return state


def _row(
    config: Config,
    part: Partition,
    batch: Mapping[str, np.ndarray],
    here: Sequence[str],
    measured: Mapping[str, np.ndarray],
    seconds: float,
) -> dict[str, Any]:
    """One row of metrics from what a step returned; ``here`` are the languages of its batch."""
    seen = config.data.seen
    number = [seen.index(code) for code in here]
    cosine = np.full((len(seen), len(seen)), np.nan, np.float32)
    cosine[np.ix_(number, number)] = measured["cosine"][np.ix_(number, number)]
    return {
        "loss": dict(zip(here, measured["loss"][number], strict=True)),
        "tokens": int(count_tokens(batch).sum()),
        "step_seconds": seconds,
        "grad_norm": measured["grad_norm"],
        "conflict_share": measured["conflict"].mean(),
        "weights": dict(zip(here, measured["weights"].mean(0)[number], strict=True)),
        "cosine": cosine,
        "skipped": dict(zip(seen, measured["skipped"], strict=True)),
        "blocks": {
            name: {
                "conflict_share": measured["conflict"][i],
                "update_norm": measured["update_norm"][i],
                "mean_norm": measured["mean_norm"][i],
            }
            for i, name in enumerate(part.names)
        },
    }


def _check_finite(
    config: Config, row: Mapping[str, Any], skipped: np.ndarray, checkpoints: Checkpoints
) -> None:
    """Stop the run when languages whose numbers are not finite may not be left out."""
    bad = [code for code, loss in row["loss"].items() if not np.isfinite(loss)]
    what = f"The loss of {', '.join(bad)}"
    if config.resolve.nonfinite == "skip" and len(bad) < len(row["loss"]):
        return
    if not bad:
        if not skipped.any():
            return
        left_out = [c for c, s in zip(config.data.seen, skipped, strict=True) if s]
        what = f"The gradient of {', '.join(left_out)}"
    latest = checkpoints.latest()
    saved = (
        "No checkpoint had been saved."
        if latest is None
        else f"The checkpoint of step {latest} is untouched."
    )
    raise NonFiniteLossError(
        f"{what} is not finite in step {row['step']}. {saved} Lower optimizer.learning_rate, "
        "lengthen optimizer.warmup_steps, or use model.dtype=float32."
    )


def _evaluate(
    config: Config,
    setup: Setup,
    directory: RunDirectory,
    step: int,
    state: TrainState,
    say: Callable[[str], None],
) -> dict[str, LanguageScore]:
    """Held-out scores of a step: those stored, or computed and stored now."""
    stored = directory.scores(step)
    if stored is not None and set(stored) == set(setup.corpus.held_out):
        return stored
    sharding = mesh.rows_sharding(setup.device_mesh)

    def nll(batch: Any) -> jax.Array:
        return setup.nll(state.params, setup.frozen, jax.device_put(batch, sharding))

    # About as many rows as a training step has; the mesh divides them.
    devices = setup.device_mesh.size
    rows = -(-config.data.batch_size * len(config.data.seen) // devices) * devices
    scores = evaluate_nll(nll, setup.corpus.held_out, batch_size=rows, pad_id=setup.pad_id)
    directory.store_scores(step, scores)
    summary = summarise(scores, config.data.seen, config.data.unseen)
    unseen = "" if summary.unseen_nll is None else f", unseen {summary.unseen_nll:.3f}"
    say(
        f"Held-out reply NLL after step {step}: seen {summary.seen_nll:.3f}{unseen}, worst "
        f"{summary.worst} {summary.worst_nll:.3f}"
    )
    return scores


def _results(
    config: Config, before: Mapping[str, LanguageScore], after: Mapping[str, LanguageScore]
) -> dict[str, Any]:
    seen, unseen = config.data.seen, config.data.unseen
    return {
        "aggregator": config.resolve.aggregator,
        "blocks": config.resolve.blocks,
        "steps": config.train.steps,
        "before": {code: score.to_dict() for code, score in before.items()},
        "after": {code: score.to_dict() for code, score in after.items()},
        "summary_before": summarise(before, seen, unseen).to_dict(),
        "summary_after": summarise(after, seen, unseen).to_dict(),
    }


def _export(
    config: Config,
    setup: Setup,
    directory: RunDirectory,
    state: TrainState,
    say: Callable[[str], None],
) -> None:
    if directory.export.exists():
        if directory.exported_step() == config.train.steps:
            return
        # This run's own: of an earlier end, or cut short before it was recorded.
        shutil.rmtree(directory.export)
    save_model(
        setup.merge(state.params, setup.frozen),
        directory.export,
        source=setup.source,
        card=run_card(directory, config, config.train.steps),
        chat_template=read_template(config.data.chat_template),
    )
    say(f"Exported to {directory.export} (Hugging Face format).")


def _plan(config: Config, setup: Setup) -> str:
    trained = sum(x.size for x in jax.tree.leaves(setup.state.params))
    total = trained + sum(x.size for x in jax.tree.leaves(setup.frozen))
    part = setup.gradients.partition
    axes = " x ".join(f"{name} {size}" for name, size in setup.device_mesh.shape.items())
    late = _late(config, setup)
    return late + (
        f"Training {trained:,} of {total:,} parameters on {len(config.data.seen)} languages: "
        f"{config.resolve.aggregator} over {len(part)} blocks ({config.resolve.blocks}), "
        f"{config.resolve.engine} engine; {setup.device_mesh.size} device(s), {axes}."
    )


def _late(config: Config, setup: Setup) -> str:
    """Say what blocks cost that cannot be resolved inside the backward pass."""
    engine = setup.gradients.engine
    if engine is None:
        return ""
    kept = engine.kept_bytes(engine.usage(setup.state.params, setup.batches.batch(0), setup.frozen))
    if not kept:
        return ""
    return (
        f"The gradients of {len(kept)} arrays are kept for all languages until the end of the "
        f"backward pass, where their blocks ({config.resolve.blocks}, train.accumulation="
        f"{config.train.accumulation}) are resolved: {sum(kept.values()) / 2**20:,.0f} MiB per "
        "device.\n"
    )
