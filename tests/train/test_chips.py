"""Plans for chips that are not here: their names, their compilers, and what is refused before."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
from types import SimpleNamespace

import jax
import pytest
import yaml
from jax.experimental import topologies

from jaxmoo.commands.plan import main
from jaxmoo.config import load_config, validate
from jaxmoo.errors import ConfigError
from jaxmoo.mesh import mesh_shape
from jaxmoo.models import DecoderConfig
from jaxmoo.train.chips import CHIPS, ChipFullError, answering_for, compile_for, slice_of
from jaxmoo.train.gradient_source import ordinary, ordinary_gradients
from jaxmoo.train.planning import plan
from jaxmoo.train.setup import make_run_mesh
from jaxmoo.train.throughput import peak_flops


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A config of four languages that names no model or data there is."""
    path = tmp_path_factory.mktemp("chips") / "chips.yaml"
    data = {"source": "unused", "seen": ["en", "es", "it", "ja"], "batch_size": 2}
    settings = {"output": "unused", "model": {"source": "unused"}, "train": {"steps": 20}}
    path.write_text(yaml.safe_dump(settings | {"data": data | {"sequence_length": 128}}))
    return path


@pytest.mark.parametrize(
    ("text", "number"), [("h100:8", 8), ("h200:16", 16), ("v5e:2x4", 8), ("v5p:4x4x8", 128)]
)
def test_a_slice_is_named_by_chip_and_size(text, number):
    place = slice_of(text)
    assert place.name == text
    assert math.prod(place.grid) == number


