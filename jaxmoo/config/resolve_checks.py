"""What settings of the conflict resolution do not go together.

Apart from the settings themselves, which can be described without the methods that they name.
"""

from __future__ import annotations

import jax

from jaxmoo import aggregators, blocks, weighting
from jaxmoo.config.data_section import check_shares
from jaxmoo.config.resolve_section import ResolveConfig
from jaxmoo.errors import ConfigError, did_you_mean
from jaxmoo.registry import is_path
from jaxmoo.sketched import check_sketchable, sketch_size

__all__ = ["check_gram", "check_resolve", "check_sampled"]


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
    return problems + check_shares("resolve.preference", resolve.preference or {}, seen)


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
