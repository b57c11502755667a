"""What a run may ask of a model, checked before anything is read."""

from __future__ import annotations

import pytest

from jaxmoo.config import Config, DataConfig, LoraConfig, ModelConfig, ResolveConfig, TrainConfig
from jaxmoo.errors import ConfigError
from jaxmoo.models.presets import preset
from jaxmoo.runs.trained_parameters import check_model

DENSE, EXPERTS = "SmolLM2-135M", "Qwen3-30B-A3B"


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (DENSE, {"resolve": ResolveConfig(blocks="expert")}, "'expert': .* has no experts"),
        (
            EXPERTS,
            {"resolve": ResolveConfig(blocks="expert"), "lora": LoraConfig(rank=4)},
            "has experts, but adapters none",
        ),
        (
            EXPERTS,
            {"lora": LoraConfig(rank=4, targets=["q_proj", "up_proj"])},
            "has experts, whose up_proj get no adapters. Adapt q_proj, k_proj, v_proj, o_proj",
        ),
        (DENSE, {"train": TrainConfig(steps=1, router_aux_loss_coef=0.1)}, "has no experts"),
    ],
)
def test_what_only_experts_have_is_refused_elsewhere(model, settings, message):
    config = Config(
        **{
            "output": "nowhere",
            "model": ModelConfig(source=model),
            "data": DataConfig(source="nowhere", seen=["en"]),
            "train": TrainConfig(steps=1),
        }
        | settings
    )
    with pytest.raises(ConfigError, match=message):
        check_model(config, preset(model))


def test_adapters_of_all_projections_are_those_of_attention_beside_experts():
    config = Config(
        output="nowhere",
        model=ModelConfig(source=EXPERTS),
        data=DataConfig(source="nowhere", seen=["en"]),
        train=TrainConfig(steps=1),
        lora=LoraConfig(rank=4, targets=["all-linear"]),
    )
    check_model(config, preset(EXPERTS))
