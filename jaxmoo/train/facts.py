"""What was run, in the words of its report."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxmoo.config import Config
from jaxmoo.config.schema import flow
from jaxmoo.models.quantization import count_parameters
from jaxmoo.runs.provenance import versions
from jaxmoo.runs.run_card import kind_of_adapters, public_name
from jaxmoo.train.job import Job

__all__ = ["facts"]


def facts(job: Job, step: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what a reader of a run's results needs to know of it.

    Args:
      job: the run.
      step: the steps done.
      rows: its metrics.
    """
    config, setup = job.config, job.setup
    data, optimizer = config.data, config.optimizer
    devices = list(setup.device_mesh.devices.flat)
    axes = " x ".join(f"{name} {size}" for name, size in setup.device_mesh.shape.items())
    shape = f"{data.step_languages} languages x {data.batch_size} rows x {data.sequence_length}"
    return {
        "model": f"{public_name(config.model.source)}, computed in {config.model.dtype}",
        "trained": _trained(config, setup.state.params, setup.frozen),
        "method": f"{config.resolve.aggregator}{_options(config.resolve.options)} over "
        f"{len(setup.gradients.partition)} blocks ({config.resolve.blocks}), "
        f"{config.resolve.engine} engine, Gram matrices {config.resolve.gram}",
        "data": f"{', '.join(public_name(str(one.source)) for one in data.each)}: "
        f"{sum(r.train or 0 for r in _seen(job)):,} training "
        f"examples in {len(data.seen)} languages",
        "a step": f"{shape} tokens{', packed' if data.packing else ''}",
        "steps": f"{step} of {config.train.steps}{_tokens(rows, step)}",
        "optimiser": f"{optimizer.name}, learning rate {optimizer.learning_rate:g} "
        f"({optimizer.decay}, {optimizer.warmup_steps} steps of warm-up), weight decay "
        f"{optimizer.weight_decay:g}",
        "seed": str(config.seed),
        "devices": f"{len(devices)} x {devices[0].device_kind} ({axes}), "
        f"{jax.process_count()} process(es)",
        "ended": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def _seen(job: Job) -> list[Any]:
    return [report for report in job.setup.corpus.report.values() if report.seen]


def _trained(config: Config, params: Any, frozen: Any) -> str:
    trained, others = count_parameters(params), count_parameters(frozen)
    what = f"{trained:,} of {trained + others:,} parameters, {config.model.trainable}"
    lora = config.lora
    if lora.rank is None:
        return what
    return (
        f"{kind_of_adapters(config)}, rank {lora.rank}, alpha {lora.alpha:g}, on "
        f"{', '.join(lora.targets)}: {what}"
    )


def _options(options: Mapping[str, Any]) -> str:
    return f" {flow(options)}" if options else ""


def _tokens(rows: Sequence[Mapping[str, Any]], step: int) -> str:
    """Tokens trained on, and the time of the steps; of the logged ones if not all are."""
    logged = [row for row in rows if row.get("tokens") and row.get("step_seconds")]
    if not logged or not step:
        return ""
    tokens = sum(row["tokens"] for row in logged) * step / len(logged)
    minutes = sum(row["step_seconds"] for row in logged) * step / len(logged) / 60
    about = "" if len(logged) == step else "about "
    return f", {about}{tokens:,.0f} tokens without padding, {minutes:,.1f} minutes in steps"
