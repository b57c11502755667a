"""Markdown of the measurements."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from common import bullets, markdown, milliseconds, plain, scientific
from contestants import METHODS


def times(row: dict) -> list[str]:
    """Method, times, ratios."""
    whos = ("jaxmoo", "TorchJD", "LibMTL")
    measured = [milliseconds(row["ms"][who]) if who in row["ms"] else "" for who in whos]
    return [f"`{row['method']}`", *measured, ratio(row, "TorchJD"), ratio(row, "LibMTL")]


def ratio(row: dict, who: str) -> str:
    if who not in row["ratio"]:
        return ""
    low, high = row["spread"][who]
    return f"{plain(row['ratio'][who])}× ({plain(low)}–{plain(high)})"


def matrix_report(rows: list[dict]) -> str:
    """One table per n; methods by K."""
    parts = [
        "Every cell: jaxmoo's time, then how many times as long TorchJD took, then LibMTL's "
        "formula (medians over rounds of the ratio within a round; a dash where there is none)."
    ]
    for n in sorted({r["n"] for r in rows}):
        parts.append(f"n = {n:,}")
        parts.append(pivot([r for r in rows if r["n"] == n], lambda r: f"K = {r['k']}"))
    return "\n\n".join(parts)


def pivot(rows: list[dict], column: Callable[[dict], str]) -> str:
    columns = list(dict.fromkeys(map(column, rows)))
    table = [["method", *columns]]
    for name in dict.fromkeys(r["method"] for r in rows):
        mine = {column(r): r for r in rows if r["method"] == name}
        table.append([f"`{name}`", *(cell(mine[c]) for c in columns)])
    return markdown(table)


def cell(row: dict) -> str:
    ratios = [row["ratio"].get(who) for who in ("TorchJD", "LibMTL")]
    shown = ["–" if ratio is None else f"{plain(ratio)}×" for ratio in ratios]
    return f"{milliseconds(row['ms']['jaxmoo'])} ms, {', '.join(shown)}"


def blocks_report(rows: list[dict]) -> str:
    header = ["method", "jaxmoo ms", "TorchJD ms", "LibMTL ms"]
    table = [[*header, "TorchJD / jaxmoo", "LibMTL / jaxmoo"]]
    for row in rows:
        table.append(times(row))
    return markdown(table)


def solves_report(rows: list[dict]) -> str:
    """One table per number of blocks; methods by K."""
    parts = ["Cells as above; LibMTL's formulas start from the matrix and are left out."]
    for blocks in sorted({r["blocks"] for r in rows}):
        parts.append(f"{blocks} block{'s' * (blocks > 1)}")
        mine = [r for r in rows if r["blocks"] == blocks]
        parts.append(pivot(mine, lambda r: f"K = {r['k']}").replace(", –", ""))
    return "\n\n".join(parts)


def everything(measured: dict[str, dict]) -> str:
    """The whole page, of what was measured: rows and circumstances of every section."""
    sections = {
        "accuracy": ("Accuracy", accuracy_report),
        "matrix": ("One matrix [K, n] to one update [n]", matrix_report),
        "blocks": ("32 blocks of 1e5 parameters in one call, K = 8", blocks_report),
        "solves": ("Solves alone: Gram matrices to weights", solves_report),
    }
    parts = [f"### Goals\n\n{goals_report({s: m['rows'] for s, m in measured.items()})}"]
    for section, found in measured.items():
        title, page = sections[section]
        parts.append(f"### {title}\n\n{bullets(found['about'])}\n\n{page(found['rows'])}")
    return "\n\n".join(parts)


def goals_report(results: dict[str, list[dict]]) -> str:
    """Every goal, with what was measured."""
    lines = []

    def judge(goal: str, rows: list[dict], least: float) -> None:
        if not rows:
            return
        missed = sorted(
            (r for r in rows if r["ratio"]["TorchJD"] < least), key=lambda r: r["ratio"]["TorchJD"]
        )
        misses = ", ".join(
            f"`{r['method']}` K = {r['k']} {plain(r['ratio']['TorchJD'])}×" for r in missed
        )
        reached = f"{len(rows) - len(missed)} of {len(rows)} cells reach it"
        lines.append(f"- {goal}: " + (f"{reached}; missed by {misses}." if missed else "met."))

    accuracy = [r for r in results.get("accuracy", []) if r["who"] == "jaxmoo"]
    if accuracy:
        worst = max(accuracy, key=lambda r: r["error"])
        within = np.mean([r["error"] <= 1e-5 for r in accuracy])
        lines.append(
            f"- Error at most 1e-5 in float32: {'met' if worst['error'] <= 1e-5 else 'missed'}. "
            f"Worst {worst['error']:.1e} (`{worst['method']}`, {worst['family']}, K = "
            f"{worst['k']}); {within:.1%} of {len(accuracy)} updates reach it."
        )
    large = [r for r in results.get("matrix", []) if r["n"] == 10**7]
    judge("Never slower than TorchJD at n = 1e7", large, 1.0)
    blocks = [r for r in results.get("blocks", []) if r["n"] == 100_000]
    judge("At least 5 times faster over 32 blocks of 1e5 at K = 8", blocks, 5.0)
    solves = [r for r in results.get("solves", []) if r["blocks"] == 32]
    judge("At least 20 times faster for 32 solves alone", solves, 20.0)
    return "\n".join(lines)


def accuracy_report(rows: list[dict]) -> str:
    names = [m.name for m in METHODS if m.exact is not None]
    header = ["method", "jaxmoo median", "worst", "TorchJD median", "worst", "LibMTL median"]
    header += ["worst", "opposed: jaxmoo", "TorchJD", "LibMTL"]
    table = []
    for name in names:
        cells = [f"`{name}`"]
        opposed = []
        for who in ("jaxmoo", "TorchJD", "LibMTL"):
            mine = [r for r in rows if r["method"] == name and r["who"] == who]
            if not mine:
                cells += ["", ""]
                opposed.append("")
                continue
            error = np.array([r["error"] for r in mine])
            cells += [scientific(np.median(error)), scientific(error.max())]
            promise = next(m for m in METHODS if m.name == name).non_conflicting
            share = np.mean([r["cosine"] < -1e-3 for r in mine])
            opposed.append(f"{share:.1%}" if promise else "")
        table.append(cells + opposed)
    ours = [r for r in rows if r["who"] == "jaxmoo"]
    worst_by = [["family", *(f"K = {k}" for k in sorted({r["k"] for r in rows}))]]
    for family in dict.fromkeys(r["family"] for r in rows):
        line = [family]
        for k in sorted({r["k"] for r in rows}):
            cell = [r for r in ours if r["family"] == family and r["k"] == k]
            line.append(scientific(max(r["error"] for r in cell)))
        worst_by.append(line)
    return (
        markdown([header, *table])
        + "\n\nWorst error of jaxmoo over all methods:\n\n"
        + markdown(worst_by)
    )
