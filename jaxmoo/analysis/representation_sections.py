"""Sections on a model's representations: language-specific neurons and separability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoo.analysis import figures, neurons
from jaxmoo.analysis.representations import Representations
from jaxmoo.analysis.section import Section
from jaxmoo.analysis.separability import METRICS, Separability, separability
from jaxmoo.report.page import table

__all__ = ["neurons_section", "separability_section"]

_NEURONS = """<p>A neuron of an MLP is active in a token where its gate is positive; of an expert,
only in tokens that read it. The entropy of its activation probabilities over languages, normalised
to sum 1, is low when it serves few languages (language activation probability entropy, LAPE; Tang
et al. 2024, <em>Language-Specific Neurons</em>). In the base model, of the neurons that are active
in some language more often than 95 % of all probabilities (here above {probability:.3f}), the 1 %
of all neurons with the lowest entropy are taken (here {entropy:.3f} nats and less); a neuron is
specific to every language in which it passes the first threshold. Other models are compared at
these thresholds of the base model: at their own, their numbers would be the same by
construction.</p>
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


def _percent(value: float) -> str:
    return f"{value:.0%}" if np.isfinite(value) else "–"


def _interval(i: Any) -> str:
    return f"{i.value:.3f} [{i.low:.3f}, {i.high:.3f}]".replace("-", "\N{MINUS SIGN}")
