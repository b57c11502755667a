"""The report of a study: tables in Markdown and a plot, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxmoo.config.study_config import StudyConfig
from jaxmoo.data.table import text_table
from jaxmoo.errors import DataError
from jaxmoo.evaluate.measures import MEASURES
from jaxmoo.files.atomic import replace_text
from jaxmoo.study.figure import forest, language_map
from jaxmoo.study.grid import Cell
from jaxmoo.study.outcome import GROUPS, Arm, measures_of, outcomes, summary
from jaxmoo.study.rows import Row, RowStore, base_row, check_rows, rows_of
from jaxmoo.study.statistics import Estimate, holm, mean_interval, paired_difference

__all__ = ["write_report"]

_HEADS = {"seen": "seen mean", "unseen": "unseen mean", "worst": "worst language"}


def write_report(study: StudyConfig, cells: Sequence[Cell], store: RowStore) -> str:
    """Make tables and plot from stored rows.

    Args:
      study: the settings.
      cells: the grid.
      store: the rows; ``study.md`` and two plots are written beside them.

    Returns:
      The contents of ``study.md``. The same rows give the same text.

    Raises:
      DataError: there are no rows to report.
      ConfigError: rows are not of this study.
    """
    rows = store.read()
    check_rows(cells, rows, store.path)
    stored = rows_of(cells, rows)
    arms = outcomes(study, stored)
    if not arms:
        raise DataError(
            f"{store.path} has no row to report: no arm has a seed with all learning rates "
            f"({', '.join(f'{rate:g}' for rate in study.learning_rates)}). Run the study first."
        )
    measures = measures_of([row for arm in arms.values() for row in arm.rows.values()])
    differences = _differences(arms, measures, study.baseline)
    parts = [_about(study, cells, stored, arms)]
    for measure in measures:
        parts.append(_scores(measure, arms, base_row(rows)))
    if any(differences.values()):
        parts += [_difference_table(measure, differences, study) for measure in measures]
        parts.append(_reading(study, differences))
        forest(differences, measures, study.baseline, store.directory / "forest.svg")
        language_map(
            _by_language(arms, measures[0], study.baseline),
            *_languages(arms),
            measures[0],
            study.baseline,
            store.directory / "languages.svg",
        )
    if any(arm.tuned for arm in arms.values()):
        parts.append(_rates(study, arms))
    parts.append(_costs(arms))
    parts.append(_circumstances(list(stored.values())))
    text = "\n\n".join(parts) + "\n"
    replace_text(store.directory / "study.md", text)
    return text


def _about(
    study: StudyConfig, cells: Sequence[Cell], stored: Mapping, arms: Mapping[str, Arm]
) -> str:
    first = next(iter(arms.values()))
    row = next(iter(first.rows.values()))
    examples = [parts[first.part]["examples"] for parts in row["languages"].values()]
    spread = f"{min(examples)} to {max(examples)}" if len(set(examples)) > 1 else f"{examples[0]}"
    lines = [
        f"{len(stored)} of {len(cells)} runs. Scores are of {spread} held-out examples per language"
        + (" that learning rates were not chosen by" if first.part == "report" else "")
        + f"; seen: {', '.join(row['seen'])}"
        + (f"; unseen: {', '.join(row['unseen'])}." if row["unseen"] else ".")
    ]
    missing: dict[str, list[str]] = {}
    for cell in cells:
        if cell.key not in stored:
            rate = f" at {cell.key.learning_rate:g}" if len(study.learning_rates) > 1 else ""
            missing.setdefault(cell.key.arm, []).append(f"seed {cell.key.seed}{rate}")
    whole = [arm for arm in missing if not any(key.arm == arm for key in stored)]
    partly = [f"{arm} ({', '.join(m)})" for arm, m in missing.items() if arm not in whole]
    for what, which in (("Unfinished", partly), ("Not run at all", whole)):
        if which:
            lines.append(f"{what}: {', '.join(which)}.")
    return "\n\n".join(lines)


def _differences(
    arms: Mapping[str, Arm], measures: Sequence[str], baseline: str
) -> dict[tuple[str, str], dict[str, Estimate]]:
    """Per measure and group, every other arm minus the baseline."""
    found: dict[tuple[str, str], dict[str, Estimate]] = {}
    for measure in measures:
        for group in GROUPS:
            one = found[measure, group] = {}
            if baseline not in arms:
                continue
            like = arms[baseline].scores(measure, group)
            for name, arm in arms.items():
                estimate = paired_difference(like, arm.scores(measure, group))
                if name != baseline and estimate is not None:
                    one[name] = estimate
    return found


def _by_language(
    arms: Mapping[str, Arm], measure: str, baseline: str
) -> dict[str, dict[str, Estimate]]:
    """Per arm that shares a seed with the baseline, every language's difference to it."""
    found = {}
    for name, arm in arms.items():
        differences = {
            code: paired_difference(
                arms[baseline].language(measure, code), arm.language(measure, code)
            )
            for codes in _languages(arms)
            for code in codes
        }
        known = {code: one for code, one in differences.items() if one is not None}
        if name != baseline and known:
            found[name] = known
    return found


