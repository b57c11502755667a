"""The page of a study: its question and answer, what was run, pictures and tables in one file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxmoo.config import schema
from jaxmoo.config.study_config import StudyConfig
from jaxmoo.config.yaml_text import flow
from jaxmoo.evaluate.measures import MEASURES
from jaxmoo.files.atomic import replace_text
from jaxmoo.files.outputs import typed_path
from jaxmoo.report.page import image, page, table
from jaxmoo.study.answer import GROUP_NAMES, with_half
from jaxmoo.study.effects import Verdict
from jaxmoo.study.figure import forest, reading_of_forest
from jaxmoo.study.grid import Cell, Key
from jaxmoo.study.parts import Part, Picture, as_html, contents
from jaxmoo.study.rows import Row
from jaxmoo.study.statistics import Estimate

__all__ = ["Shown", "describe_forest", "describe_languages", "write_page"]

# Settings of the runs that a reader asks for first, and what they are called on the page.
_SETTINGS = {
    "model.source": "model",
    "model.trainable": "trained weights",
    "lora.rank": "rank of LoRA adapters",
    "data.source": "data",
    "data.batch_size": "rows per language and step",
    "data.languages_per_step": "languages per step",
    "data.sequence_length": "tokens per row",
    "train.steps": "steps",
    "optimizer.name": "optimizer",
    "optimizer.decay": "decay of the learning rate",
}

# Pictures come first.
_OF_PICTURES = ("### Differences of arms", "### Differences in every language")
_OF_READING = "### How to read the tables"


class Shown(NamedTuple):
    """What the pictures of a study show.

    Attributes:
      found: per group of languages, the verdict on every arm but the baseline.
      by_language: per arm, every language's difference to the baseline.
      measure: what differs, of `jaxmoo.evaluate.measures.MEASURES`.
      baseline: the arm that is subtracted.
      smallest: the smallest effect worth having; None where none is set.
    """

    found: Mapping[str, Mapping[str, Verdict]]
    by_language: Mapping[str, Mapping[str, Estimate]]
    measure: str
    baseline: str
    smallest: float | None


def write_page(
    study: StudyConfig,
    cells: Sequence[Cell],
    stored: Mapping[Key, Row],
    answered: Sequence[Part],
    about: Sequence[Part],
    parts: Sequence[Part],
    shown: Shown | None,
    directory: Path,
) -> None:
    """Write ``index.html``, which can be passed on by itself.

    Args:
      study: the settings.
      cells: the runs that are needed.
      stored: rows of those that there are.
      answered: the answer.
      about: what scores are of.
      parts: the report's other parts.
      shown: what the pictures show, which lie in the directory; None where there are none.
      directory: where to.
    """
    images = {} if shown is None else _images(shown, directory)
    pictures = [part for part in parts if isinstance(part, Picture)]
    seen = [part for pair in zip(_OF_PICTURES, pictures, strict=False) for part in pair]
    run = "### What was run"
    read = [_OF_READING] if shown else []
    results = [*read, *(part for part in parts if not isinstance(part, Picture))]
    body = [
        as_html([*_question(study, cells, shown), *answered, *about], {}),
        contents([*seen, run, *results]),
        as_html([*seen, run], images),
        table([], _settings(study, cells), "settings"),
        _arms(study, cells, stored),
        as_html(results, images),
    ]
    replace_text(directory / "index.html", page(_heading(study, shown), "\n".join(body)))


def _heading(study: StudyConfig, shown: Shown | None) -> str:
    if shown is None:
        return f"Scores of {study.baseline}"
    arms = list(shown.by_language)
    which = arms[0] if len(arms) == 1 else f"any of {len(arms)} arms"
    return f"Is {which} better than {study.baseline}?"


def _question(study: StudyConfig, cells: Sequence[Cell], shown: Shown | None) -> list[Part]:
    if shown is None:
        return []
    measure = MEASURES[shown.measure]
    seen = [code for code in cells[0].config.data.seen if code not in study.measure.skip]
    worth = (
        "No smallest effect worth having is set, so no arm can be shown to be equivalent."
        if shown.smallest is None
        else f"A difference of less than {shown.smallest:g} would not be worth having."
    )
    return [
        f"Better means: a {'higher' if measure.higher_is_better else 'lower'} {measure.label} on "
        f"held-out examples, on average over the {_count(len(seen), 'language')} trained on. "
        f"{worth}"
    ]


def _settings(study: StudyConfig, cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """What all arms share, and where one of them does not."""
    by_arm = {cell.key.arm: schema.values(cell.config) for cell in reversed(cells)}
    usual = by_arm[study.baseline]
    facts = []
    for setting, name in _SETTINGS.items():
        others: dict[str, list[str]] = {}
        for arm in study.arms:
            if arm in by_arm and by_arm[arm][setting] != usual[setting]:
                others.setdefault(_text(by_arm[arm][setting]), []).append(arm)
        if usual[setting] is not None or others:
            apart = [f"{value} in {', '.join(arms)}" for value, arms in others.items()]
            facts.append((name, "; ".join([_text(usual[setting]), *apart])))
    facts += [
        ("seeds", ", ".join(map(str, study.seeds))),
        ("learning rates", ", ".join(f"{rate:g}" for rate in study.learning_rates)),
    ]
    if study.tuning_seeds:
        facts.append(("chosen by seeds", ", ".join(map(str, study.tuning_seeds))))
    if study.measure.choices is not None:
        facts.append(("replies to choose from", study.measure.choices))
    if study.measure.smallest_effect:
        facts.append(("smallest effect worth having", _text(study.measure.smallest_effect)))
    return facts


def _text(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, str):
        return value
    return flow(value).strip("{}")


def _arms(study: StudyConfig, cells: Sequence[Cell], stored: Mapping[Key, Row]) -> str:
    rows = []
    for arm, texts in study.arms.items():
        own = [cell for cell in cells if cell.key.arm == arm]
        resolve = own[0].config.resolve
        others = [
            text
            for text in texts
            if not text.replace(" ", "").startswith(("resolve.aggregator=", "resolve.blocks="))
        ]
        done = sum(cell.key in stored for cell in own)
        name = f"{arm} (baseline)" if arm == study.baseline else arm
        rows.append(
            [name, resolve.aggregator, resolve.blocks, f"{done} of {len(own)}", "; ".join(others)]
        )
    header = ["arm", "method", "blocks", "runs done", "other settings"]
    return f'<div class="wide">{table(header, rows, "words")}</div>'


def _images(shown: Shown, directory: Path) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as scratch:
        narrow = typed_path(scratch) / "forest.svg"
        of = (shown.measure, shown.baseline, shown.smallest)
        forest(shown.found, *of, narrow, narrow=True)
        first = image(directory / "forest.svg", describe_forest(shown), narrow)
    caption = reading_of_forest(shown.baseline, shown.smallest)
    second = image(directory / "languages.svg", describe_languages(shown))
    return {
        "forest.svg": f"{first}\n<p>Each arm's {caption}.</p>",
        "languages.svg": f'<div class="wide">{second}</div>',
    }


def describe_forest(shown: Shown) -> str:
    """Describe the plot of differences in words, with its numbers."""
    better = "higher" if MEASURES[shown.measure].higher_is_better else "lower"
    texts = [
        f"Differences to {shown.baseline} in {MEASURES[shown.measure].label} ({better} is better) "
        f"with 95 % intervals, of {_count(len(shown.found['seen']), 'arm')}."
    ]
    for group, verdicts in shown.found.items():
        ordered = sorted(verdicts, key=lambda name: -verdicts[name].mean_gain)
        ends = [
            f"{with_half(verdicts[name].estimate, '+')} ({name})"
            for name in dict.fromkeys((ordered[0], ordered[-1]))
        ]
        apart = sum(abs(one.estimate.mean) > one.estimate.half for one in verdicts.values())
        text = (
            f"{GROUP_NAMES[group]}: {', the best, to '.join(ends)}, the last"
            if ends[1:]
            else (f"{GROUP_NAMES[group]}: {ends[0]}")
        )
        text += (
            f"; {apart} of {len(verdicts)} intervals {'leaves' if apart == 1 else 'leave'} out 0"
        )
        if shown.smallest is not None:
            within = sum(
                max(abs(one.estimate.low), abs(one.estimate.high)) < shown.smallest
                for one in verdicts.values()
            )
            text += f", {within} {'lies' if within == 1 else 'lie'} within ±{shown.smallest:g}"
        texts.append(f"{text[0].upper()}{text[1:]}.")
    return " ".join(texts)


def describe_languages(shown: Shown) -> str:
    """Describe the map of languages in words, with its numbers."""
    sign = 1 if MEASURES[shown.measure].higher_is_better else -1
    places = {
        (name, code): one for name, of in shown.by_language.items() for code, one in of.items()
    }
    gains = {place: sign * one.mean for place, one in places.items()}
    best, worst = max(gains, key=gains.__getitem__), min(gains, key=gains.__getitem__)
    better, worse = ([place for place, gain in gains.items() if way * gain > 0] for way in (1, -1))
    sure = [
        sum(abs(places[place].mean) > places[place].half for place in side)
        for side in (better, worse)
    ]
    languages = len(next(iter(shown.by_language.values())))
    return (
        f"Differences to {shown.baseline} in {MEASURES[shown.measure].label}, of "
        f"{_count(len(shown.by_language), 'arm')} in {_count(languages, 'language')}. "
        f"Better in {len(better)} of {len(places)} cells, in {sure[0]} of them with an interval "
        f"that leaves out 0; worse in {len(worse)}, in {sure[1]} of them so. Best: "
        f"{places[best].mean:+.2f} ({best[0]} in {best[1]}); worst: {places[worst].mean:+.2f} "
        f"({worst[0]} in {worst[1]})."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
