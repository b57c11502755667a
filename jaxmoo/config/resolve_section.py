"""The settings of the conflict resolution; a section of :mod:`jaxmoo.config.training`."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field, with a factory for lists and mappings.

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmoo.config.schema import Range, setting

__all__ = ["ResolveConfig"]

_AT_LEAST_1 = Range(least=1)


@dataclasses.dataclass(frozen=True)
class ResolveConfig:
    """How the languages' gradients become one update."""

    aggregator: str = setting(
        "cagrad",
        "Method that resolves conflicts; `mean` is plain fine-tuning. `package.module:object` is "
        "one of your own: a function of `options`, or an aggregator.",
    )
    options: dict[str, Any] = setting({}, "Options of the method, such as `{c: 0.5}` for `cagrad`.")
    blocks: str = setting(
        "layer",
        "How the parameters are cut into blocks that are resolved one by one: `whole`, `layer`, "
        "`module`, `expert` (each expert of a layer, and the rest of it), `leaf`, `bytes:25MiB` "
        "(buckets of that size), `shard` (each device's own piece: the result depends on the "
        "mesh), `random:32` (a control), or `package.module:function`, yours, from a parameter's "
        "path to the name of its block.",
    )
    vocabulary_slices: int | None = setting(
        None,
        "Into how many slices the embedding and the head are cut where blocks are layers, modules, "
        "experts, leaves or shards; each slice is a block. null takes the fewest that are no "
        "larger than a layer.",
        within=_AT_LEAST_1,
    )
    engine: str = setting(
        "backward",
        "Where conflicts are resolved: `backward` resolves each block inside the backward pass and "
        "drops its gradients, so that memory stays near plain fine-tuning; `stacked` first "
        "computes every language's whole gradient.",
        choices=("backward", "stacked"),
    )
    replicas: str = setting(
        "mean_then_resolve",
        "Order over the replicas of `mesh.data`: average each language's gradients first (exact), "
        "resolve in each replica and average (least traffic), or average Gram matrices only.",
        choices=("mean_then_resolve", "resolve_then_mean", "pooled_gram"),
    )
    gram: str = setting(
        "exact",
        "How each block's inner products of the languages' gradients are formed: `exact`, or "
        "`sketch:N`, estimated from random sketches of N numbers per language. Devices then send "
        "no more than in ordinary training, whatever the number of languages and of replicas.",
    )
    keep: str = setting(
        "gradients",
        "With `gram: sketch:N`, what a device holds of a block while it is resolved: its "
        "languages' `gradients`, or `one` of them at a time, so that memory does not depend on "
        "the number of languages. That takes one more product per matrix, forms the vocabulary's "
        "gradients twice and recomputes every layer, as `model.remat: full` does.",
        choices=("gradients", "one"),
    )
    nonfinite: str = setting(
        "skip",
        "When a language's loss or gradient is not finite: `skip` leaves it out of the blocks "
        "concerned and counts the step, `raise` stops. A run stops in any case when no language's "
        "loss is finite.",
        choices=("skip", "raise"),
        free=True,
    )
    token_mean: bool = setting(
        False,
        "Weigh each language's loss by its share of the step's target tokens, instead of all "
        "alike. With `aggregator: mean` that is ordinary fine-tuning on one mixed batch.",
    )
    weighting: str | None = setting(
        None,
        "Method that weighs the languages' losses before their gradients are taken: `static`, "
        "`temperature`, `famo`, `uw`, `dwa` or `imtl_l`. Weights have mean 1 and follow from the "
        "losses of the steps before. null weighs all alike.",
    )
    weighting_options: dict[str, Any] = setting(
        {},
        "Options of the weighting, such as `{weights: [1, 2]}` for `static`; numbers of languages "
        "stand in the order of `data.seen`.",
    )
    match_norm: bool = setting(
        False,
        "Give every block's resolved gradient the length of its mean gradient, to compare methods "
        "and block sizes by direction alone.",
    )
    preference: dict[str, float] | None = setting(
        None,
        "Weights of languages that matter more or less, such as `{ja: 2}`; a language not named "
        "weighs 1. null treats all alike.",
    )
