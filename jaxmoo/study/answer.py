"""The answer of a study in words, from its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxmoo.evaluate.measures import MEASURES
from jaxmoo.study.effects import KINDS, Verdict
from jaxmoo.study.statistics import LEAST, Estimate

__all__ = ["GROUP_NAMES", "answer", "by_kind", "half", "headline", "with_half"]

GROUP_NAMES = {
    "seen": "mean of the languages trained on",
    "unseen": "mean of the other languages",
    "worst": "worst language",
}


def half(estimate: Estimate) -> str:
    """Show half the width of a 95 % interval; nothing where there is none."""
    return f"± {estimate.half:.3f}" if math.isfinite(estimate.half) else ""


def with_half(estimate: Estimate, sign: str = "") -> str:
    """Show a mean with half of its 95 % interval.

    Args:
      estimate: the mean.
      sign: ``+`` to show a plus, too.

    Example:
      >>> with_half(Estimate(0.03, 0.004, 9, ()), "+")
      '+0.030 ± 0.009'
    """
    return f"{estimate.mean:{sign}.3f} {half(estimate)}".rstrip()


def by_kind(found: Mapping[str, Verdict]) -> dict[str, list[str]]:
    """Return the arms of each kind of verdict, the best mean first."""
    kinds: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name in sorted(found, key=lambda name: -found[name].mean_gain):
        kinds[found[name].kind].append(name)
    return kinds


def headline(found: Mapping[str, Verdict], baseline: str) -> str:
    """Say how many arms are better than the baseline.

    Args:
      found: per arm what its difference shows; at least one.
      baseline: the name of the arm that they are compared with.
    """
    better, count = by_kind(found)["better"], len(found)
    if better and count == 1:
        return f"{better[0]} is better than {baseline}"
    if better:
        verb = "is" if len(better) == 1 else "are"
        return f"{len(better)} of {count} arms {verb} better than {baseline}"
    which = next(iter(found)) if count == 1 else f"None of {count} arms"
    return f"{which} is {'not ' if count == 1 else ''}shown to be better than {baseline}"


def answer(
    found: Mapping[tuple[str, str], Mapping[str, Verdict]],
    measure: str,
    baseline: str,
    smallest: float | None,
) -> str:
    """Say which arms are better than the baseline, equivalent to it, and undecided.

    Args:
      found: verdicts per measure and group of languages, by arm.
      measure: the one that the question is answered by.
      baseline: the name of the arm that the others are compared with.
      smallest: the smallest effect worth having; None where none is set.

    Returns:
      A paragraph in Markdown.

    Example:
      >>> from jaxmoo.study.effects import verdicts
      >>> estimates = {
      ...     "cagrad": Estimate(-0.03, 0.004, 9, (0.0,) * 5),
      ...     "mgda": Estimate(0.01, 0.02, 9, (0.0,) * 5),
      ... }
      >>> found = {("nll", "seen"): verdicts(estimates, False, 0.01)}
      >>> print(answer(found, "nll", "mean", 0.01))
      **1 of 2 arms is better than mean** in NLL (mean of the languages trained on; smallest effect
      worth having: 0.01): cagrad (-0.030 ± 0.009). 1 is undecided: mgda (a gain of up to 0.035 is
      still possible).
    """
    main = found[measure, "seen"]
    worth = "" if smallest is None else f"; smallest effect worth having: {smallest:g}"
    better = by_kind(main)["better"]
    listed = "" if not better else f": {_listed(better, main)}"
    text = (
        f"**{headline(main, baseline)}** in {MEASURES[measure].label} "
        f"({GROUP_NAMES['seen']}{worth}){listed}."
    )
    parts = [text, *_others(main, smallest)]
    for group in ("unseen", "worst"):
        if (measure, group) in found:
            parts.append(_short(found[measure, group], group))
    seeds = min(len(one.estimate.values) for one in main.values())
    if seeds < LEAST:
        parts.append(f"With fewer than {LEAST} seeds (here {seeds}) nothing is tested.")
    return " ".join(parts)


def _others(found: Mapping[str, Verdict], smallest: float | None) -> list[str]:
    kinds = by_kind(found)
    parts = []
    for kind, says in (
        ("equivalent", f"equivalent within {smallest:g}" if smallest is not None else ""),
        ("not better", f"no better by {smallest:g} or more" if smallest is not None else ""),
        ("worse", "worse"),
    ):
        if kinds[kind]:
            parts.append(
                f"{len(kinds[kind])} {_are(kinds[kind])} {says}: {_listed(kinds[kind], found)}."
            )
    undecided = kinds["undecided"]
    if undecided:
        least, most = (pick(undecided, key=lambda name: found[name].gain) for pick in (min, max))
        ends = [f"{found[name].gain:.3f}" for name in (least, most)]
        if not math.isfinite(found[most].gain):
            possible = "any gain is still possible"
        elif len(undecided) == 1:
            possible = f"a gain of up to {ends[1]} is still possible"
        else:
            possible = (
                f"gains of up to {ends[0]}, of {least}, to {ends[1]}, of {most}, are still possible"
            )
        parts.append(
            f"{len(undecided)} {_are(undecided)} undecided: {', '.join(undecided)} ({possible})."
        )
    return parts


def _short(found: Mapping[str, Verdict], group: str) -> str:
    kinds = {kind: names for kind, names in by_kind(found).items() if names}
    parts = []
    for kind, names in kinds.items():
        listed = f" ({', '.join(names)})" if kind in ("better", "worse") else ""
        parts.append(f"{len(names)} {kind}{listed}")
    text = GROUP_NAMES[group]
    return f"{text[0].upper()}{text[1:]}: {', '.join(parts)}."


def _listed(names: Sequence[str], found: Mapping[str, Verdict]) -> str:
    return ", ".join(f"{name} ({with_half(found[name].estimate, '+')})" for name in names)


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
