"""What a run leaves when its last step is done: results, the exported model, the report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from jaxmoo.analysis import write_report
from jaxmoo.evaluate import LanguageScore, before_after_table, summarise
from jaxmoo.hf import save_adapter, save_model
from jaxmoo.hf.generation import left_to_callers
from jaxmoo.models import merge_adapters
from jaxmoo.train.card import adapter_card, public_name, run_card
from jaxmoo.train.config import Config
from jaxmoo.train.data import read_template
from jaxmoo.train.distributed import barrier, from_first, is_first
from jaxmoo.train.job import Job
from jaxmoo.train.metrics import read_metrics

__all__ = ["finish"]


def finish(
    job: Job,
    params: Any,
    step: int,
    before: Mapping[str, LanguageScore],
    after: Mapping[str, LanguageScore],
) -> dict[str, Any]:
    """Export the model, record the results, draw the report and show the table.

    Args:
      job: the run.
      params: the trained parameters.
      step: the steps that they have behind them.
      before: held-out scores before the first step.
      after: held-out scores of these parameters.

    Returns:
      The results.

    Raises:
      InterruptedRunError: when the run is asked to stop; the same command does the rest.
      CheckpointError: the model cannot be written.
    """
    config, directory = job.config, job.directory
    results = _results(config, step, before, after)
    with job.stop.at_once():
        if config.export:
            _export(job, params, step)
        job.point(step)
        if is_first():
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
                job.say(f"Report: {directory.report / 'index.html'}")
    job.say(before_after_table(before, after, config.data.seen, config.data.unseen))
    # None leaves before the first one is done: it would be waited for in vain.
    barrier("the run is complete")
    return results


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


def _export(job: Job, params: Any, step: int) -> None:
    directory, config = job.directory, job.config
    recorded = directory.exported_step() == step
    merged, adapter = directory.export, directory.adapter
    ending = job.setup.ending
    stop = () if ending is None else (ending,)
    wanted = {"merged": (merged,), "adapter": (adapter,), "both": (merged, adapter)}
    for path in wanted[config.lora.export]:
        if from_first(recorded and path.exists()):
            continue
        if is_first():
            # This run's own: of an earlier end, or cut short.
            for old in (path, *directory.path.glob(f".{path.name}.*.tmp")):
                shutil.rmtree(old, ignore_errors=True)
        barrier("nothing is in the way of the export")
        model = job.setup.merge(params, job.setup.frozen)
        card = run_card(directory, config, step)
        if path == adapter:
            base = public_name(config.model.source)
            save_adapter(model, path, base_model=base, card=adapter_card(card))
            job.say(f"Exported the adapters to {path} (PEFT format).")
            if note := left_to_callers(job.setup.source, stop):
                job.say(f"Note: {note}")
        else:
            merge_adapters(model)
            save_model(
                model,
                path,
                source=job.setup.source,
                card=card,
                chat_template=read_template(config.data.chat_template),
                stop=stop,
            )
            job.say(f"Exported to {path} (Hugging Face format).")
