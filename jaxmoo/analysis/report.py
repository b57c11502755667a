"""The page that shows a run: one HTML file with its plots and numbers in it."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmoo.analysis.plots import (
    Score,
    before_after,
    conflict_heatmap,
    language_cosines,
    loss_curves,
)

__all__ = ["write_report"]

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<style>
  body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1020px;
         margin: 2rem auto; padding: 0 1rem; }}
  h1 {{ font-size: 1.5rem; }}
  img {{ max-width: 100%; display: block; margin: 2rem 0; }}
  table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
  th, td {{ padding: .2rem .9rem; text-align: right; }}
  th:first-child, td:first-child {{ text-align: left; }}
  thead th {{ border-bottom: 1px solid #999; }}
  tr.mean td {{ border-top: 1px solid #ccc; border-bottom: 1px solid #999; font-weight: 600; }}
  .better {{ color: #006b4f; }}
  .worse {{ color: #b23a00; }}
</style>
<h1>{heading}</h1>
<p>Negative log-likelihood (NLL, in nats per token) and bits per byte of held-out replies, before
and after training: lower is better.</p>
{table}
{images}
</html>
"""


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
    directory = Path(directory)
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
    page = directory / "index.html"
    page.write_text(
        _PAGE.format(
            heading=html.escape(heading),
            table=_table(before, after, seen, unseen),
            images="\n".join(_embedded(path) for path in images),
        ),
        encoding="utf-8",
    )
    return [page, *images]


def _embedded(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{path.stem}" src="data:image/png;base64,{data}">'


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
