"""What a run will cost, planned with shapes alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import jax
import pytest
import yaml

from devices import run_python
from jaxmoo.config import load_config
from jaxmoo.models import DecoderConfig
from jaxmoo.train.planning import abstract_step, plan, shape_of
from jaxmoo.train.setup import prepare

MODEL = DecoderConfig(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
)
LAYER = 64 * (64 + 2 * 32 + 64) + 3 * 64 * 128  # parameters in a layer's matrices
TABLE = 1024 * 64
PARAMETERS = 2 * TABLE + 4 * LAYER + (2 * 4 + 1) * 64


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A config of four languages that names no model or data there is."""
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    settings = {
        "output": "unused",
        "model": {"source": "unused"},
        "data": {
            "source": "unused",
            "seen": ["en", "es", "it", "ja"],
            "batch_size": 2,
            "sequence_length": 32,
        },
        "resolve": {"aggregator": "mean"},
        "train": {"steps": 10},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def small(config_file):
    """Plan the small model with some settings changed."""
    return functools.cache(lambda *overrides: plan(load_config(config_file, overrides), MODEL))


def test_kinds_of_memory_add_up(small):
    found = small()
    assert found.memory["parameters"] == found.memory["resolved gradient"] == 4 * PARAMETERS
    # Two moments and the number of steps.
    assert 0 <= found.memory["optimiser state"] - 8 * PARAMETERS <= 64
    # Four layers' inputs, of four languages.
    kept = found.memory["activations kept for the backward pass"]
    assert kept == pytest.approx(4 * (4 * 2 * 32 * 64) * 4, rel=0.01)
    assert sum(found.memory.values()) == found.total


def test_flops_are_three_or_four_products_per_parameter_and_token(small):
    tokens = 4 * 2 * 32
    # Forward, two backward, and most of the forward pass once more; the head four times.
    attention = 2 * 2 * 32 * (4 * 16)
    forward = 2 * tokens * 4 * LAYER + 4 * tokens * attention
    head = 4 * 2 * tokens * TABLE
    assert 3 * forward + head <= small().flops <= 4.1 * forward + head


def test_a_frozen_model_needs_no_optimiser(small):
    found = small(r"model.trainable=^layers\.3\.")
    assert found.memory["optimiser state"] < 8.1 * PARAMETERS / 4
    assert found.flops < small().flops / 2


def test_blocks_resolved_after_the_pass_are_named_with_their_cost(small):
    assert small().late == {}
    found = small("resolve.blocks=whole")
    assert sum(found.late.values()) == 4 * 4 * PARAMETERS
    assert "layers.0.mlp.up_proj.kernel" in found.late
    assert found.total > small().total
    assert "layers.0.mlp.up_proj.kernel" in found.table()


def test_stacked_gradients_are_the_largest_part_and_the_advice_says_so(small):
    found = small("resolve.engine=stacked", "data.sequence_length=2", "data.batch_size=1")
    assert found.memory["per-language gradients of everything"] == 4 * 4 * PARAMETERS
    assert found.advice(found.total).startswith("Fits")
    advice = found.advice(found.total - 1)
    assert advice.startswith("Does not fit")
    assert "resolve.engine=backward" in advice


def test_the_plan_is_of_the_step_that_the_trainer_runs(write_config):
    config = load_config(write_config())
    setup = prepare(config, say=lambda _: None)
    planned = abstract_step(config, shape_of(config.model.source))
    batch = setup.batches.batch(0)
    where = [
        jax.tree.map(lambda x: x.sharding, state) for state in (setup.state, planned.arguments[0])
    ]
    assert where[0] == where[1]
    for real, shapes in zip((setup.state, setup.frozen, batch), planned.arguments, strict=True):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), real) == jax.tree.map(
            lambda x: (x.shape, x.dtype), shapes
        )


# --- The command ------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, config_file):
    """Run scripts/plan.py with the small model."""
    model = tmp_path / "model"
    model.mkdir()
    sizes = {k: v for k, v in dataclasses.asdict(MODEL).items() if k != "rope_scaling"}
    (model / "config.json").write_text(
        json.dumps({**sizes, "model_type": "llama", "attention_bias": False})
    )

    def run(*arguments, model=model):
        given = ["scripts/plan.py", "--config", config_file, "--model", model, *arguments]
        return run_python(given, check=False)

    return run


UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def number(text: str, name: str) -> float:
    found = re.search(rf"^  {name} +([\d.,]+) (\w+)$", text, re.MULTILINE)
    return float(found[1].replace(",", "")) * UNITS[found[2]]


def test_the_command_plans_for_devices_that_are_not_there(command):
    done = command("--devices", "8", "--device-memory", "1GB", "data.batch_size=8")
    assert done.returncode == 0, done.stderr
    assert "8 devices (data 1 x language 4 x fsdp 2" in done.stdout
    assert done.stdout.rstrip().endswith("of 1.00 GB per device.")
    assert number(done.stdout, "parameters") == pytest.approx(4 * PARAMETERS / 8, rel=0.01)
    # Each device sends what fully sharded data parallelism sends, 7/8 of the gradient.
    sent = number(done.stdout, "reduce-scatter") + number(done.stdout, "all-to-all")
    assert sent == pytest.approx(7 / 8 * 4 * PARAMETERS, rel=0.01)


def test_the_command_says_what_to_change_when_it_does_not_fit(command):
    done = command("--device-memory", "1MB", "resolve.blocks=whole")
    assert done.returncode == 1
    assert "Does not fit" in done.stdout
    assert "resolve.blocks=layer" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "3", "mesh.language=2"], "but there are 3 devices"),
        (["--devices", "10000000000"], "--devices takes 1 to 10000, found 10000000000"),
        (["--devices", "8", "data.batch_size=3"], "data.batch_size"),
        (["--device-memory", "lots"], "such as 80GB"),
    ],
)
def test_what_cannot_be_planned_is_said_clearly(command, arguments, message):
    done = command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_an_unknown_model_gets_the_nearest(command):
    done = command(model="Qwen3-9B")
    assert done.returncode == 2
    assert "Did you mean 'Qwen3-8B'?" in done.stderr
