"""The page that shows a run: one HTML file with its plots and numbers in it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmoo.files.outputs import typed_path
from jaxmoo.report.page import image, page
from jaxmoo.report.plots import (
    Score,
    before_after,
    conflict_heatmap,
    language_cosines,
    loss_curves,
)

__all__ = ["write_report"]

_INTRODUCTION = """<p>Negative log-likelihood (NLL, in nats per token) and bits per byte of held-out
replies, before and after training: lower is better.</p>"""


def write_report(
    directory: str | Path,
    *,
    rows: Sequence[Mapping[str, Any]],
    seen: Sequence[str],
    unseen: Sequence[str] = (),
    before: Mapping[str, Score],
    after: Mapping[str, Score],
    heading: str = "Fine-tuning run",
) -> list[Path]:
    """Draw the plots of a run and a page, ``index.html``, that holds them all.

    A plot for which the rows have no data, such as conflict in a run with one language, is left
    out. The page is one file that can be passed on by itself.

    Args:
      directory: where to; made if need be.
      rows: metrics of the run's steps, from :func:`jaxmoo.train.metrics.read_metrics`.
      seen: languages trained on.
      unseen: languages only evaluated.
      before: held-out scores before training.
      after: held-out scores after it.
      heading: title of the page.

    Returns:
      The files written, the page first.

    Raises:
      ConfigError: matplotlib is not installed.
      DataError: a language has no score.
    """
    directory = typed_path(directory)
    images = [directory / "before_after.png"]
    before_after(before, after, seen, unseen, images[0])
    if any(row.get("loss") for row in rows):
        images.append(directory / "loss.png")
        loss_curves(rows, seen, images[-1])
    if len(seen) > 1 and any(row.get("blocks") for row in rows):
        images.append(directory / "conflict.png")
        conflict_heatmap(rows, images[-1])
    if len(seen) > 1 and any(row.get("cosine") for row in rows):
        images.append(directory / "cosines.png")
        language_cosines(rows, seen, images[-1])
    index = directory / "index.html"
    shown = [_INTRODUCTION, _table(before, after, seen, unseen), *map(image, images)]
    index.write_text(page(heading, "\n".join(shown)), encoding="utf-8")
    return [index, *images]


def _table(
    before: Mapping[str, Score],
    after: Mapping[str, Score],
    seen: Sequence[str],
    unseen: Sequence[str],
) -> str:
    lines = []
    for group, codes in (("seen", seen), ("unseen", unseen)):
        if not codes:
            continue
        for code in codes:
            label = html.escape(code) + (" (unseen)" if group == "unseen" else "")
            lines.append(_line(label, [before[code]], [after[code]]))
        olds, news = [before[c] for c in codes], [after[c] for c in codes]
        lines.append(_line(f"{group} mean", olds, news, "mean"))
    return (
        "<table><thead><tr><th>language</th><th>NLL before</th><th>after</th><th>change</th>"
        "<th>bits/byte before</th><th>after</th><th>change</th></tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table>"
    )


def _line(label: str, olds: Sequence[Score], news: Sequence[Score], css: str = "") -> str:
    cells = [f"<td>{label}</td>"]
    for measure in ("nll", "bits_per_byte"):
        old, new = (sum(getattr(s, measure) for s in group) / len(group) for group in (olds, news))
        change = f"{new - old:+.3f}".replace("-", "\N{MINUS SIGN}")
        verdict = "better" if new < old else "worse" if new > old else ""
        cells += [f"<td>{old:.3f}</td>", f"<td>{new:.3f}</td>"]
        cells.append(f'<td class="{verdict}">{change}</td>')
    return f'<tr class="{css}">{"".join(cells)}</tr>'
