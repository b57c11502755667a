"""The page that shows a run: one HTML file with its plots and numbers in it."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxmoo.files.outputs import typed_path
from jaxmoo.report.conflict_plots import conflict_heatmap, language_cosines
from jaxmoo.report.loss_plot import loss_curves
from jaxmoo.report.page import image, page, table
from jaxmoo.report.score_plots import Score, before_after, held_out_curves

__all__ = ["Reply", "write_report"]

_INTRODUCTION = """<p>Negative log-likelihood (NLL, in nats per token) and bits per byte of held-out
replies, before and after training: lower is better.</p>"""


class Reply(Protocol):
    """What a page needs to know of a model's reply."""

    @property
    def prompt(self) -> str:
        """The text before it."""
        ...

    @property
    def reference(self) -> str:
        """The reply in the data."""
        ...

    @property
    def reply(self) -> str:
        """The model's."""
        ...


def write_report(
    directory: str | Path,
    *,
    rows: Sequence[Mapping[str, Any]],
    seen: Sequence[str],
    unseen: Sequence[str] = (),
    before: Mapping[str, Score],
    after: Mapping[str, Score],
    evaluations: Mapping[int, Mapping[str, Score]] | None = None,
    replies: Mapping[str, Sequence[tuple[Reply, Reply]]] | None = None,
    facts: Mapping[str, str] | None = None,
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
      evaluations: held-out scores by step; drawn if there are more than two.
      replies: per language, pairs of what the model said before and after training.
      facts: what was run: names and texts.
      heading: title of the page.

    Returns:
      The files written, the page first.

    Raises:
      ConfigError: matplotlib is not installed.
      DataError: a language has no score.
    """
    directory = typed_path(directory)
    drawn: dict[str, str] = {}  # what a picture shows, by its file

    def draw(name: str, alt: str, plot: Callable[..., object], *given: Any) -> str:
        path = directory / f"{name}.png"
        plot(*given, path)
        drawn[path.name] = alt
        return image(path, alt)

    change = _means(before, after, seen, unseen)
    shown = [
        _INTRODUCTION,
        _table(before, after, seen, unseen),
        draw(
            "before_after",
            f"Held-out loss of every language before and after training. {change}",
            before_after,
            *(before, after, seen, unseen),
        ),
    ]
    if evaluations is not None and len(evaluations) > 2:
        alt = f"Held-out loss of every language after steps {_list(evaluations)}."
        shown.append(draw("held_out", alt, held_out_curves, evaluations, seen, unseen))
    if any(row.get("loss") for row in rows):
        shown.append(draw("loss", _of_loss(rows, seen), loss_curves, rows, seen))
    if len(seen) > 1 and any(row.get("blocks") for row in rows):
        alt = "Share of pairs of languages whose gradients conflict, by block and step. "
        shown.append(draw("conflict", alt + _of_conflict(rows), conflict_heatmap, rows))
    if len(seen) > 1 and any(row.get("cosine") for row in rows):
        alt = "Cosines between the languages' gradients, in the first and the last steps."
        shown.append(draw("cosines", alt, language_cosines, rows, seen))
    if replies:
        shown.append(_replies(replies, unseen))
    if facts:
        shown += ["<h2>What was run</h2>", table([], list(facts.items()), "settings")]
    index = directory / "index.html"
    index.write_text(page(heading, "\n".join(shown)), encoding="utf-8")
    return [index, *(directory / name for name in drawn)]


def _means(
    before: Mapping[str, Score],
    after: Mapping[str, Score],
    seen: Sequence[str],
    unseen: Sequence[str],
) -> str:
    """How the means changed, in words."""

    def mean(scores: Mapping[str, Score], codes: Sequence[str]) -> float:
        return sum(scores[code].nll for code in codes) / len(codes)

    groups = {"trained on": seen, "not trained on": unseen}
    return " ".join(
        f"Mean of the {len(codes)} languages {name}: {mean(before, codes):.3f} before, "
        f"{mean(after, codes):.3f} after, in nats per token."
        for name, codes in groups.items()
        if codes
    )


def _of_loss(rows: Sequence[Mapping[str, Any]], seen: Sequence[str]) -> str:
    with_loss = [row["loss"] for row in rows if row.get("loss")]
    means = [
        sum(known) / len(known)
        for losses in (with_loss[0], with_loss[-1])
        if (known := [x for code in seen if (x := losses.get(code)) is not None])
    ]
    change = f": mean {means[0]:.3f} at first, {means[-1]:.3f} at last" if means else ""
    return f"Training loss of every language by step{change}, in nats per token."


def _of_conflict(rows: Sequence[Mapping[str, Any]]) -> str:
    shares = [share for row in rows if (share := row.get("conflict_share")) is not None]
    return f"Over all blocks, {sum(shares) / len(shares):.0%} on average." if shares else ""


def _list(steps: Iterable[int]) -> str:
    return ", ".join(map(str, steps))


def _replies(replies: Mapping[str, Sequence[tuple[Reply, Reply]]], unseen: Sequence[str]) -> str:
    """Prompts with the replies before and after, side by side; each in its own direction."""

    def cell(text: str) -> str:
        return f'<td dir="auto">{html.escape(text.strip())}</td>'

    lines = []
    for code, pairs in replies.items():
        label = html.escape(code) + (" (unseen)" if code in unseen else "")
        for old, new in pairs:
            texts = (new.prompt, new.reference, old.reply, new.reply)
            lines.append(f"<tr><td>{label}</td>{''.join(map(cell, texts))}</tr>")
    return (
        "<h2>Sample replies</h2>\n<p>To the first held-out prompts of every language, by the "
        "likeliest tokens, cut off where they grow long. Samples show what a number means; they "
        'are no measure.</p>\n<div class="wide"><table class="texts"><thead><tr><th>language</th>'
        "<th>prompt</th><th>reply in the data</th><th>before training</th><th>after training</th>"
        "</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )


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
        '<div class="wide"><table><thead><tr><th>language</th><th>NLL before</th><th>after</th>'
        "<th>change</th>"
        "<th>bits/byte before</th><th>after</th><th>change</th></tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
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
