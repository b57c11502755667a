"""What is settled before a run's data and weights are read."""

from __future__ import annotations

import re

import pytest

from jaxmoo.commands.data import main as data_main
from jaxmoo.config import load_config
from jaxmoo.errors import ConfigError, JaxmooError
from jaxmoo.train import plan
from jaxmoo.train.setup import prepare


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


def test_the_attention_that_is_chosen_is_told(write_config):
    said: list[str] = []
    with pytest.raises(JaxmooError, match="nowhere"):
        prepare(load_config(write_config(), ["data.source=nowhere/{language}.csv"]), said.append)
    assert said == ["Attention: xla."]


def test_the_tpus_kernel_and_a_tensor_axis_exclude_each_other(write_config):
    with pytest.raises(ConfigError, match=r"mesh\.tensor above 1 needs model\.attention=xla"):
        load_config(write_config(), ["model.attention=tpu", "mesh.tensor=2"])
