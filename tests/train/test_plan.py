"""What a run will cost, planned with shapes alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import re

import jax
import pytest
import yaml

from devices import run_python
from jaxmoo.config import load_config
from jaxmoo.models import DecoderConfig
from jaxmoo.train.plan_table import Plan
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


@pytest.mark.slow
def test_a_frozen_model_needs_no_optimiser(small):
    found = small(r"model.trainable=^layers\.3\.")
    assert found.memory["optimiser state"] < 8.1 * PARAMETERS / 4
    assert found.flops < small().flops / 2


@pytest.mark.slow
def test_blocks_resolved_after_the_pass_are_named_with_their_cost(small, planned):
    assert small().late == {}
    *_, found = planned["too large"]
    assert sum(found.late.values()) == 4 * 4 * PARAMETERS
    assert "layers.0.mlp.up_proj.kernel" in found.late
    assert found.total > small().total
    assert "layers.0.mlp.up_proj.kernel" in found.table()


@pytest.mark.slow
def test_stacked_gradients_are_the_largest_part_and_the_advice_says_so(config_file):
    """Of arrays that are too large to be joined, and so copied, for their Gram matrices."""
    config = load_config(
        config_file, ["resolve.engine=stacked", "data.sequence_length=2", "data.batch_size=1"]
    )
    found = plan(config, dataclasses.replace(MODEL, vocab_size=16 * 1024))
    parameters = PARAMETERS + 2 * 15 * TABLE
    assert found.memory["per-language gradients of everything"] == 4 * 4 * parameters
    assert found.advice(found.total).startswith("Fits")
    advice = found.advice(found.total - 1)
    assert advice.startswith("Does not fit")
    assert "resolve.engine=backward" in advice


def test_models_are_advised_to_be_quantised_where_parameters_are_the_most():
    found = Plan({"fsdp": 1}, 1, {"parameters": 9}, 9, {}, 0, {}, 0, parameters=(4, 3))
    assert "lora.quantize_base=nf4" in found.advice(8)


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


# Every command is given as many virtual devices as if it were the first one of its process. What
# it has planned is kept beside what it says.
ALL_OF_THEM = """
import contextlib, io, json, pickle, sys
import jax.extend
from jaxmoo.commands import plan as command
from jaxmoo.train import planning

plan, found = planning.plan, []

def kept(*arguments, **options):
    found[-1].append(plan(*arguments, **options))
    return found[-1][-1]

planning.plan = kept
for arguments in json.loads(sys.argv[2]):
    jax.extend.backend.clear_backends()
    out, err = io.StringIO(), io.StringIO()
    found.append([])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command.main(arguments)
    found[-1] = [code, out.getvalue(), err.getvalue(), *found[-1]]
with open(sys.argv[1], "wb") as file:
    pickle.dump(found, file)
"""
COMMANDS = {
    "eight devices": ["--devices", "8", "--device-memory", "1GB", "data.batch_size=8"],
    "two slices": ["--devices", "8", "data.batch_size=8", "mesh.data=2", "mesh.slices=2"],
    "a replica over two slices": ["--devices", "8", "data.batch_size=8", "mesh.slices=2"],
    "too large": ["--device-memory", "1MB", "resolve.blocks=whole"],
    "three devices": ["--devices", "3", "mesh.language=2"],
    "ten billion devices": ["--devices", "10000000000"],
    "too few examples": ["--devices", "8", "data.batch_size=3"],
    "no size": ["--device-memory", "lots"],
    "no model": ["--model", "Qwen3-9B"],
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory, config_file):
    """Exit code, output, errors and plan of ``jaxmoo plan``, for all of COMMANDS."""
    model, kept = (tmp_path_factory.mktemp(name) for name in ("model", "kept"))
    sizes = {k: v for k, v in dataclasses.asdict(MODEL).items() if k != "rope_scaling"}
    (model / "config.json").write_text(
        json.dumps({**sizes, "model_type": "llama", "attention_bias": False})
    )
    begin = ["--config", str(config_file), "--model", str(model)]
    commands = json.dumps([begin + x for x in COMMANDS.values()])
    run_python(["-c", ALL_OF_THEM, kept / "found", commands])
    return dict(zip(COMMANDS, pickle.loads((kept / "found").read_bytes()), strict=True))


UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def number(text: str, name: str) -> float:
    found = re.search(rf"^  {name} +([\d.,]+) (\w+)$", text, re.MULTILINE)
    return float(found[1].replace(",", "")) * UNITS[found[2]]


@pytest.mark.slow
def test_the_command_plans_for_devices_that_are_not_there(planned):
    code, out, err, _ = planned["eight devices"]
    assert code == 0, err
    assert "8 devices (data 1 x language 4 x fsdp 2" in out
    assert out.rstrip().endswith("of 1.00 GB per device.")
    assert number(out, "parameters") == pytest.approx(4 * PARAMETERS / 8, rel=0.01)
    # Each device sends what fully sharded data parallelism sends, 7/8 of the gradient.
    sent = number(out, "reduce-scatter") + number(out, "all-to-all")
    assert sent == pytest.approx(7 / 8 * 4 * PARAMETERS, rel=0.01)


@pytest.mark.slow
def test_what_goes_between_slices_stands_apart(planned):
    code, out, err, found = planned["two slices"]
    assert code == 0, err
    assert "sent between slices per device and step" in out
    # Replicas add up all languages' gradients of their pieces: each of two sends its half, twice.
    between = found.collectives["all-reduce between slices"]
    assert between == pytest.approx(4 * 4 * PARAMETERS / 4, rel=0.01)
    within = found.collectives["all-to-all"]  # between the four languages of a replica
    assert within == pytest.approx(3 / 4 * 4 * PARAMETERS, rel=0.01)


@pytest.mark.slow
def test_the_command_says_what_to_change_when_it_does_not_fit(planned):
    code, out, *_ = planned["too large"]
    assert code == 1
    assert "Does not fit" in out
    assert "resolve.blocks=layer" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a replica over two slices", "Set mesh.data=2 for a replica in each."),
        ("three devices", "but there are 3 devices"),
        ("ten billion devices", "--devices takes 1 to 10000, found 10000000000"),
        ("too few examples", "data.batch_size"),
        ("no size", "such as 80GB"),
        ("no model", "Did you mean 'Qwen3-8B'?"),
    ],
)
def test_what_cannot_be_planned_is_said_clearly(name, message, planned):
    code, _, err, *_ = planned[name]
    assert code == 2
    assert message in err
