"""Shapes of published models."""

import math

import pytest
from flax import nnx

from jaxmoo.errors import ConfigError
from jaxmoo.models import Decoder
from jaxmoo.models.paths import named_leaves
from jaxmoo.models.presets import PRESETS, preset


# The numbers of parameters that the models' pages state.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Llama-3.1-8B", 8_030_261_248),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-3.2-3B", 3_212_749_824),
        ("Meta-Llama-3-8B", 8_030_261_248),
        ("Mixtral-8x7B", 46_702_792_704),
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-30B-A3B", 30_532_122_624),
        ("Qwen3-1.7B", 1_720_574_976),
        ("Qwen3-4B", 4_022_468_096),
        ("Qwen3-8B", 8_190_735_360),
        ("Salamandra-2B", 2_253_490_176),
        ("Salamandra-7B", 7_768_117_248),
        ("SmolLM2-135M", 134_515_008),
    ],
)
def test_number_of_parameters(name, parameters):
    leaves = named_leaves(nnx.state(Decoder.abstract(PRESETS[name])))
    assert sum(math.prod(leaf.shape) for _, leaf in leaves) == parameters


# Of these they state it in billions, without what sees images.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Apertus-8B", 8.05),
        ("Aya-Expanse-8B", 8.03),
        ("EuroLLM-1.7B", 1.66),
        ("EuroLLM-9B", 9.15),
        ("Gemma-3-4B", 3.88),
    ],
)
def test_number_of_parameters_in_billions(name, billions):
    leaves = named_leaves(nnx.state(Decoder.abstract(PRESETS[name])))
    assert round(sum(math.prod(leaf.shape) for _, leaf in leaves) / 1e9, 2) == billions


@pytest.mark.parametrize(
    "name", ["Llama-3.1-8B", "meta-llama/llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"]
)
def test_names_are_those_of_the_hub(name):
    assert preset(name) is PRESETS["Llama-3.1-8B"]
    assert preset("Qwen/Qwen3-8B-Base") is PRESETS["Qwen3-8B"]
    assert preset("google/gemma-3-4b-pt") is PRESETS["Gemma-3-4B"]
    assert preset("CohereLabs/aya-expanse-8b") is PRESETS["Aya-Expanse-8B"]


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'Llama"):
        preset("llama-3-1-8b")
