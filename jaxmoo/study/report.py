"""The report of a study: tables in Markdown, plots and a page, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxmoo.config.study_config import StudyConfig
from jaxmoo.errors import DataError
from jaxmoo.evaluate.measures import MEASURES
from jaxmoo.files.atomic import replace_text
from jaxmoo.study.answer import GROUP_NAMES, answer, half, headline, with_half
from jaxmoo.study.effects import Effects, Verdict, verdicts
from jaxmoo.study.figure import forest, language_map
from jaxmoo.study.grid import Cell, Key
from jaxmoo.study.outcome import GROUPS, Arm, measures_of, outcomes, summary
from jaxmoo.study.parts import Part, Picture, Table, as_markdown
from jaxmoo.study.power import power_section
from jaxmoo.study.rows import Row, RowStore, base_row, check_rows, rows_of
from jaxmoo.study.statistics import LEAST, Estimate, mean_interval
from jaxmoo.study.web_page import Shown, write_page

__all__ = ["write_power", "write_report"]

# Per measure and group of languages, by arm.
Found = Mapping[tuple[str, str], Mapping[str, Verdict]]

_HEADS = {"seen": "seen mean", "unseen": "unseen mean", "worst": "worst language"}


def write_report(study: StudyConfig, cells: Sequence[Cell], store: RowStore) -> str:
    """Make tables, plots and a page from stored rows.

    Args:
      study: the settings.
      cells: the grid.
      store: the rows; ``study.md``, two plots and ``index.html``, a page that holds it all, are
        written beside them.

    Returns:
      What ``study.md`` holds, with tables that fit the terminal. The same rows give the same file.

    Raises:
      DataError: there are no rows to report.
      ConfigError: rows are not of this study.
    """
    rows = store.read()
    effects = _effects(study, cells, rows, store)
    arms, measures, stored = effects.arms, measures_of(effects.row), rows_of(cells, rows)
    main = _main_measure(study, measures)
    smallest = study.measure.smallest_effect.get(main)
    shown = None
    answered: list[Part] = []
    parts: list[Part] = []
    if effects.others():
        found = _verdicts(effects, measures, study)
        shown = Shown(
            {group: found[main, group] for group in GROUPS if (main, group) in found},
            _by_language(effects, main), main, study.baseline, smallest,
        )  # fmt: skip
        answered.append(answer(found, main, study.baseline, smallest))
        forest(shown.found, main, study.baseline, smallest, store.directory / "forest.svg")
        language_map(
            shown.by_language, effects.row["seen"], effects.row["unseen"], main,
            study.baseline, store.directory / "languages.svg",
        )  # fmt: skip
        parts.append(Picture("forest.svg", headline(found[main, "seen"], study.baseline)))
        parts.append(_reading(effects, cells))
        for measure in measures:
            parts += _difference_tables(measure, found, effects)
        parts.append(Picture("languages.svg", "Differences by language"))
        if any(len(effects.seeds(name)) > 1 for name in effects.others()):
            parts += power_section(effects, main, "seen")
    for measure in measures:
        parts += _scores(measure, effects, base_row(rows))
    if any(arm.tuned for arm in arms.values()):
        parts += _rates(study, arms)
    parts += _costs(arms)
    parts.append(_circumstances(list(stored.values())))
    about = _about(study, cells, stored, effects)
    whole = [*answered, *about, *parts]
    replace_text(store.directory / "study.md", as_markdown(whole) + "\n")
    write_page(study, cells, stored, answered, about, parts, shown, store.directory)
    return as_markdown(whole, width=None) + "\n"


def write_power(study: StudyConfig, cells: Sequence[Cell], store: RowStore) -> str:
    """Describe the noise of stored rows, and how small a difference more of them would find.

    Args:
      study: the settings.
      cells: the grid.
      store: the rows, as of a pilot.

    Returns:
      Tables in Markdown, of every measure with a smallest effect, or of the first measure.

    Raises:
      DataError: there are too few rows.
      ConfigError: rows are not of this study.
    """
    effects = _effects(study, cells, store.read(), store)
    measures = measures_of(effects.row)
    wanted = [name for name in measures if name in study.measure.smallest_effect]
    return as_markdown(
        [
            part
            for measure in wanted or measures[:1]
            for group in ("seen", "worst")
            for part in power_section(effects, measure, group)
        ],
        width=None,
    )


def _effects(
    study: StudyConfig, cells: Sequence[Cell], rows: Sequence[Row], store: RowStore
) -> Effects:
    check_rows(cells, rows, store.path)
    arms = outcomes(study, rows_of(cells, rows))
    if not arms:
        raise DataError(
            f"{store.path} has no row to report: no arm has a seed with all learning rates "
            f"({', '.join(f'{rate:g}' for rate in study.learning_rates)}). Run the study first."
        )
    drawn = study.measure.other_languages
    return Effects(arms, study.baseline, base_row(rows), other_languages=drawn)


def _main_measure(study: StudyConfig, measures: Sequence[str]) -> str:
    """Return the measure that answers the question: the first that has a smallest effect."""
    return next((name for name in study.measure.smallest_effect if name in measures), measures[0])


def _verdicts(effects: Effects, measures: Sequence[str], study: StudyConfig) -> Found:
    """Per measure and group, what every other arm's difference shows."""
    return {
        (measure, group): verdicts(
            {name: effects.difference(name, measure, group) for name in effects.others()},
            MEASURES[measure].higher_is_better,
            study.measure.smallest_effect.get(measure),
        )
        for measure in measures
        for group in GROUPS
        if group == "worst" or effects.row[group]
    }


