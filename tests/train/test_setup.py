"""What is settled before a run's data and weights are read."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from jaxmoo.commands.data import main as data_main
from jaxmoo.config import load_config
from jaxmoo.errors import ConfigError, JaxmooError
from jaxmoo.models import DecoderConfig
from jaxmoo.models.attention import cudnn
from jaxmoo.runs.trained_parameters import check_model
from jaxmoo.train import plan, setup, train
from jaxmoo.train.setup import make_run_mesh, prepare, run_attention

SHAPE = DecoderConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)


@pytest.mark.parametrize("name", ["cudnn", "tpu"])
def test_attention_that_cannot_run_is_refused_before_anything_is_read(write_config, name):
    said: list[str] = []
    config = load_config(write_config(), [f"model.attention={name}", "data.source=no/where"])
    with pytest.raises(ConfigError, match=f"attention '{name}' cannot run here"):
        prepare(config, said.append)
    assert not said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sequence_length=257", r"sequence_length is 257, but .* reads at most 256 tokens"),
        ("lora.rank=65", r"lora.rank is 65, but no side of a matrix of .* is longer than 64"),
    ],
)
def test_training_plans_and_data_refuse_what_the_model_is_too_small_for(
    write_config, override, message, capsys
):
    path, overrides = write_config(), [override, "data.source=no/where"]
    config = load_config(path, overrides)
    for check in (lambda: prepare(config, lambda _: None), lambda: plan(config)):
        with pytest.raises(ConfigError, match=message):
            check()
    assert data_main(["--config", str(path), *overrides]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_processes_of_other_settings_learn_of_it_before_any_data_are_read(
    write_config, monkeypatch
):
    """They do not read alike, and would wait for each other."""

    def gathered(mine):  # of two processes
        other = mine.copy()
        other[0] += 1  # which has settings of its own
        return np.stack([mine, other])

    monkeypatch.setattr("jaxmoo.runtime.processes.multihost_utils.process_allgather", gathered)
    monkeypatch.setattr("jaxmoo.train.run.prepare", lambda *_, **__: pytest.fail("data are read"))
    with pytest.raises(ConfigError, match="do not have the same settings: 1 differ from process 0"):
        train(load_config(write_config()))


def test_the_attention_that_is_chosen_is_told(write_config):
    said: list[str] = []
    with pytest.raises(JaxmooError, match="nowhere"):
        prepare(load_config(write_config(), ["data.source=nowhere/{language}.csv"]), said.append)
    assert said == ["Attention: xla."]


def test_the_tpus_kernel_and_a_tensor_axis_exclude_each_other(write_config):
    with pytest.raises(ConfigError, match=r"mesh\.tensor above 1 needs model\.attention=xla"):
        load_config(write_config(), ["model.attention=tpu", "mesh.tensor=2"])


def test_soft_capped_scores_are_not_left_to_a_kernel_that_has_none(write_config, monkeypatch):
    """On GPUs that cuDNN is for."""
    monkeypatch.setattr(cudnn, "obstacle", lambda *_: None)
    monkeypatch.setattr(setup, "platform_of", lambda _: "gpu")
    config = load_config(write_config(), ["model.dtype=bfloat16"])
    device_mesh = make_run_mesh(config)
    assert run_attention(config, SHAPE, device_mesh) == "cudnn"
    capped = dataclasses.replace(SHAPE, attn_logit_softcapping=50.0)
    assert run_attention(config, capped, device_mesh) == "xla"


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("apertus", ["lora.targets=[gate_proj, up_proj]"], "layers of .* have no gate_proj"),
        ("apertus", ["lora.rank_pattern={gate_proj: 2}"], "layers of .* have no gate_proj"),
        ("phi3", ["lora.dora=true", "lora.export=both"], r"adapters of qkv_proj, .* 'merged'"),
        ("gemma3", ["lora.export=adapter"], r"text model of a larger one \(gemma3\).*'merged'"),
        ("gemma3", ["lora.export=merged"], None),
        ("apertus", ["lora.targets=[all-linear]"], None),
        ("phi3", ["lora.dora=true"], None),
        ("phi3", ["lora.dora=true", "lora.export=both", "lora.targets=[o_proj]"], None),
    ],
)
def test_adapters_must_suit_the_family(write_config, family, overrides, message):
    config = load_config(write_config(), ["lora.rank=4", "data.sequence_length=64", *overrides])
    shape = dataclasses.replace(SHAPE, family=family, gated_mlp=family != "apertus")
    if message is None:
        check_model(config, shape)
        return
    with pytest.raises(ConfigError, match=message):
        check_model(config, shape)
