"""The settings of the conflict resolution; a section of :mod:`jaxmoo.config.training`."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field, with a factory for lists and mappings.

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxmoo import aggregators, blocks, weighting
from jaxmoo.config.schema import Range, setting
from jaxmoo.errors import ConfigError, did_you_mean
from jaxmoo.registry import is_path
from jaxmoo.sketched import check_sketchable, sketch_size

__all__ = ["ResolveConfig", "check_gram", "check_resolve", "check_sampled"]

_AT_LEAST_1 = Range(least=1)
_POSITIVE = Range(above=0)


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
        "`module`, `leaf`, `bytes:25MiB` (buckets of that size), `shard` (each device's own piece: "
        "the result depends on the mesh), `random:32` (a control), or `package.module:function`, "
        "yours, from a parameter's path to the name of its block.",
    )
    vocabulary_slices: int | None = setting(
        None,
        "Into how many slices the embedding and the head are cut where blocks are layers, modules, "
        "leaves or shards; each slice is a block. null takes the fewest that are no larger than a "
        "layer.",
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


def check_resolve(resolve: ResolveConfig, seen: list[str]) -> list[str]:
    """Return what is wrong with the settings of the resolution, a sentence each."""
    problems = []
    methods = aggregators.names()
    own = is_path(resolve.aggregator)
    if resolve.aggregator not in methods and not own:
        problems.append(
            f"resolve.aggregator: unknown method {resolve.aggregator!r}."
            f"{did_you_mean(resolve.aggregator, methods)} There are {', '.join(methods)}."
        )
    else:
        try:
            method = aggregators.get(resolve.aggregator, **resolve.options)
        except (TypeError, ValueError) as error:
            problems.append(
                f"resolve.aggregator: {error}"
                if own
                else f"resolve.options do not suit {resolve.aggregator}: {error}"
            )
        else:
            if method.cross_gram:
                problems.append(
                    f"resolve.aggregator: {method.name} needs gradients of two batches per step, "
                    "which a training run does not compute. Use it in your own optax chain."
                )
    if resolve.aggregator == "moco" and resolve.engine != "stacked":
        problems.append(
            "resolve.aggregator: moco follows every language's whole gradient; it needs "
            "resolve.engine=stacked."
        )
    try:
        if resolve.blocks != "shard":
            blocks.get(resolve.blocks)
    except ConfigError as error:
        problems.append(f"resolve.blocks: {error}")
    problems += _check_weighting(resolve, len(seen))
    for code, weight in (resolve.preference or {}).items():
        if code not in seen:
            problems.append(
                f"resolve.preference names {code!r}, which is not in data.seen."
                f"{did_you_mean(code, seen)}"
            )
        if weight not in _POSITIVE:
            problems.append(f"resolve.preference.{code} must be above 0, found {weight}.")
    return problems


def check_gram(resolve: ResolveConfig, *, accumulated: bool, tensor: int) -> list[str]:
    """Return what is wrong with how Gram matrices are formed.

    Args:
      resolve: the settings of the resolution.
      accumulated: whether microbatches' gradients are added up before they are resolved.
      tensor: devices that share every matrix product.
    """
    try:
        methods = [aggregators.get(resolve.aggregator, **resolve.options)]
    except (ConfigError, TypeError, ValueError):
        methods = []  # that it is unknown, or its options do not suit it, was found before
    try:
        if sketch_size(resolve.gram) is not None:
            check_sketchable(
                methods, replicas=resolve.replicas, accumulated=accumulated, tensor=tensor
            )
    except ConfigError as error:
        return [f"resolve.{error}"]
    if resolve.keep == "one" and (resolve.gram == "exact" or resolve.engine == "stacked"):
        return [
            "resolve.keep=one needs resolve.gram=sketch:N and resolve.engine=backward: an exact "
            "Gram matrix takes all gradients at once."
        ]
    return []


def _check_weighting(resolve: ResolveConfig, languages: int) -> list[str]:
    if resolve.weighting is None:
        if resolve.weighting_options:
            return ["resolve.weighting_options have no effect without resolve.weighting."]
        return []
    try:
        method = weighting.get(resolve.weighting, **resolve.weighting_options)
        # Shapes alone: devices must not be asked for before the processes of a run have met.
        jax.eval_shape(lambda: weighting.initial_weights(method, languages))
    except (TypeError, ValueError) as error:
        return [f"resolve.weighting: {error}"]
    numbers = (n for name in ("weights", "sizes") for n in resolve.weighting_options.get(name, ()))
    if not all(n > 0 for n in numbers):
        return [
            "resolve.weighting_options: every language needs a weight above 0; leave languages "
            "without one out of data.seen."
        ]
    return []


def check_sampled(resolve: ResolveConfig) -> list[str]:
    """Return what the resolver cannot do when each step has other languages."""
    problems = []
    if resolve.preference is not None:
        problems.append(
            "resolve.preference belongs to fixed languages; with data.languages_per_step give "
            "data.sampling.weights instead."
        )
    if resolve.weighting is not None:
        problems.append(
            "resolve.weighting follows fixed languages; with data.languages_per_step give "
            "data.sampling.weights instead."
        )
    try:
        method = aggregators.get(resolve.aggregator, **resolve.options)
    except (ConfigError, TypeError, ValueError):
        return problems  # that it is unknown was found before
    if method.importance is not None or jax.tree.leaves(method.init(2)):
        problems.append(
            f"resolve.aggregator: {method.name} has or keeps numbers for each language, and "
            "data.languages_per_step gives it other languages in every step. Use all languages, "
            "or another method."
        )
    return problems
