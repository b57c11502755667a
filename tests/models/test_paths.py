"""Regular expressions over parameter paths, and the segments they need."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmoo.errors import ConfigError
from jaxmoo.models import Decoder, logical_paths, parameter_paths, segments_for, trainable_filter
from jaxmoo.models.paths import named_leaves


@pytest.mark.parametrize(
    ("pattern", "segments"),
    [
        (r".", (0,)),
        (r"^layers\.[23]\.", (0, 2)),
        (r"^layers\.0\.", (0, 1)),
        (r"^layers\.[12]\.", (0, 1, 3)),
        (r"^layers\.(0|2)\.", (0, 1, 2, 3)),
        (r"mlp", (0,)),
        (r"layers\.3\..*norm|layers\.2\.mlp", (0, 2, 3)),
        (r"^norm", (0,)),
        (r"embed_tokens", (0,)),
    ],
)
def test_segments_are_the_maximal_runs_of_layers_that_match_alike(config, pattern, segments):
    assert segments_for(config, pattern) == segments


@pytest.mark.parametrize(
    "pattern", [r".", r"^layers\.[23]\.", r"layers\.(0|2)\.self_attn|norm\.scale", r"embed"]
)
def test_the_filter_splits_exactly_the_matching_parameters(config, pattern):
    model = Decoder.abstract(config, segments=segments_for(config, pattern))
    _, trained, frozen = nnx.split(model, trainable_filter(pattern), ...)

    def names(state):
        return {
            name for path, leaf in named_leaves(state) for name in logical_paths(path, leaf.shape)
        }

    expected = {name for name in parameter_paths(config) if re.search(pattern, name)}
    assert names(trained) == expected
    assert names(frozen) == set(parameter_paths(config)) - expected


def test_layers_before_the_first_trained_one_have_no_backward_pass(config):
    tokens = jax.ShapeDtypeStruct((4, 32), np.int32)

    def layers_run(pattern: str) -> int:
        model = Decoder.abstract(config, segments=segments_for(config, pattern), remat="none")
        graphdef, trained, frozen = nnx.split(model, trainable_filter(pattern), ...)

        def loss(trained, frozen, tokens):
            return nnx.merge(graphdef, trained, frozen).hidden(tokens).sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss))(trained, frozen, tokens)
        return sum(e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan")

    # Every layer forward, and backward from the last to the first that is trained.
    assert layers_run(r"^layers\.") == 4 + 4
    assert layers_run(r"^layers\.3\.") == 4 + 1
    assert layers_run(r"^norm") == 4


def test_an_expression_that_matches_nothing_shows_real_paths(config):
    with pytest.raises(ConfigError, match=r"no parameter's path matches 'layer\[0\]'.*mlp.up_proj"):
        segments_for(config, "layer[0]")


def test_an_invalid_expression_is_refused(config):
    for function in (lambda p: segments_for(config, p), trainable_filter):
        with pytest.raises(ConfigError, match=r"invalid regular expression '\('"):
            function("(")


def test_a_filter_on_other_segments_is_refused_rather_than_guessing(config):
    model = Decoder.abstract(config, segments=(0,))
    with pytest.raises(ConfigError, match=r"matches 1 of the 4 layers stacked in layers\.0"):
        nnx.split(model, trainable_filter(r"layers\.3\."), ...)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"layers\.1\.", r"matches 1 of the 3 layers stacked in layers\.0.*segments_for"),
        (r"experts\.[01]\.", r"matches 2 of the 4 experts of a layer .* trained together"),
        (r"layers\.[01]\.|experts\.3\.", r"matches 1 of the 4 experts of a layer"),
    ],
)
def test_layers_and_experts_that_match_in_part_have_remedies_of_their_own(pattern, message):
    path = ("layers", "0", "mlp", "experts", "up_proj", "kernel")
    with pytest.raises(ConfigError, match=message):
        trainable_filter(pattern)(path, np.zeros((3, 4, 2, 2)))