def _languages(arms: Mapping[str, Arm]) -> tuple[list[str], list[str]]:
    """Those seen, and those unseen."""
    row = next(iter(next(iter(arms.values())).rows.values()))
    return row["seen"], row["unseen"]


def _scores(measure: str, arms: Mapping[str, Arm], base: Row | None) -> str:
    table = []
    first = next(iter(arms.values()))
    if base is not None:
        scores = summary(base, first.part)[measure]
        values = [f"{scores[group]:.3f}" if group in scores else "" for group in GROUPS]
        table.append(["before training", "", "", *values])
    for name, arm in arms.items():
        found = [arm.scores(measure, group) for group in GROUPS]
        values = [_plus_minus(mean_interval([*one.values()])) if one else "" for one in found]
        table.append([name, f"{arm.learning_rate:g}", len(arm.rows), *values])
    better = "higher" if MEASURES[measure].higher_is_better else "lower"
    header = ["arm", "learning rate", "seeds", *_HEADS.values()]
    title = f"### {MEASURES[measure].label} ({better} is better)"
    return f"{title}\n\nMean ± 95 % t-interval over seeds.\n\n{text_table(header, table)}"


def _difference_table(
    measure: str, differences: Mapping[tuple[str, str], Mapping[str, Estimate]], study: StudyConfig
) -> str:
    table = []
    adjusted = {
        group: holm({arm: one.p for arm, one in differences[measure, group].items()})
        for group in GROUPS
    }
    for arm in study.arms:
        if arm not in differences[measure, "seen"]:
            continue
        cells: list[object] = [arm, len(differences[measure, "seen"][arm].values)]
        for group in GROUPS:
            estimate = differences[measure, group].get(arm)
            if estimate is None:
                cells += ["", ""]
            else:
                p = adjusted[group][arm] if math.isfinite(estimate.half) else math.nan
                cells += [_signed(estimate), "–" if math.isnan(p) else f"{p:.2f}"]
        table.append(cells)
    header = ["arm", "seeds"]
    for head in _HEADS.values():
        header += [head, "p"]
    return (
        f"### {MEASURES[measure].label}: difference to {study.baseline}\n\n"
        f"{text_table(header, table)}"
    )


def _reading(
    study: StudyConfig, differences: Mapping[tuple[str, str], Mapping[str, Estimate]]
) -> str:
    count = max(len(found) for found in differences.values())
    return (
        "Differences are paired by seed, ± the 95 % t-interval of their mean. p is that of the "
        f"paired t-test, adjusted by Holm's rule over the comparisons with {study.baseline} in its "
        f"column ({count}); columns and tables are not adjusted for one another. An interval is "
        "over the random choices of training, with the same held-out examples.\n\n"
        "![Differences](forest.svg)\n\n![Differences by language](languages.svg)"
    )


def _rates(study: StudyConfig, arms: Mapping[str, Arm]) -> str:
    ordered = sorted(study.learning_rates)
    table = []
    for name, arm in arms.items():
        edge = arm.learning_rate in (ordered[0], ordered[-1])
        values = [
            f"**{arm.tuned[rate]:.3f}**" if rate == arm.learning_rate else f"{arm.tuned[rate]:.3f}"
            for rate in ordered
        ]
        table.append([name, len(arm.tuned_seeds), *values, "yes" if edge else ""])
    header = ["arm", "seeds", *(f"{rate:g}" for rate in ordered), "at the grid's edge"]
    return (
        "### Learning rates\n\nMean NLL of the seen languages on the tuning examples; the lowest "
        f"is the one reported.\n\n{text_table(header, table)}"
    )


def _costs(arms: Mapping[str, Arm]) -> str:
    table = []
    for name, arm in arms.items():
        rows = list(arm.rows.values())

        def mean(field: str, rows: Sequence[Row] = rows) -> float:
            known = [row[field] for row in rows if row.get(field) is not None]
            return math.fsum(known) / len(known) if known else math.nan

        values = [
            f"{mean('steps'):.0f}",
            f"{mean('tokens'):,.0f}",
            f"{mean('step_seconds'):.2f}",
            f"{mean('train_seconds') / 60:.1f}",
        ]
        for field in ("conflict_share", "update_norm", "norm_ratio"):
            value = mean(field)
            values.append("" if math.isnan(value) else f"{value:.3g}")
        table.append([name, *values])
    header = ["arm", "steps", "tokens", "s/step", "min/run", "conflict", "update norm", "/ mean's"]
    return (
        "### Compute and updates\n\nMeans over runs. *conflict*: share of pairs of languages with "
        "opposed gradients, over blocks and steps; *update norm*: length of the resolved gradient "
        "before clipping; */ mean's*: the same over the mean gradient's.\n\n"
        + text_table(header, table)
    )


def _circumstances(rows: Sequence[Row]) -> str:
    def once(texts: Sequence[str]) -> str:
        return "; ".join(dict.fromkeys(texts))

    packages = [", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows]
    return f"Hardware: {once([row['hardware'] for row in rows])}. Versions: {once(packages)}."


def _plus_minus(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f}" + _half(estimate)


def _signed(estimate: Estimate) -> str:
    return f"{estimate.mean:+.3f}" + _half(estimate)


def _half(estimate: Estimate) -> str:
    return f" ± {estimate.half:.3f}" if math.isfinite(estimate.half) else ""
