"""Saving: what comes back is what was loaded, and transformers reads it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

import tiny_models
from jaxmoo import mesh
from jaxmoo.convert.models import from_hf
from jaxmoo.errors import CheckpointError
from jaxmoo.files.digests import DIGESTS
from jaxmoo.hf import ModelCard, load_model, save_model
from jaxmoo.hf.directory import new_directory
from jaxmoo.hf.save import Tensor, write_weights
from tiny_models import tokens_and_mask


def tensors(directory: Path) -> dict[str, tuple[str, bytes]]:
    """Every tensor of a directory as its dtype and its bytes."""
    import torch

    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            for name in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(name)
                found[name] = str(tensor.dtype), tensor.view(torch.uint8).numpy().tobytes()
    return found


def logits_of(directory: Path, tokens: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.float().numpy()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A model that no test changes."""
    directory = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama", directory)
    return directory


# Every dtype, and every architecture.
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("llama", "float32"),
        ("llama", "bfloat16"),
        ("llama", "float16"),
        ("llama_tied", "bfloat16"),
        ("qwen2", "float16"),
        ("qwen3", "bfloat16"),
    ],
)
def test_an_unchanged_model_is_saved_with_identical_bytes(tmp_path: Path, variant, dtype):
    import torch

    source, out = tmp_path / "source", tmp_path / "out"
    tiny_models.save(variant, source, dtype=getattr(torch, dtype))
    save_model(load_model(source, segments=(0, 2)), out, source=source)
    assert tensors(out) == tensors(source)
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    tokens, _ = tokens_and_mask(131, (2, 9))
    np.testing.assert_array_equal(logits_of(out, tokens), logits_of(source, tokens))


