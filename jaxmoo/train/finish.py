"""What a run leaves when its last step is done: results, the exported model, the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoo.config.training import Config
from jaxmoo.evaluate import LanguageScore, before_after_table, summarise
from jaxmoo.report import write_report
from jaxmoo.runtime.processes import barrier, is_first
from jaxmoo.train.export import export
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
      CheckpointError: the model cannot be written, or what was exported before is damaged.
      ConfigError: a person's files are in the way of the export.
    """
    config, directory = job.config, job.directory
    results = _results(config, step, before, after)
    with job.stop.at_once():
        export(job, params, step)
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
