"""Conversion: there and back without a changed byte, from checkpoints and from training runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import tiny_models
from devices import run_python
from jaxmoo import mesh
from jaxmoo.commands.convert import main
from jaxmoo.config.training import load_config
from jaxmoo.convert.models import from_hf, open_model, to_hf
from jaxmoo.errors import CheckpointError, ConfigError
from jaxmoo.evaluate import LanguageScore
from jaxmoo.files.digests import DIGESTS
from jaxmoo.hf import load_model
from jaxmoo.hf.load import load_config as model_config
from jaxmoo.models import segments_for, trainable_filter
from jaxmoo.models.paths import STACKED
from jaxmoo.runs.checkpoint import Checkpoints
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.train.step import TrainState
from tiny_tokenizer import bytes_tokenizer

WEIGHTS = "model.safetensors"


def quiet(_: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model that no test changes."""
    path = tmp_path_factory.mktemp("model") / "source"
    tiny_models.make("llama").bfloat16().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("variant", "dtype", "overrides"),
    [
        ("llama", "bfloat16", {}),
        ("llama_tied", "float32", {}),
        ("mistral", "float16", {}),
        ("qwen2", "bfloat16", {}),
        ("qwen2", "float16", {"tie_word_embeddings": False}),
        ("qwen3", "bfloat16", {}),
        ("qwen3", "float32", {"tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_there_and_back_every_file_is_the_same(tmp_path: Path, variant, dtype, overrides):
    import torch

    source, checkpoint, out = tmp_path / "source", tmp_path / "checkpoint", tmp_path / "out"
    tiny_models.save(variant, source, dtype=getattr(torch, dtype), **overrides)
    from_hf(source, checkpoint, say=quiet)
    shutil.move(source, tmp_path / "moved")  # the way back does not need it
    to_hf(checkpoint, out, say=quiet)
    names = {file.name for file in (tmp_path / "moved").iterdir()}
    assert {file.name for file in out.iterdir()} == names | {DIGESTS}
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "moved" / name).read_bytes(), name


def test_a_stack_of_layers_of_different_dtypes_comes_back_as_it_was(tmp_path: Path):
    source = tmp_path / "source"
    model = tiny_models.make("llama").bfloat16()
    model.model.layers[1].mlp.up_proj.half()
    model.model.norm.float()
    model.save_pretrained(source)
    from_hf(source, tmp_path / "checkpoint", say=quiet)
    to_hf(tmp_path / "checkpoint", tmp_path / "out", say=quiet)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_the_command_line_on_eight_devices(tmp_path: Path, source: Path, capsys, eight_devices):
    checkpoint, out, small = tmp_path / "checkpoint", tmp_path / "out", tmp_path / "float16"

    def convert(*arguments) -> tuple[int, str]:
        code = main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    # There and back on several devices; one device reads what they have written.
    run_python(["scripts/convert.py", "from-hf", source, checkpoint, "--devices", "4"])
    back = ("to-hf", str(checkpoint), str(out), "--max-file-size", "40KB")
    assert eight_devices("jaxmoo.commands.convert", "main", back) == 0
    assert len(list(out.glob("*.safetensors"))) > 2
    code, shown = convert("verify", source, out)
    assert code == 0
    assert "30 of 30 tensors are equal to the byte" in shown
    assert "16 of 16 positions" in shown
    assert convert("to-hf", checkpoint, small, "--dtype", "float16")[0] == 0
    code, shown = convert("verify", source, small)
    assert code == 1
    assert "0 of 30 tensors are equal" in shown
    code, shown = convert("to-hf", checkpoint, out)
    assert code == 2
    assert "is not an empty directory" in shown
    with pytest.raises(SystemExit):
        main(["to-hf", "--help"])
    assert "examples:" in capsys.readouterr().out


def test_inspect_lists_sizes_tensors_and_files(tmp_path: Path, source: Path, capsys):
    from_hf(source, tmp_path / "checkpoint", say=quiet)
    for directory in (source, tmp_path / "checkpoint"):
        assert main(["inspect", str(directory)]) == 0
        shown = capsys.readouterr().out
        assert "model_type llama" in shown
        assert "30 tensors, 70,512 parameters" in shown
        assert "bfloat16: 30 tensors, 141,024 bytes" in shown
        row = r"model\.layers\.\*\.mlp\.up_proj\.weight +bfloat16\[80, 48\] +layers 0-2\n"
        assert re.search(row, shown)
        assert "config.json" in shown


def leave_a_run(source: Path, path: Path, config_file: Path) -> None:
    """A run's directory as training leaves it: steps 2 and 5, by which all trained was raised."""
    config = load_config(config_file)
    pattern = config.model.trainable
    model = load_model(source, segments=segments_for(model_config(source), pattern))
    _, params, _ = nnx.split(model, trainable_filter(pattern), ...)
    grid = mesh.make_mesh(4, language=4, fsdp=2)
    params = jax.device_put(params, mesh.parameter_shardings(grid, params, stacked=STACKED))
    run = RunDirectory(path)
    with run.claim(config):
        for step, nll in ((0, 3.0), (5, 2.5)):
            run.store_scores(step, {"ja": LanguageScore(nll, 1.0, 10, 30, 2)})
        with Checkpoints(run.checkpoints, keep=2) as checkpoints:
            for step in (2, 5):
                raised = jax.tree.map(lambda x, step=step: x + step, params)
                moments = jax.jit(optax.adamw(1e-3).init)(raised)
                state = TrainState(jnp.int32(step), raised, {"w": jnp.ones(3)}, moments)
                checkpoints.save(step, state)


@pytest.fixture(scope="module")
def run(tmp_path_factory, eight_devices) -> tuple[Path, Path]:
    """A run and the model it began with."""
    directory = tmp_path_factory.mktemp("training")
    source, path = directory / "model", directory / "run"
    tiny_models.save("llama", source, vocab_size=259)
    config = {
        "output": str(path),
        "model": {"source": str(source), "trainable": r"^layers\.1\.|^lm_head"},
        "data": {"source": "chatterbot", "seen": ["ja", "ko"], "batch_size": 2},
        "resolve": {"aggregator": "mgda"},
        "train": {"steps": 5},
    }
    (directory / "config.yaml").write_text(json.dumps(config))
    eight_devices("convert.test_models", "leave_a_run", source, path, directory / "config.yaml")
    return path, source


@pytest.mark.parametrize(("step", "raised_by"), [(2, 2), (5, 5), (None, 5)])
def test_any_step_of_a_run_is_exported_over_the_frozen_weights(run, tmp_path, step, raised_by):
    path, source = run
    to_hf(path, tmp_path / "out", step=step, say=quiet)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    for name, value in before.items():
        trained = ".layers.1." in name or name == "lm_head.weight"
        np.testing.assert_array_equal(after[name], value + raised_by if trained else value)


def test_an_exported_run_stops_where_its_replies_ended(run, tmp_path: Path):
    path, source = run
    base = tmp_path / "base"
    template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    shutil.copytree(source, base)
    tokenizer = bytes_tokenizer(["<s>", "</s>", "<|im_end|>"], chat_template=template)
    tokenizer.save_pretrained(base)
    to_hf(path, tmp_path / "without", say=quiet)
    to_hf(path, tmp_path / "out", base=str(base), say=quiet)
    before, same, after = (
        json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
        for directory in (source, tmp_path / "without", tmp_path / "out")
    )
    assert before == same == 1 and after == [1, 2], "the model's own and <|im_end|>"

    tokenizer.chat_template = template.replace("<|im_end|>", "\n")
    tokenizer.save_pretrained(base)
    said: list[str] = []
    to_hf(path, tmp_path / "unended", base=str(base), say=said.append)
    assert sum("no special token is known to end a reply" in line for line in said) == 1


def test_the_card_of_an_exported_run_states_what_is_known(run, tmp_path: Path):
    path, source = run
    to_hf(path, tmp_path / "out", say=quiet)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'language: ["ja", "ko"]' in card
    assert "5 steps of 5; one gradient per language, resolved by mgda" in card
    assert "| ja | 3 | 2.5 |" in card
    assert f"Base model: {source.name}\n" in card
    assert str(source.parent) not in card


def test_another_dtype_for_a_run(run, tmp_path: Path):
    to_hf(run[0], tmp_path / "out", dtype="bfloat16", say=quiet)
    assert {v.dtype for v in load_file(tmp_path / "out" / WEIGHTS).values()} == {
        jnp.dtype("bfloat16")
    }


def test_a_run_can_be_compared_and_inspected(run, capsys):
    path, source = map(str, run)
    assert main(["verify", source, path, "--step-b", "2"]) == 1
    shown = capsys.readouterr().out
    assert "20 of 30 tensors are equal to the byte" in shown
    assert main(["inspect", path]) == 0
    assert "checkpoints: 2, 5" in capsys.readouterr().out


def test_a_moved_base_model_can_be_named(run, tmp_path: Path):
    path, source = run
    moved = shutil.copytree(source, tmp_path / "elsewhere")
    copy = shutil.copytree(path, tmp_path / "run")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(source), str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match="gone"):
        to_hf(copy, tmp_path / "out", say=quiet)
    to_hf(copy, tmp_path / "out", base=str(moved), say=quiet)
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_what_cannot_be_converted_is_refused_and_nothing_is_written(run, tmp_path: Path, source):
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    from_hf(source, checkpoint, say=quiet)

    def refuse(match: str, path: Path, **options) -> None:
        with pytest.raises(CheckpointError, match=match):
            to_hf(path, out, say=quiet, **options)
        assert not out.exists()

    refuse("no checkpoint of step 3. It has 2, 5", run[0], step=3)
    refuse("is one checkpoint of a training run: name the run", run[0] / "checkpoints" / "2")
    refuse("is not a model: expected a Hugging Face directory", tmp_path)
    refuse("is not a training run", checkpoint, step=3)
    # From here on what the directory itself cannot tell: someone else may have made it.
    (checkpoint / DIGESTS).unlink()
    config = checkpoint / "config.json"
    good = config.read_text()
    config.write_text(json.dumps(json.loads(good) | {"intermediate_size": 81}))
    refuse(
        r"do not fit its config:\s+model\.layers\.0\.mlp\.down_proj\.weight: expected", checkpoint
    )
    config.write_text(json.dumps(json.loads(good) | {"num_hidden_layers": 10**4}))
    refuse("num_hidden_layers=10000, but its weights are only 30", checkpoint)
    config.write_text(good)
    for data in (checkpoint / "params").rglob("d/*"):
        data.write_bytes(b"\0" * data.stat().st_size)
    refuse("params cannot be restored", checkpoint)
    listed = json.loads((checkpoint / "checkpoint.json").read_text())
    listed["tensors"]["model.norm.weight"]["dtype"] = "int8"
    (checkpoint / "checkpoint.json").write_text(json.dumps(listed))
    refuse(r"checkpoint\.json is damaged: unknown dtype int8", checkpoint)
    listed["tensors"]["gone"] = listed["tensors"].pop("model.norm.weight") | {"dtype": "float16"}
    (checkpoint / "checkpoint.json").write_text(json.dumps(listed))
    refuse(r"missing: model\.norm\.weight\s+not part of this architecture: gone", checkpoint)
    (checkpoint / "checkpoint.json").write_text('{"format": 1, "tensors": {"a": 3}}')
    refuse(r"checkpoint\.json is damaged", checkpoint)
    (checkpoint / "checkpoint.json").write_text('{"format": 2}')
    refuse("has format 2, expected 1", checkpoint)
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_flipped_bit_in_any_file_of_a_checkpoint_directory_is_found(tmp_path: Path, source):
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    from_hf(source, checkpoint, say=quiet)
    files = [p for p in sorted(checkpoint.rglob("*")) if p.is_file()]
    assert len(files) > 8
    for file in files:
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=file.name) as refused:
            to_hf(checkpoint, out, say=quiet)
        assert str(checkpoint) in str(refused.value)
        file.write_bytes(good)
    assert not out.exists()


def test_a_target_that_holds_anything_is_left_alone(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for convert in (from_hf, to_hf):
        with pytest.raises(CheckpointError, match="is not an empty directory"):
            convert(source, out, say=quiet)
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["to-hf", "SOURCE", "OUT", "--dtype", "int8"],
        ["to-hf", "SOURCE", "OUT", "--max-file-size", "many"],
        ["from-hf", "no-such-model", "OUT"],
        ["verify", "SOURCE", "nowhere"],
        ["inspect", "nowhere"],
    ],
)
def test_bad_arguments_are_exit_code_2_and_one_line(source: Path, tmp_path, capsys, arguments):
    places = {"SOURCE": str(source), "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_an_opened_model_keeps_the_dtypes_of_its_files(source: Path):
    opened = open_model(source)
    assert opened.model.layers["0"].mlp.up_proj.kernel.dtype == jnp.bfloat16
    assert set(opened.dtypes.values()) == {"bfloat16"}
