"""What a run may ask of a model, checked before anything is read."""

from __future__ import annotations

import dataclasses

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
            {
                "resolve": ResolveConfig(blocks="expert"),
                "lora": LoraConfig(rank=4, targets=["q_proj"]),
            },
            "lora.targets or model.trainable leave them without adapters. Use 'layer' blocks",
        ),
        (
            EXPERTS,
            {"lora": LoraConfig(rank=4, targets=["q_proj", "up_proj"], dora=True)},
            r"lora.dora: .* experts cannot be weight-decomposed \(DoRA\).* Adapt attention alone",
        ),
        (
            EXPERTS,
            {
                "resolve": ResolveConfig(blocks="expert"),
                "model": ModelConfig(source=EXPERTS, trainable=r"self_attn|gate\."),
            },
            r"model.trainable \('self_attn\|gate.*'\) matches none of them. Use 'layer' blocks",
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


@pytest.mark.parametrize(
    ("resolve", "coef", "message"),
    [
        ({"blocks": "expert"}, 0.0, "'expert': .* has no experts"),
        ({}, 0.2, "router_aux_loss_coef is 0.2 .*has no experts. Set it to 0"),
    ],
)
def test_a_model_none_of_whose_layers_has_experts_has_none(resolve, coef, message):
    architecture = preset(EXPERTS)
    architecture = dataclasses.replace(
        architecture,
        dense_layers=tuple(range(architecture.num_hidden_layers)),
        router_aux_loss_coef=coef,
    )
    config = Config(
        output="nowhere",
        model=ModelConfig(source=EXPERTS),
        data=DataConfig(source="nowhere", seen=["en"]),
        train=TrainConfig(steps=1),
        resolve=ResolveConfig(**resolve),
    )
    with pytest.raises(ConfigError, match=message):
        check_model(config, architecture)


def test_adapters_of_all_projections_are_those_of_experts_too():
    config = Config(
        output="nowhere",
        model=ModelConfig(source=EXPERTS),
        data=DataConfig(source="nowhere", seen=["en"]),
        train=TrainConfig(steps=1),
        resolve=ResolveConfig(blocks="expert"),
        lora=LoraConfig(rank=4, targets=["all-linear"]),
    )
    check_model(config, preset(EXPERTS))