def test_each_tensor_keeps_its_own_dtype(tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    model = tiny_models.make("llama").bfloat16()
    model.model.norm.float()
    model.save_pretrained(source)
    assert {dtype for dtype, _ in tensors(source).values()} == {"torch.bfloat16", "torch.float32"}
    save_model(load_model(source), out, source=source)
    assert tensors(out) == tensors(source)


def test_a_changed_parameter_is_the_only_change(tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_models.save("llama", source)
    model = load_model(source, segments=(0, 2))
    kernel = model.layers["2"].mlp.up_proj.kernel
    kernel.set_value(kernel[...] + 1)
    save_model(model, out, source=source)
    before, after = tensors(source), tensors(out)
    assert [n for n in before if before[n] != after[n]] == ["model.layers.2.mlp.up_proj.weight"]


@pytest.mark.parametrize("asked", [jnp.bfloat16, "float16"])
def test_another_dtype_changes_the_tensors_and_one_field_of_the_config(tmp_path: Path, asked):
    import torch
    from transformers import AutoModelForCausalLM

    source, out = tmp_path / "source", tmp_path / "out"
    oracle = tiny_models.save("llama", source)
    save_model(load_model(source), out, source=source, dtype=asked)
    name = jnp.dtype(asked).name
    config, changed = (json.loads((d / "config.json").read_text()) for d in (source, out))
    assert {k for k in changed if changed[k] != config.get(k)} == {"dtype"}
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for key, value in loaded.state_dict().items():
        assert value.dtype == getattr(torch, name)
        assert torch.equal(value, oracle.state_dict()[key].to(value.dtype))


def test_large_models_are_split_into_files_with_an_index(tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_models.save("llama", source)
    save_model(load_model(source), out, source=source, max_shard_bytes=40_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(len(b) for _, b in tensors(out).values())
    assert tensors(out) == tensors(source)
    tokens, _ = tokens_and_mask(131, (2, 9))
    np.testing.assert_array_equal(logits_of(out, tokens), logits_of(source, tokens))
    again = tmp_path / "again"
    save_model(load_model(out), again, source=out)
    assert tensors(again) == tensors(source)


def test_files_are_those_the_safetensors_library_writes(tmp_path: Path):
    values = {
        "b": np.ones((2, 3), np.float32),
        "a": np.full(2, 3, ml_dtypes.bfloat16),
        "z": np.arange(3.0),
        'é"': np.full((), 7, np.float32),
        "h": np.zeros((0, 4), np.float16),
    }
    save_file(values, tmp_path / "library.safetensors", metadata={"format": "pt"})
    write_weights(tmp_path, [Tensor(n, v.shape, v.dtype, lambda v=v: v) for n, v in values.items()])
    assert (tmp_path / "model.safetensors").read_bytes() == (
        tmp_path / "library.safetensors"
    ).read_bytes()


def on_eight_devices(source: Path, out: Path) -> None:
    """Load a model onto a mesh of eight devices, and save it from there."""
    grid = mesh.make_mesh(4, language=4, fsdp=2)
    model = load_model(
        source,
        segments=(0, 1),
        param_dtype=None,
        shardings=lambda s: mesh.parameter_shardings(grid, s, stacked=r"^layers\."),
    )
    sizes = [
        x.sharding.num_devices * x.addressable_shards[0].data.size // x.size
        for x in jax.tree.leaves(nnx.state(model))
    ]
    assert sizes.count(1) > len(sizes) // 2, sizes  # sharded, not replicated
    save_model(model, out, source=source, max_shard_bytes=40_000)


def test_a_model_sharded_over_eight_devices_is_saved_with_identical_bytes(
    tmp_path: Path, eight_devices
):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_models.make("qwen3").bfloat16().save_pretrained(source)
    eight_devices("hf.test_save", "on_eight_devices", source, out)
    assert len(list(out.glob("*.safetensors"))) > 2
    assert tensors(out) == tensors(source)


def test_the_card_says_what_it_is_given_and_no_more(tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_models.save("llama", source)
    model = load_model(source)
    save_model(model, out, source=source)
    assert not (out / "README.md").exists()
    card = ModelCard(
        "Kleines Modell",
        base_model="org/base",
        languages=("de", "uk"),
        method="full fine-tuning",
        data="texts",
        metrics={"NLL": {"de": {"before": 2.0, "after": 1.23456}, "uk": {"after": 3.0}}},
    )
    save_model(model, tmp_path / "with", source=source, card=card)
    text = (tmp_path / "with" / "README.md").read_text("utf-8")
    loaded = huggingface_hub.ModelCard(text)
    assert loaded.data.base_model == "org/base"
    assert loaded.data.language == ["de", "uk"]
    assert loaded.data.library_name == "transformers"
    facts = ["Base model: org/base", "Languages: de, uk", "Method: full fine-tuning", "Data: texts"]
    for fact in facts:
        assert f"- {fact}\n" in text
    assert "| de | 2 | 1.235 |\n| uk |  | 3 |\n" in text
    plain = ModelCard("a", base_model="./my model: v1").text()
    assert huggingface_hub.ModelCard(plain).data.base_model is None


def test_a_disk_that_is_too_small_is_noticed_before_writing(tmp_path: Path):
    huge = Tensor("a", (2**60,), np.dtype(np.float32), lambda: np.zeros(1, np.float32))
    expected = r"bytes of free space, the weights need .* or choose a path on a larger disk"
    with pytest.raises(CheckpointError, match=expected):
        write_weights(tmp_path, [huge])
    assert not list(tmp_path.iterdir())


@contextmanager
def full_disk() -> Iterator[None]:
    """The system refuses to write more, as it does where a disk is full."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_disk_that_fills_up_leaves_nothing_behind(llama: Path, tmp_path: Path):
    model, out = load_model(llama), tmp_path / "out"
    refused = []
    for write in (
        lambda: save_model(model, out, source=llama),
        lambda: from_hf(llama, out, say=lambda _: None),
    ):
        with full_disk(), pytest.raises(CheckpointError, match="could not be written") as error:
            write()
        refused.append(str(error.value))
    assert "File too large" in refused[0]
    for text in refused:
        assert f"{out}" in text
        assert "Nothing was left behind." in text
    assert "Free some space, or choose a path on a larger disk." in refused[0]
    assert not list(tmp_path.iterdir())


def test_what_threads_still_write_after_an_error_is_removed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    remove, removed = shutil.rmtree, []

    def rmtree(path: Path, **options: Any) -> None:
        remove(path, **options)
        if not removed:  # a thread comes late
            (path / "part").mkdir(parents=True)
        removed.append(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(CheckpointError, match="Nothing was left behind"):  # noqa: SIM117
        with new_directory(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "full")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_real_model_survives_a_round_trip(smollm2_dir: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    save_model(load_model(smollm2_dir, segments=(0, 22)), out, source=smollm2_dir)
    names = {file.name for file in smollm2_dir.iterdir()} | {DIGESTS}
    assert {file.name for file in out.iterdir()} == names
    for name in names - {DIGESTS}:
        assert (out / name).read_bytes() == (smollm2_dir / name).read_bytes(), name
    with safe_open(out / "model.safetensors", framework="np") as handle:
        assert "lm_head.weight" not in handle.keys()  # noqa: SIM118
    assert AutoTokenizer.from_pretrained(out).chat_template


@pytest.mark.parametrize(
    ("own", "stop", "expected"),
    [
        ({"eos_token_id": 1, "top_k": 5}, (2,), {"eos_token_id": [1, 2], "top_k": 5}),
        ({"eos_token_id": [3, 1]}, (2, 3), {"eos_token_id": [3, 1, 2]}),
        ({"eos_token_id": [3, 1]}, (1,), {"eos_token_id": [3, 1]}),
        ({"top_k": 5}, (9,), {"eos_token_id": [2, 9], "top_k": 5}),
        (None, (9,), {"bos_token_id": 1, "pad_token_id": 2, "eos_token_id": [2, 9]}),
        (None, (2,), None),
        (None, (), None),
    ],
)
def test_a_model_stops_at_its_own_tokens_and_at_those_it_was_trained_with(
    own, stop, expected, tmp_path: Path
):
    from transformers import AutoModelForCausalLM

    source, out = tmp_path / "source", tmp_path / "out"
    tiny_models.save("llama", source, bos_token_id=1, eos_token_id=2)
    file = source / "generation_config.json"
    file.unlink(missing_ok=True)
    if own is not None:
        file.write_text(json.dumps(own))
    save_model(load_model(source), out, source=source, stop=stop)
    written = out / "generation_config.json"
    assert (json.loads(written.read_text()) if written.exists() else None) == expected
    # transformers agrees, with and without the file.
    found = AutoModelForCausalLM.from_pretrained(out).generation_config
    tokens = (expected or {"eos_token_id": 2})["eos_token_id"]
    assert found.eos_token_id == tokens and (own is not None or found.bos_token_id == 1)


def test_a_target_that_holds_anything_is_refused_and_left_alone(tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_models.save("llama", source)
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="already exists and is not an empty directory"):
        save_model(load_model(source), out, source=source)
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    save_model(load_model(source), out, source=source)


def test_nothing_is_left_behind_when_saving_fails(tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_models.save("llama", source)
    model = load_model(source)
    table = model.lm_head.embedding
    table.set_value(table[...] * 1e6)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has values beyond the range"):
        save_model(model, out, source=source, dtype=jnp.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_source_of_another_model_is_refused(tmp_path: Path):
    tiny_models.save("llama", tmp_path / "a")
    tiny_models.save("llama", tmp_path / "b", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match="source must be the directory it was loaded from"):
        save_model(load_model(tmp_path / "a"), tmp_path / "out", source=tmp_path / "b")
    assert not (tmp_path / "out").exists()


def test_an_unknown_dtype_is_refused(tmp_path: Path):
    tiny_models.save("llama", tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"dtype must be one of float32.*got int8"):
        save_model(load_model(tmp_path / "a"), tmp_path / "o", source=tmp_path / "a", dtype="int8")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_files_can_be_read_by_whom_the_users_mask_allows(tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_models.save("llama", source)
    save_model(load_model(source), out, source=source)
    modes = {file.stat().st_mode & 0o777 for file in out.iterdir()}
    assert len(modes) == 1
