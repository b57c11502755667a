"""What an analysis says of each measure: figures, tables, explanations and numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoo.analysis import conflict, figures, neurons
from jaxmoo.analysis.interference import Interference
from jaxmoo.analysis.page import image, table
from jaxmoo.analysis.plots import conflict_heatmap
from jaxmoo.analysis.representations import Representations
from jaxmoo.analysis.separability import METRICS, Separability, separability
from jaxmoo.analysis.stationarity import PairedGrams, Stationarity, stationarity
from jaxmoo.train.grams import GramLog

__all__ = [
    "Section",
    "conflict_section",
    "interference_section",
    "neurons_section",
    "separability_section",
    "stationarity_section",
]


@dataclasses.dataclass(frozen=True)
class Section:
    """One measure.

    Attributes:
      name: of the measure.
      heading: for a person.
      text: paragraphs, as HTML: what is measured, then its limits.
      images: files and what they show, in order.
      tables: as HTML.
      numbers: everything measured, as JSON holds it (NumPy arrays allowed).
    """

    name: str
    heading: str
    text: str
    images: Sequence[tuple[Path, str]]
    numbers: dict[str, Any]
    tables: Sequence[str] = ()

    def html(self) -> str:
        """Return the section as HTML."""
        shown = [f'<h2 id="{self.name}">{self.heading}</h2>', self.text, *self.tables]
        return "\n".join([*shown, *(image(path, alt) for path, alt in self.images)])


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
    with_others = _mean(np.where(others, cosine, np.nan), (1, 3))  # [T, K]
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
                [_mean(cosine[:, [i for i, n in enumerate(names) if n == w]], 1) for w in wholes],
                axis=1,
            )
        maps[what] = (wholes, found)
        panels = {
            name: (_mean(found[:window, i], 0), _mean(found[-window:, i], 0))
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
            f"{_mean(share[start, i], 0):.0%}",
            f"{_mean(share[end, i], 0):.0%}",
            _signed(_mean(conflict.mean_cosine(log.grams)[start, i], 0)),
            _signed(_mean(conflict.mean_cosine(log.grams)[end, i], 0)),
            f"{_mean(ratio[end, i], 0):.1f}",
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
                _signed(_pair_mean(whole.cosine)),
                _signed(_pair_mean(whole.cosine_across)),
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
        _mean(np.stack([s.cosine for s in mine]), 0),
        _mean(np.stack([s.cosine_across for s in mine]), 0),
    )


def _numbers(found: Stationarity) -> dict[str, Any]:
    return dataclasses.asdict(found) | {"ratio": found.ratio, "ratio_across": found.ratio_across}


_NEURONS = """<p>A neuron of an MLP is active in a token where its gate is positive. The entropy of
its activation probabilities over languages, normalised to sum 1, is low when it serves few
languages (language activation probability entropy, LAPE; Tang et al. 2024,
<em>Language-Specific Neurons</em>). In the base model, of the neurons that are active in some
language more often than 95 % of all probabilities (here above {probability:.3f}), the 1 % of all
neurons with the lowest entropy are taken (here {entropy:.3f} nats and less); a neuron is specific
to every language in which it passes the first threshold. Other models are compared at these
thresholds of the base model: at their own, their numbers would be the same by construction.</p>
<p class="limits">Limits: probabilities come from {tokens} tokens per language, far fewer than in
the paper, and from one kind of text. Of the base model's neurons, halves of the sentences agree on
{agreement:.0%} (intersection over union): numbers that change by less than such noise mean nothing.
Only gated MLPs are looked at. The first token of a text and special tokens are left out.</p>"""


def neurons_section(
    measured: Mapping[str, Representations],
    languages: Sequence[str],
    unseen: Sequence[str],
    directory: Path,
) -> Section:
    """Language-specific neurons of models, at the thresholds of the first.

    Args:
      measured: per model its activations; the base model first.
      languages: the K languages.
      unseen: those that were not trained on.
      directory: where images go.
    """
    probabilities = {
        model: r.active.sum(0) / r.tokens.sum(0)[:, None, None] for model, r in measured.items()
    }
    base = next(iter(probabilities))
    at = neurons.thresholds(probabilities[base])
    chosen = {model: neurons.specific(p, at) for model, p in probabilities.items()}
    halves = [
        neurons.specific(half, neurons.thresholds(half))
        for half in measured[base].active / measured[base].tokens[:, :, None, None]
    ]
    agreement = float(np.nanmean(neurons.overlap(*halves)))
    counts = {model: found.sum((1, 2)) for model, found in chosen.items()}
    kept = {model: neurons.overlap(chosen[base], found) for model, found in chosen.items()}
    images = [(directory / "neurons.png", "number of language-specific neurons per language")]
    figures.neuron_counts(counts, languages, unseen, images[0][0])
    images.append((directory / "neurons_layers.png", "language-specific neurons per layer"))
    shown = {model: chosen[model].sum(2) for model in dict.fromkeys([base, list(chosen)[-1]])}
    figures.neuron_layers(shown, languages, images[-1][0])
    lines = [
        [code] + [cell for m in chosen for cell in (int(counts[m][i]), _percent(kept[m][i]))]
        for i, code in enumerate(languages)
    ]
    lines.append(
        ["any language"] + [cell for m in chosen for cell in (int(chosen[m].any(0).sum()), "")]
    )
    header = ["language"] + [cell for m in chosen for cell in (m, "same as base")]
    tokens = measured[base].tokens.sum(0)
    spread = (
        f"{tokens.min():,}"
        if tokens.min() == tokens.max()
        else (f"{tokens.min():,} to {tokens.max():,}")
    )
    return Section(
        "neurons",
        "Language-specific neurons",
        _NEURONS.format(**at._asdict(), tokens=spread, agreement=agreement),
        images,
        {
            "languages": languages,
            "thresholds": at._asdict(),
            "tokens": tokens,
            "agreement_of_halves": agreement,
            "models": {
                model: {
                    "neurons": counts[model],
                    "any_language": int(found.any(0).sum()),
                    "by_layer": found.sum(2),
                    "overlap_with_base": kept[model],
                }
                for model, found in chosen.items()
            },
        },
        [table(header, lines)],
    )


_SEPARABILITY = """<p>Every sentence is there in every language. After each layer, a sentence is the
mean of its tokens' hidden states. The <em>silhouette</em> by language tells how far languages are
clusters of their own: 1 far apart, 0 in one another. Distances are taken in the full space, without
any projection first. Beside it stands how often the nearest sentence of another language is the
translation ({sentences} candidates).</p>
<p class="limits">Limits: higher separability is not plainly better: a model may keep languages
apart in few directions and still match what they say, which is what retrieval shows. Mean pooling
mixes a sentence's tokens, and tokenizers give languages different numbers of them. Euclidean
distances are dominated by few large coordinates, so cosines stand beside them. Intervals are
bootstrap intervals over sentences ({samples} samples): they say nothing of other texts, or of other
seeds of training.</p>"""


def separability_section(
    measured: Mapping[str, Representations],
    languages: Sequence[str],
    directory: Path,
    *,
    samples: int = 200,
    seed: int = 0,
) -> Section:
    """Silhouettes and retrieval of models, layer by layer.

    Args:
      measured: per model its hidden states.
      languages: the K languages.
      directory: where images go.
      samples: of the bootstrap.
      seed: of the bootstrap.
    """
    found = {
        model: [separability(points, samples=samples, seed=seed) for points in r.pooled]
        for model, r in measured.items()
    }
    count = next(iter(measured.values())).pooled.shape[2]
    path = directory / "separability.png"
    figures.separability_curves(found, count, path)
    best = int(np.argmax([layer.retrieval.value for layer in next(iter(found.values()))]))
    depth = len(next(iter(found.values()))) - 1
    lines = [
        [f"{model}, after layer {at} of {depth}"]
        + [_interval(layers[at].silhouette[m]) for m in METRICS]
        + [_interval(layers[at].retrieval)]
        for model, layers in found.items()
        for at in sorted({best, depth})
    ]
    return Section(
        "separability",
        "Separability and alignment",
        _SEPARABILITY.format(sentences=count, samples=samples),
        [(path, "silhouettes and retrieval accuracy over layers")],
        {
            "languages": languages,
            "sentences": count,
            "bootstrap_samples": samples,
            "models": {m: [_layer_numbers(x) for x in layers] for m, layers in found.items()},
        },
        [table(["model", *(f"silhouette, {m}" for m in METRICS), "retrieval"], lines)],
    )


def _layer_numbers(layer: Separability) -> dict[str, Any]:
    return {
        "silhouette": {m: i._asdict() for m, i in layer.silhouette.items()},
        "retrieval": layer.retrieval._asdict(),
        "retrieval_pairs": layer.retrieval_pairs,
    }


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
        [code, f"{x.base:.3f}", f"{x.single:.3f}", f"{x.joint:.3f}", _signed(x.value, 3)]
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


def _mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Mean of the known values; nan where there is none."""
    known = np.isfinite(values)
    count = known.sum(axis)
    total = np.where(known, values, 0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _pair_mean(cosine: np.ndarray) -> float:
    return float(_mean(cosine[np.triu_indices(len(cosine), 1)], 0))


def _signed(value: float, digits: int = 2) -> str:
    if not np.isfinite(value):
        return "–"
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _percent(value: float) -> str:
    return f"{value:.0%}" if np.isfinite(value) else "–"


def _interval(i: Any) -> str:
    return f"{i.value:.3f} [{i.low:.3f}, {i.high:.3f}]".replace("-", "\N{MINUS SIGN}")
