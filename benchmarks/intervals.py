"""How often intervals hold the truth, by simulation: those of evaluations and those of studies.

    python benchmarks/intervals.py              # five minutes of one core
    python benchmarks/intervals.py --trials 20  # a smoke test

Draws examples (or seeds, languages and examples) whose true difference is known, and counts how
often 95 % intervals hold it. Beside the intervals that jaxmoo gives stand others that it might have
given. `--mixed` also fits mixed models with statsmodels, which is slow. Prints Markdown; ``--json``
keeps the numbers.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from common import Pages, bullets, environment, markdown
from scipy import stats

from jaxmoo.evaluate.intervals import (
    Differences,
    mean_proportion_difference,
    studentised_mean,
)
from jaxmoo.study.statistics import Influence, estimate, mean_interval

SIZES = (16, 50, 200)
RESAMPLES = 500
MANY = 4_000_000  # examples whose mean stands for the truth
# How often the second model alone is right, and the first one alone.
SHARES = ((0.2, 0.1), (0.05, 0.02), (0.01, 0.0))
LANGUAGES = 8
# What differences of likelihoods per token may look like, in nats.
TAILS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: 0.3 * rng.normal(size=n),
    "heavy tails (t, 3 d.f.)": lambda rng, n: 0.2 * rng.standard_t(3, size=n),
    "gains (exponential)": lambda rng, n: -0.2 * rng.exponential(size=n),
    "gains (lognormal)": lambda rng, n: -0.2 * rng.lognormal(size=n),
}
# Standard deviations: of seeds, languages, both; of examples in all languages and runs, in one
# language, in one seed, in one run.
STUDIES = {
    "seeds": (0.02, 0.0, 0.01, 0.0, 0.0, 0.0, 0.2),
    "languages": (0.0, 0.02, 0.01, 0.0, 0.2, 0.0, 0.2),
    "parallel examples": (0.005, 0.005, 0.005, 0.3, 0.1, 0.1, 0.1),
    "all of them": (0.02, 0.02, 0.02, 0.1, 0.2, 0.1, 0.3),
    "runs alone": (0.0, 0.0, 0.02, 0.0, 0.0, 0.0, 0.3),
}
DESIGNS = ((3, 8, 50), (3, 8, 200), (5, 8, 200), (5, 24, 200))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=500, help="of each simulation (500)")
    parser.add_argument("--mixed", action="store_true", help="also mixed models, 100 trials each")
    parser.add_argument("--json", help="file for the numbers")
    flags = parser.parse_args()
    packages = ["numpy", "scipy", *(["statsmodels"] if flags.mixed else [])]
    pages = Pages(flags.json, environment(1, packages))
    print(bullets(pages.about))
    for title, rows in (
        ("Difference of accuracies", accuracies(flags.trials)),
        ("Difference of likelihoods", likelihoods(flags.trials)),
        ("Studies", studies(flags.trials, flags.mixed)),
        ("Equivalence", equivalence(flags.trials)),
    ):
        found: list[list[str]] = []
        for row in rows:
            pages.add({"table": title, **row})
            found = found or [[*row]]
            found.append([str(value) for value in row.values()])
        print(f"\n### {title}\n\n{markdown(found)}", flush=True)


class Counts:
    """How often intervals of several kinds hold the truth."""

    def __init__(self) -> None:
        self.held: dict[str, list[bool]] = {}
        self.widths: dict[str, list[float]] = {}

    def add(self, kind: str, low: float, high: float, truth: float) -> None:
        self.held.setdefault(kind, []).append(low - 1e-12 <= truth <= high + 1e-12)
        self.widths.setdefault(kind, []).append(high - low)

    def shares(self) -> dict[str, str]:
        return {kind: f"{100 * np.mean(held):.1f} %" for kind, held in self.held.items()}

    def width(self, kind: str) -> str:
        return f"{np.median(self.widths[kind]):.3f}"


def accuracies(trials: int) -> Iterator[dict[str, object]]:
    """One language, and the mean over several with the same sentences."""
    rng = np.random.default_rng(0)
    for gained, lost in SHARES:
        for n in SIZES:
            for number in (1, LANGUAGES):
                counts = Counts()
                for _ in range(trials):
                    values = _answers(rng, gained, lost, n, number)
                    languages = [Differences(one, np.ones(n), range(n)) for one in values]
                    counts.add("percentile", *_percentile(rng, values.mean(0)), gained - lost)
                    counts.add("jaxmoo", *mean_proportion_difference(languages), gained - lost)
                yield {
                    "only B right, only A right": f"{gained:g}, {lost:g}",
                    "examples": n,
                    "mean over languages": number,
                    **counts.shares(),
                    "its width": counts.width("jaxmoo"),
                }


def _answers(
    rng: np.random.Generator, gained: float, lost: float, n: int, languages: int
) -> np.ndarray:
    """Differences [languages, examples] of parallel sentences, alike in half of the languages."""
    alike = rng.random((languages, n)) < 0.5
    chance = np.where(alike, rng.random(n), rng.random((languages, n)))
    return (chance < gained).astype(float) - (chance > 1 - lost)


def _percentile(rng: np.random.Generator, values: np.ndarray) -> tuple[float, float]:
    """The percentile bootstrap of a mean."""
    n = len(values)
    means = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) @ values / n
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def likelihoods(trials: int) -> Iterator[dict[str, object]]:
    rng = np.random.default_rng(1)
    for name, draw in TAILS.items():
        # The truth is that of a large sample.
        many = np.random.default_rng(2)
        tokens = _tokens(many, MANY)
        truth = float(np.sum(draw(many, len(tokens)) * np.sqrt(10 * tokens)) / np.sum(tokens))
        for n in SIZES:
            counts = Counts()
            for _ in range(trials):
                below = _tokens(rng, n)
                values = draw(rng, n) * np.sqrt(10 * below)
                one = Differences(values, below, range(n))
                found = stats.bootstrap(
                    (values, below), _ratio, paired=True, n_resamples=RESAMPLES,
                    method="percentile", rng=rng,
                )  # fmt: skip
                counts.add("percentile", *found.confidence_interval, truth)
                found = stats.bootstrap(
                    (values, below), _ratio, paired=True, n_resamples=0, method="BCa",
                    bootstrap_result=found, rng=rng,
                )  # fmt: skip
                counts.add("BCa", *found.confidence_interval, truth)
                mean = _ratio(values, below)
                error = math.sqrt(np.sum((values - mean * below) ** 2) * n / (n - 1)) / below.sum()
                half = float(stats.t.ppf(0.975, n - 1)) * error
                counts.add("Student's t", mean - half, mean + half, truth)
                ends = studentised_mean([one], resamples=RESAMPLES, seed=int(rng.integers(1 << 30)))
                counts.add("jaxmoo", *ends, truth)
            yield {
                "differences": name,
                "examples": n,
                **counts.shares(),
                "its width": counts.width("jaxmoo"),
            }


def _tokens(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.clip(np.round(rng.lognormal(2.3, 0.7, n)), 2, 120)


def _ratio(values: np.ndarray, below: np.ndarray, axis: int = -1) -> np.ndarray:
    return values.sum(axis) / below.sum(axis)


def studies(trials: int, mixed: bool) -> Iterator[dict[str, object]]:
    for name, deviations in STUDIES.items():
        for seeds, languages, n in DESIGNS:
            rng = np.random.default_rng([3, seeds, languages, n])
            counts = Counts()
            for trial in range(trials):
                scores, of_languages = _study(rng, deviations, seeds, languages, n)
                differences, influences = _parts(scores)
                plain = mean_interval([*differences.mean(1)])
                counts.add("seeds alone (t)", plain.low, plain.high, 0.0)
                if mixed and trial < 100 and n == 200 and languages == 8:
                    counts.add("mixed model", *_mixed(differences), 0.0)
                drawn = estimate(differences, influences)
                counts.add("jaxmoo", drawn.low, drawn.high, 0.0)
                given = estimate(differences, influences, other_languages=False)
                counts.add("jaxmoo, given languages", given.low, given.high, of_languages)
            shares = counts.shares()
            if mixed:
                shares = {"seeds alone (t)": "", "mixed model": ""} | shares
            yield {
                "what varies": name,
                "seeds": seeds,
                "languages": languages,
                "examples": n,
                **shares,
                "its width": counts.width("jaxmoo"),
            }


def _study(
    rng: np.random.Generator, deviations: tuple[float, ...], seeds: int, languages: int, n: int
) -> tuple[np.ndarray, float]:
    """Differences [seeds, languages, examples], whose mean is 0, and that of these languages."""
    shapes = (
        (seeds, 1, 1), (1, languages, 1), (seeds, languages, 1), (1, 1, n), (1, languages, n),
        (seeds, 1, n), (seeds, languages, n),
    )  # fmt: skip
    parts = [d * rng.normal(size=shape) for d, shape in zip(deviations, shapes, strict=True)]
    return sum(parts), float(parts[1].mean())


def _parts(scores: np.ndarray) -> tuple[np.ndarray, list[Influence]]:
    n = scores.shape[2]
    differences = scores.mean(2)
    values = (scores - differences[:, :, None]) / n
    return differences, [Influence(values[:, i], range(n)) for i in range(scores.shape[1])]


def _mixed(differences: np.ndarray) -> tuple[float, float]:
    """Of a mixed model with crossed effects of seeds and languages (REML, normal intervals)."""
    import pandas
    import statsmodels.formula.api as formulas

    seeds, languages = np.indices(differences.shape)
    frame = pandas.DataFrame(
        {"y": differences.ravel(), "s": seeds.ravel(), "l": languages.ravel(), "one": 1}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = formulas.mixedlm(
            "y ~ 1", frame, groups="one", vc_formula={"s": "0 + C(s)", "l": "0 + C(l)"}
        ).fit(reml=True)
        low, high = fit.conf_int().loc["Intercept"]
    return float(low), float(high)


def equivalence(trials: int) -> Iterator[dict[str, object]]:
    """How often arms are called equivalent, by their true difference."""
    smallest = 0.05
    for seeds, languages, n in DESIGNS[1:]:
        for true in (smallest, 0.0):
            rng = np.random.default_rng([4, seeds, languages])
            called = 0
            for _ in range(trials):
                scores, _ = _study(rng, STUDIES["all of them"], seeds, languages, n)
                called += estimate(*_parts(scores + true)).p_equivalent(smallest) < 0.05
            yield {
                "seeds": seeds,
                "languages": languages,
                "examples": n,
                "smallest effect": smallest,
                "true difference": true,
                "called equivalent": f"{100 * called / trials:.1f} %",
            }


if __name__ == "__main__":
    main()