def test_several_slices_have_their_number_before():
    place = slice_of("2xv5e:16x16")
    assert (place.name, place.number, place.grid) == ("2xv5e:16x16", 2, (16, 16))
    assert slice_of("1xv5e:2x4") == slice_of("v5e:2x4")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("2xh100:8", r"only TPUs come in slices.* h100:16, and set mesh.slices=2"),
        ("0xv5e:2x4", "there is no chip '0xv5e'"),
        ("2xv5e:2x5", r"Did you mean 'v5e:2x"),
        ("v5:2x4", r"there is no chip 'v5'\. Did you mean 'v5p'\?.* There are a100:N"),
        ("h10:8", r"Did you mean 'h100'\?"),
        ("h100", r"no such slice.* There are h100:N with N from 1 to 8"),
        ("h100:0", "no such slice"),
        ("h100:12", "or a multiple of it"),
        ("h100:2x4", "no such slice"),
        ("v5e:2x5", r"Did you mean 'v5e:2x4'\?|Did you mean 'v5e:2x2'\?"),
        ("v5p:2x4", "There are v5p:2x2x1, "),
        ("v5e:", "no such slice"),
        ("h100:8,v5e:2x4", "one kind of chips"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_there_is(text, says):
    with pytest.raises(ConfigError, match=says):
        slice_of(text)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_without_its_compiler_the_command_to_install_it_is_named(chip, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = f"{chip.name}:{chip.grids[0] if chip.grids else 1}"
    with pytest.raises(ConfigError, match=rf"pip install 'jaxmoo\[plan-{chip.platform}\]'"):
        slice_of(text).devices()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--chip", "v5f:2x4"], "there is no chip 'v5f'"),
        (["--chip", "h100:8", "--devices", "8"], "Leave out one of them"),
        (["--chip", "h100:8", "--device-memory", "much"], "such as 80GB"),
    ],
)
def test_the_command_refuses_before_it_compiles(arguments, says, config_file, capsys):
    assert main(["--config", str(config_file), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_mesh_that_does_not_divide_the_slice_is_refused(config_file):
    devices = [SimpleNamespace(platform="tpu")] * 8
    config = load_config(config_file, ["mesh.language=3"])
    with pytest.raises(ConfigError, match="but there are 8 devices"):
        make_run_mesh(config, devices)


def test_a_compiler_that_jax_gave_up_is_an_error_that_says_how_to_have_it(monkeypatch):
    def gave_up(**_):
        raise NotImplementedError

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topologies, "get_topology_desc", gave_up)
    with pytest.raises(ConfigError, match="Set JAX_PLATFORMS=cpu before JAX is first used"):
        slice_of("h100:8").devices()


@pytest.mark.parametrize(
    "sizes", [[], ["mesh.language=4", "mesh.fsdp=2"], ["mesh.data=2"]], ids=str
)
def test_ordinary_training_shares_all_devices_of_a_replica(sizes, config_file):
    config = ordinary(load_config(config_file, sizes))
    validate(config)
    assert (config.data.step_languages, config.data.batch_size) == (1, 4 * 2)
    replicas = config.mesh.data
    found = mesh_shape(1, 8, **dataclasses.asdict(config.mesh) | {"slices": 1})
    assert found == (replicas, 1, 8 // replicas, 1)


def test_jax_is_told_of_the_gpu_that_it_asks_for_and_of_no_other():
    jax_asks = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    before = jax_asks.check_compute_capability
    with answering_for(CHIPS["h100"]):
        assert jax_asks.check_cudnn_version() >= 90_000
        assert jax_asks.check_compute_capability("9.0")
        assert not jax_asks.check_compute_capability("10.0")
        assert jax_asks.is_cuda_compute_capability_equal("9.0")
    assert jax_asks.check_compute_capability is before
    with pytest.raises(ZeroDivisionError), answering_for(CHIPS["h100"]):
        raise ZeroDivisionError
    assert jax_asks.check_compute_capability is before
    with answering_for(CHIPS["a100"]):
        assert not jax_asks.check_compute_capability("9.0")
    with answering_for(CHIPS["v5e"]):
        assert jax_asks.check_compute_capability is before


def test_a_program_that_the_compiler_has_no_room_for_is_an_error_that_says_so():
    said = "RESOURCE_EXHAUSTED: E1000: the total memory (17.5G) exceeds available HBM (15.75G)."

    def compile():
        raise RuntimeError(said + "\nSee elsewhere.")

    traced = SimpleNamespace(lower=lambda **_: SimpleNamespace(compile=compile))
    with pytest.raises(ChipFullError, match=r"v5e:2x4.*17\.5G.*15\.75G.*train\.microbatches"):
        compile_for(slice_of("v5e:2x4"), traced)


MODEL = DecoderConfig(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    max_position_embeddings=256,
)


def planned(text, config_file):
    """A small step and the ordinary one beside it, or why neither can be compiled here."""
    place = slice_of(text)
    try:
        (first, *_) = place.devices()
    except ConfigError as error:
        return str(error)
    assert peak_flops(first)
    changes = ["model.dtype=bfloat16", "resolve.aggregator=cagrad", "data.batch_size=2"]
    config = load_config(config_file, [*changes, "model.attention=auto"])
    ours = plan(config, MODEL, place=place)
    plain = plan(ordinary(config), MODEL, ordinary_gradients, place)
    assert jax.default_backend() == "cpu"
    return ours, plain


# Elsewhere, since JAX loads the compiler for GPUs without one only where none is asked for.
@pytest.mark.slow
@pytest.mark.parametrize("text", ["h100:2", "v5e:2x2"])
def test_a_small_step_is_compiled_for_a_chip(text, config_file, eight_devices):
    found = eight_devices("train.test_chips", "planned", text, config_file)
    if isinstance(found, str):
        pytest.skip(found)
    ours, plain = found
    place = slice_of(text)
    gpu = place.chip.platform == "gpu"
    assert ours.attention == ("cudnn" if gpu else "tpu")
    assert ours.total < place.chip.memory
    for one in found:
        # The tables alone are gathered and their gradients exchanged, in bfloat16.
        devices = math.prod(place.grid)
        tables = 2 * MODEL.vocab_size * MODEL.hidden_size * 2
        assert sum(one.collectives.values()) > 2 * tables * (devices - 1) / devices
        for kind, sent in one.chip.sent.items():
            assert 0 <= sent.exposed <= sent.bytes == one.collectives[kind]
    # Gradients are exchanged as in ordinary training, once for every language of a group.
    exchanges = ("all-to-all", "reduce-scatter")
    exchanged = [sum(one.collectives.get(kind, 0) for kind in exchanges) for one in found]
    languages = 4 // ours.axes["language"]
    assert exchanged[0] == pytest.approx(languages * exchanged[1], rel=0.01)
    gathered = [one.collectives["all-gather"] for one in found]
    assert gathered[0] == pytest.approx(gathered[1], rel=0.01)
    costs = [one.chip.launches if gpu else one.chip.cycles for one in found]
    assert costs[0].total > costs[1].total > 0
    assert costs[0].parts["conflicts: Gram matrices"] > 0
    assert "conflicts: solve" not in costs[1].parts
    assert (ours.chip.cycles is None) == gpu == (ours.chip.conflict_share is None)
    table = ours.table(plain)
    assert f"by the compiler for {place.name}" in table and "plain" in table


def planned_on_slices(text, config_file):
    """A small step with a replica in each of two slices, or why it cannot be compiled here."""
    changes = ["model.dtype=bfloat16", "data.batch_size=2", "model.attention=auto", "mesh.data=2"]
    config = load_config(config_file, [*changes, "resolve.replicas=pooled_gram"])
    try:
        return plan(config, MODEL, place=slice_of(text))
    except ConfigError as error:
        return str(error)


@pytest.mark.slow
def test_replicas_in_two_slices_send_one_gradient_to_each_other(config_file, eight_devices):
    found = eight_devices("train.test_chips", "planned_on_slices", "2xv5e:2x2", config_file)
    if isinstance(found, str):
        pytest.skip(found)
    assert found.axes == {"data": 2, "language": 4, "fsdp": 1, "tensor": 1}
    # A chip's piece of all parameters, of which both send half, twice, in bfloat16; and the
    # blocks' Gram matrices.
    layer = 128 * (128 + 2 * 64 + 128) + 3 * 128 * 256
    piece = (2 * MODEL.vocab_size * MODEL.hidden_size + 2 * layer) // 4
    between = found.collectives["all-reduce between slices"]
    assert between == pytest.approx(2 * piece, rel=0.02)
    assert found.chip.sent["all-reduce between slices"].bytes == between
    assert "sent between slices per device and step" in found.table()
