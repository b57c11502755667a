"""Sections on the languages' gradients: conflict, stationarity, and what joint training costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoo.analysis import conflict, figures
from jaxmoo.analysis.interference import Interference
from jaxmoo.analysis.section import Section, mean, signed
from jaxmoo.analysis.stationarity import PairedGrams, Stationarity, stationarity
from jaxmoo.report.conflict_plots import conflict_heatmap
from jaxmoo.report.page import table
from jaxmoo.runs.gram_log import GramLog

__all__ = ["conflict_section", "interference_section", "stationarity_section"]

_CONFLICT = """<p>Every language gives a gradient. Two languages <em>conflict</em> in a block of
parameters when the inner product of their gradients there is negative: a step that helps one hurts
the other. The maps show cosines between gradients as the run recorded them while it trained (every
<code>train.gram_every</code> steps), the share of conflicting pairs, and how unequal the gradients
are in length.</p>
<p class="limits">Limits: each record is of one training batch, and every language has few examples
in it. Noise lengthens gradients and so draws cosines towards zero, the more the smaller the batch
(here {batch} examples per language and step); cosines of runs with different batches cannot be
compared. The two-batch estimate under “Stationarity” has no such bias.</p>"""


def conflict_section(log: GramLog, batch_size: int, directory: Path) -> Section:
    """Conflict over the steps of a run, from its records.

    Args:
      log: the records.
      batch_size: examples per language and step, to be stated.
      directory: where images go.
    """
    share = conflict.conflict_share(log.grams)
    ratio = conflict.magnitude_ratio(log.grams)
    cosine = conflict.cosines(log.grams)
    mean_cosine = conflict.mean_cosine(log.grams)
    rows = [
        {
            "step": step,
            "blocks": {b: {"conflict_share": s} for b, s in zip(log.blocks, shares, strict=True)},
        }
        for step, shares in zip(log.steps, share, strict=True)
    ]
    images = [(directory / "conflict_steps.png", "share of conflicting pairs per block and step")]
    conflict_heatmap(rows, images[0][0])

    k = len(log.languages)
    others = ~np.eye(k, dtype=bool)
    with_others = mean(np.where(others, cosine, np.nan), (1, 3))  # [T, K]
    images.append((directory / "conflict_languages.png", "each language's mean cosine over steps"))
    figures.agreement(log.steps, with_others, log.languages, images[-1][0])

    window = max(1, min(len(log.steps) // 3, 20))  # records at the start, and at the end
    first, last = log.steps[:window], log.steps[-window:]
    halves = (_steps(first), _steps(last))
    maps = {}
    for what, part_of in (("layers", conflict.layer_of), ("modules", conflict.module_of)):
        names = [part_of(block) for block in log.blocks]
        if not any(names):
            continue
        if what == "layers":
            wholes, grams = conflict.together(log.grams, log.blocks, names)
            found = conflict.cosines(grams)
        else:
            # One kind of module in all layers: the mean of its cosines, layers counting alike.
            wholes = list(dict.fromkeys(n for n in names if n))
            found = np.stack(
                [mean(cosine[:, [i for i, n in enumerate(names) if n == w]], 1) for w in wholes],
                axis=1,
            )
        maps[what] = (wholes, found)
        panels = {
            name: (mean(found[:window, i], 0), mean(found[-window:, i], 0))
            for i, name in enumerate(wholes)
        }
        path = directory / f"conflict_{what}.png"
        figures.cosine_maps(
            _thinned(panels),
            log.languages,
            path,
            heading=f"Conflict map by {what[:-1]}",
            halves=halves,
        )
        images.append((path, f"language by language cosines per {what[:-1]}"))
    start, end = (slice(None, window), slice(-window, None))
    lines = [
        [
            block,
            f"{mean(share[start, i], 0):.0%}",
            f"{mean(share[end, i], 0):.0%}",
            signed(float(mean(mean_cosine[start, i], 0))),
            signed(float(mean(mean_cosine[end, i], 0))),
            f"{mean(ratio[end, i], 0):.1f}",
        ]
        for i, block in enumerate(log.blocks[:60])
    ]
    header = ["block", f"pairs in conflict, {halves[0]}", halves[1]]
    header += [f"mean cosine, {halves[0]}", halves[1], f"longest / shortest, {halves[1]}"]
    return Section(
        "conflict",
        "Conflict over training",
        _CONFLICT.format(batch=batch_size),
        images,
        {
            "languages": log.languages,
            "blocks": log.blocks,
            "steps": log.steps,
            "examples_per_language": batch_size,
            "conflict_share": share,
            "mean_cosine": conflict.mean_cosine(log.grams),
            "magnitude_ratio": ratio,
            "cosine": cosine,
            **{f"cosine_by_{w}": {"names": n, "cosine": c} for w, (n, c) in maps.items()},
        },
        [table(header, lines)],
    )


_STATIONARITY = """<p>A model is <em>Pareto-stationary</em> when some convex combination of the
languages' gradients is zero: then no direction improves them all. Shown is the norm of the shortest
combination (found by the exact solver that MGDA uses) over the norm of the mean gradient, for the
whole model with one set of weights, and for every block with weights of its own. The blocks'
values, taken together, are never larger than the whole model's: a model whose blocks are all
stationary need not be stationary itself.</p>
<p>All models are measured on the same two batches of {examples} training examples per language
that share no example. Hollow: one batch alone. Filled: products of gradients of different batches,
in which the noise averages out.</p>
<p class="limits">Limits: it is the training loss, on {double} examples per language, without the
optimiser's scaling of the gradient. A minimal norm is relative to the length of the gradients: the
shortest gradient alone bounds it, so a language with nothing left to learn makes a model look
stationary. The weights are chosen on the data they are judged on. An estimate of 0 means that the
product between the batches was not positive: what is left is noise. Cosines that cannot be told
from noise are left out.</p>"""


def stationarity_section(
    measured: Mapping[str, PairedGrams], languages: Sequence[str], examples: int, directory: Path
) -> Section:
    """Stationarity of models, and cosines with and without noise.

    Args:
      measured: per model its Gram matrices.
      languages: the K languages.
      examples: per language and batch.
      directory: where images go.
    """
    found = {model: _by_layer(grams) for model, grams in measured.items()}
    parts = {
        model: {
            block: stationarity(grams.within[:, i], grams.across[i])
            for i, block in enumerate(grams.blocks)
        }
        for model, grams in measured.items()
    }
    images = [(directory / "stationarity.png", "minimal norm over mean norm")]
    figures.stationarity_dots(found, images[0][0])
    images.append((directory / "cosines.png", "cosines with and without noise"))
    figures.cosine_maps(
        {m: (of["whole"].cosine, of["whole"].cosine_across) for m, of in found.items()},
        languages,
        images[-1][0],
        heading="Cosines of the whole model's gradients",
        halves=("one batch", "two-batch estimate"),
    )
    last = list(measured)[-1]
    kinds = list(dict.fromkeys(m for b in measured[last].blocks if (m := conflict.module_of(b))))
    if len(kinds) > 1:
        images.append((directory / "cosines_modules.png", "cosines by module"))
        figures.cosine_maps(
            {kind: _mean_of_kind(parts[last], kind) for kind in kinds},
            languages,
            images[-1][0],
            heading=f"Cosines by kind of module, {last}",
            halves=("one batch", "two-batch estimate"),
        )
    lines = []
    for model, of in found.items():
        whole = of["whole"]
        blocks = [s for name, s in of.items() if name != "whole"]
        together = float(np.sqrt(sum(s.min_norm**2 for s in blocks)))
        lines.append(
            [
                model,
                f"{whole.min_norm:.4g}",
                f"{together:.4g}",
                f"{whole.mean_norm:.4g}",
                f"{whole.ratio:.3f}",
                f"{whole.ratio_across:.3f}",
                signed(_pair_mean(whole.cosine)),
                signed(_pair_mean(whole.cosine_across)),
            ]
        )
    header = ["model", "minimal norm, whole", "blocks together", "mean gradient"]
    header += ["ratio, whole", "two-batch estimate", "mean cosine, one batch", "two-batch estimate"]
    return Section(
        "stationarity",
        "Stationarity",
        _STATIONARITY.format(examples=examples, double=2 * examples),
        images,
        {
            "languages": languages,
            "examples_per_language_and_batch": examples,
            "models": {
                model: {
                    "loss": measured[model].losses,
                    "blocks": {block: _numbers(s) for block, s in (found[model] | of).items()},
                }
                for model, of in parts.items()
            },
        },
        [table(header, lines)],
    )


def _by_layer(grams: PairedGrams) -> dict[str, Stationarity]:
    """The whole model, every layer, and what belongs to no layer."""
    names = [conflict.layer_of(block) or block.split(".")[0] for block in grams.blocks]
    blocks, within = conflict.together(grams.within, grams.blocks, names)
    _, across = conflict.together(grams.across, grams.blocks, names)
    whole = stationarity(grams.within.sum(1), grams.across.sum(0))
    return {"whole": whole} | {
        block: stationarity(within[:, i], across[i]) for i, block in enumerate(blocks)
    }


def _mean_of_kind(blocks: Mapping[str, Stationarity], kind: str) -> tuple[np.ndarray, np.ndarray]:
    mine = [s for name, s in blocks.items() if conflict.module_of(name) == kind]
    return (
        mean(np.stack([s.cosine for s in mine]), 0),
        mean(np.stack([s.cosine_across for s in mine]), 0),
    )


def _numbers(found: Stationarity) -> dict[str, Any]:
    return dataclasses.asdict(found) | {"ratio": found.ratio, "ratio_across": found.ratio_across}


_INTERFERENCE = """<p>A language's <em>interference</em> is its held-out loss after training all
languages together, minus its loss after training on it alone for as many steps from the same model
with the same settings. Positive: the others have cost it something. Negative: they have helped.</p>
<p class="limits">Limits: one run each, so differences that another seed would turn round look the
same as real ones. In the joint run a step also moves for the other languages, so it sees more
examples in all; what is equal is each language's own. Both runs use one learning rate, which need
not suit both.</p>"""


def interference_section(found: Mapping[str, Interference], directory: Path) -> Section:
    """Interference per language.

    Args:
      found: per language.
      directory: where images go.
    """
    path = directory / "interference.png"
    figures.interference_bars(found, path)
    lines = [
        [code, f"{x.base:.3f}", f"{x.single:.3f}", f"{x.joint:.3f}", signed(x.value, 3)]
        for code, x in found.items()
    ]
    return Section(
        "interference",
        "Negative interference",
        _INTERFERENCE,
        [(path, "joint minus single loss per language")],
        {
            code: {"base": x.base, "single": x.single, "joint": x.joint, "interference": x.value}
            for code, x in found.items()
        },
        [table(["language", "base", "alone", "together", "interference"], lines)],
    )


def _thinned(panels: Mapping[str, Any], most: int = 15) -> dict[str, Any]:
    """At most so many panels, evenly chosen, the first and the last among them."""
    names = list(panels)
    if len(names) > most:
        names = [names[i] for i in np.linspace(0, len(names) - 1, most).round().astype(int)]
    return {name: panels[name] for name in names}


def _steps(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _pair_mean(cosine: np.ndarray) -> float:
    return float(mean(cosine[np.triu_indices(len(cosine), 1)], 0))