def _about(
    study: StudyConfig, cells: Sequence[Cell], stored: Mapping[Key, Row], effects: Effects
) -> list[Part]:
    row, part = effects.row, effects.part
    examples = [parts[part]["examples"] for parts in row["languages"].values()]
    spread = f"{min(examples)} to {max(examples)}" if len(set(examples)) > 1 else f"{examples[0]}"
    lines = [
        f"{len(stored)} of {len(cells)} runs. Scores are of {spread} held-out examples per language"
        + (" that learning rates were not chosen by" if part == "report" else "")
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
    return [*lines]


def _by_language(effects: Effects, measure: str) -> dict[str, dict[str, Estimate]]:
    """Per arm, every language's difference to the baseline."""
    codes = [*effects.row["seen"], *effects.row["unseen"]]
    return {
        name: {code: effects.difference(name, measure, code) for code in codes}
        for name in effects.others()
    }


def _scores(measure: str, effects: Effects, base: Row | None) -> list[Part]:
    table = []
    if base is not None:
        scores = summary(base, effects.part)[measure]
        values = [f"{scores[group]:.3f}" if group in scores else "" for group in GROUPS]
        table.append(["before training", "", "", *values])
    for name, arm in effects.arms.items():
        found = [arm.scores(measure, group) for group in GROUPS]
        values = [with_half(mean_interval([*one.values()])) if one else "" for one in found]
        table.append([name, f"{arm.learning_rate:g}", len(arm.rows), *values])
    better = "higher" if MEASURES[measure].higher_is_better else "lower"
    header = ["arm", "learning rate", "seeds", *_HEADS.values()]
    title = f"### {MEASURES[measure].label} ({better} is better)"
    return [title, "Mean ± 95 % t-interval over seeds.", Table(header, table)]


def _difference_tables(measure: str, found: Found, effects: Effects) -> list[Part]:
    better = "higher" if MEASURES[measure].higher_is_better else "lower"
    title = f"### {MEASURES[measure].label} ({better} is better): difference to {effects.baseline}"
    parts: list[Part] = [title]
    for group, name in GROUP_NAMES.items():
        if (measure, group) in found:
            parts.append(f"{name[0].upper()}{name[1:]}:")
            parts.append(_difference_table(measure, group, found[measure, group], effects))
    return parts


def _difference_table(
    measure: str, group: str, found: Mapping[str, Verdict], effects: Effects
) -> Table:
    # The wider or narrower interval that the test is not about.
    drawn = not effects.other_languages
    beside = [f"± {'other' if drawn else 'given'} languages"] if group != "worst" else []
    tested = not all(math.isnan(one.p_equivalent) for one in found.values())
    table = []
    for name, one in found.items():
        cells: list[object] = [name, len(one.estimate.values), with_half(one.estimate, "+")]
        if beside:
            other = effects.difference(name, measure, group, other_languages=drawn)
            cells.append(half(other))
        cells += [_p(one.p), _gain(one.gain)]
        if tested:
            cells.append(_p(one.p_equivalent))
        table.append([*cells, one.kind])
    header = ["arm", "seeds", "difference", *beside, "p"]
    header += ["gain up to", *(["p, equivalent"] if tested else []), "verdict"]
    return Table(header, table)


def _reading(effects: Effects, cells: Sequence[Cell]) -> str:
    count = len(effects.others())
    parallel = cells[0].config.data.columns.group is not None
    few = [group for group in ("seen", "unseen") if 0 < len(effects.row[group]) < LEAST]
    parts = [f"Differences to {effects.baseline} are paired by seed, ± half of the 95 % interval."]
    parts.append(
        "It counts seeds, languages and held-out examples as drawn from more of their kind; *± "
        "given languages* counts seeds and examples only, for a claim about these very languages."
        if effects.other_languages
        else "It counts seeds and held-out examples as drawn from more of their kind, for a claim "
        "about these very languages; *± other languages* counts languages as well."
    )
    if few:
        parts.append(
            f"With fewer than {LEAST} languages ({', '.join(few)}) they are taken as given."
        )
    if not effects.of_examples:
        parts.append(
            "**These rows hold no single examples.** "
            + (
                "What translations of one text have in common is therefore not counted, nor are "
                if parallel
                else "Examples are counted as part of their language, but not "
            )
            + "examples for given languages and the worst language: there, intervals are of seeds "
            "alone, and too narrow."
        )
    parts.append(
        "*p* is that of the t-test that there is no difference, *p, equivalent* that of the two "
        "one-sided tests that it is the smallest effect or more; both are adjusted by Holm's rule "
        f"over the {count} comparisons of a table. *Gain up to*: the better end of the interval, "
        "the largest gain that is still possible. Verdicts are at 5 %: *equivalent*: smaller than "
        "the smallest effect; *not better*: not better by the smallest effect, and perhaps worse. "
        "Tables are not adjusted for one another."
    )
    return " ".join(parts)


def _rates(study: StudyConfig, arms: Mapping[str, Arm]) -> list[Part]:
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
    return [
        "### Learning rates",
        "Mean NLL of the seen languages on the tuning examples; the lowest is the one reported.",
        Table(header, table),
    ]


def _costs(arms: Mapping[str, Arm]) -> list[Part]:
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
    return [
        "### Compute and updates",
        "Means over runs. *conflict*: share of pairs of languages with opposed gradients, over "
        "blocks and steps; *update norm*: length of the resolved gradient before clipping; "
        "*/ mean's*: the same over the mean gradient's.",
        Table(header, table),
    ]


def _circumstances(rows: Sequence[Row]) -> str:
    def once(texts: Sequence[str]) -> str:
        return "; ".join(dict.fromkeys(texts))

    packages = [", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows]
    return f"Hardware: {once([row['hardware'] for row in rows])}. Versions: {once(packages)}."


def _p(p: float) -> str:
    if math.isnan(p):
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _gain(gain: float) -> str:
    if not math.isfinite(gain):
        return "?"
    return f"{gain:.3f}" if gain > 0 else "none"
