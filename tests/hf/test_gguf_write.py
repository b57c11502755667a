"""GGUF files as they are written: read back here, by transformers and by llama.cpp itself."""

from __future__ import annotations

import collections
import json
import re
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import tiny_models
from jaxmoo.commands.convert import _KINDS, main
from jaxmoo.errors import CheckpointError
from jaxmoo.hf import load_tokenizer
from jaxmoo.hf.generation import stop_tokens
from jaxmoo.hf.gguf import convert_gguf
from jaxmoo.hf.gguf_architectures import of_family
from jaxmoo.hf.gguf_rope import scaling_fields
from jaxmoo.hf.gguf_tokenizer import _WORDS
from jaxmoo.hf.gguf_write import KINDS, save_gguf
from jaxmoo.models import Decoder, DecoderConfig
from jaxmoo.models.rope import LinearRope, Rope, YarnRope
from small_runs import CHATML

# Rows of 64 and 96 elements: whole blocks of Q8_0, of 32.
SIZES: dict[str, Any] = {
    "vocab_size": 330,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,  # not hidden_size / num_attention_heads
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Names and what they have of their own.
SQUARE = {"head_dim": 16}  # all heads together as wide as the model
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3_rope": {
        "rope_parameters": tiny_models.LLAMA3_ROPE | {"original_max_position_embeddings": 8192}
    },
    "qwen2": SQUARE,
    "qwen3": {},
    # The fourth layer is the one without rotary positions.
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "granite": {},
    "gemma2": {"query_pre_attn_scalar": 24},
    # The sixth layer is the one without a window.
    "gemma3_text": {"num_hidden_layers": 6, "layer_types": None, "query_pre_attn_scalar": 24},
    "olmo2": SQUARE | {"seed": 3},
    "olmo3": SQUARE | {"num_hidden_layers": 4, "layer_types": None},
    "cohere": SQUARE | {"seed": 4},
    "cohere2": SQUARE | {"num_hidden_layers": 4, "layer_types": None},
    "phi3": SQUARE
    | {
        "original_max_position_embeddings": 8,
        "rope_parameters": tiny_models.VARIANTS["phi3"]["rope_parameters"]
        | {
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        },
    },
    "mixtral": {"sliding_window": None},
    "qwen3_moe": {
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "norm_topk_prob": True,
        "moe_intermediate_size": 32,
    },
}
TEXT = (
    "The cat's 12345 hats, l'\u00e9t\u00e9 na\u00efve; 你好 <|im_start|>user\nI'll\n\n go<|im_end|>"
)


SPECIAL: dict[str, Any] = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "chat_template": CHATML,
    "model_max_length": 96,
}
# Which tokenizer a variant gets; smollm's where it does not say.
TOKENIZERS = {
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "qwen3_moe": "qwen2",
    "llama3_rope": "llama-bpe",
    "olmo2": "dbrx",
    "cohere": "command-r",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "mixtral": "llama-2",
}


def tokenizer(pre: str):
    """A tokenizer of 300 tokens that splits text as the models of that name do."""
    from tokenizers import Regex, normalizers
    from transformers import PreTrainedTokenizerFast

    if pre in ("gemma", "llama-2"):
        return sentencepiece(pre == "llama-2")
    bpe = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre in ("qwen2", "command-r"):
        bpe.normalizer = normalizers.NFC()
    gpt2 = pre in ("smollm", "command-r")
    split = pre_tokenizers.Digits(individual_digits=True)
    if not gpt2:
        digits = "" if pre == "qwen2" else "{1,3}"
        split = pre_tokenizers.Split(Regex(_WORDS % digits), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT, "12 123 12345 the hat that the cat had"] * 3, trainer)
    bpe.add_tokens(["<think>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **SPECIAL)


def sentencepiece(prefix: bool):
    """A tokenizer of 301 tokens as SentencePiece's, with what stands for a space before a text."""
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    space = "\u2581"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    joined = (
        f"{space}t he the {space}the at {space}hat {space}c {space}cat ha had th {space}h".split()
    )
    characters = sorted({character for token in joined for character in token})
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *joined]
    tokens += [space * 2, space * 3]
    tokens += [f"{space}x{i}" for i in range(300 - len(tokens))]  # which nothing makes
    vocabulary = {token: number for number, token in enumerate(tokens)}
    # Of the spaces first, then by the place of what they make, as transformers has them.
    merges = [(space * 2, space), (space, space * 2), (space, space)]
    for token in joined:
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [(a, b) for a, b in halves if a in vocabulary and b in vocabulary]
    if prefix:  # nor do these have tokens of spaces
        del merges[:3]
        for token in (space * 2, space * 3):
            vocabulary[f"z{len(token)}"] = vocabulary.pop(token)
    bpe = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    first = [normalizers.Prepend(space)] if prefix else []
    bpe.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", space)])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    bpe.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    bpe.add_special_tokens(special)
    bpe.add_tokens(["<think>", *([] if prefix else [space * 2, space * 3])])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", **SPECIAL)


def few_bits(model):
    """The same model; Gemma's norms are rounded, so that they are the same less 1 and plus 1."""
    if model.config.model_type.startswith("gemma"):
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A function: a directory of a variant, its rows of numbers in a dtype; kept."""
    made = {}

    def make(variant: str, dtype: str = "float32") -> Path:
        if (variant, dtype) not in made:
            import torch

            path = tmp_path_factory.mktemp(variant) / "model"
            settings = SIZES | VARIANTS.get(variant, {})
            few_bits(tiny_models.make(variant, **settings)).to(
                getattr(torch, dtype)
            ).save_pretrained(path)
            tokenizer(TOKENIZERS.get(variant, "smollm")).save_pretrained(path)
            made[variant, dtype] = path
        return made[variant, dtype]

    return make


def export(source: Path, file: Path, *more: str) -> Path:
    assert main(["to-gguf", str(source), str(file), *more]) == 0
    return file


def test_the_command_offers_the_types_that_can_be_written():
    assert tuple(KINDS) == _KINDS


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_is_the_same_model_to_the_byte(source, variant, tmp_path):
    """In float32; and the second file is the first."""
    model = source(variant)
    file = export(model, tmp_path / "a.gguf", "--type", "f32")
    convert_gguf(file, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        model / "model.safetensors"
    ).read_bytes()
    ours, theirs = load_tokenizer(tmp_path / "back"), load_tokenizer(model)
    for special in (True, False):
        ids = theirs.encode(TEXT, add_special_tokens=special)
        assert ours.encode(TEXT, add_special_tokens=special) == ids
    assert ours.chat_template == theirs.chat_template == CHATML
    for name in ("bos", "eos", "pad"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token")
    again = export(tmp_path / "back", tmp_path / "b.gguf")
    fields = [
        {name: field.contents() for name, field in gguf.GGUFReader(x).fields.items()}
        for x in (file, again)
    ]
    assert fields[0].pop("general.name") == "model" and fields[1].pop("general.name") == "back"
    # What fills up the table of vectors are tokens like others to who reads the file.
    kinds = [one.pop("tokenizer.ggml.token_type") for one in fields]
    assert kinds[0][:301] == kinds[1][:301] and set(kinds[0][301:]) == {gguf.TokenType.UNUSED}
    assert fields[0] == fields[1]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("variant", "own"),
    [
        ("llama", {}),
        ("qwen2", SQUARE),
        ("qwen3", {"head_dim": 128}),
        # What transformers does not read has its defaults: caps, attention's scale, frequencies.
        (
            "gemma2",
            {
                "head_dim": 256,
                "query_pre_attn_scalar": 256,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
        ),
        (
            "gemma3_text",
            VARIANTS["gemma3_text"]
            | {"head_dim": 256, "query_pre_attn_scalar": 256, "rope_parameters": None},
        ),
        ("phi3", SQUARE | {"rope_parameters": None}),
        ("qwen3_moe", VARIANTS["qwen3_moe"] | {"moe_intermediate_size": 768}),
    ],
)
def test_transformers_reads_the_weights_and_settings(variant, own, tmp_path):
    """By its own names, permutation and settings; the width of Qwen's heads it does not read."""
    import torch
    from transformers import AutoModelForCausalLM

    model = tmp_path / "model"
    few_bits(tiny_models.make(variant, **SIZES | own)).save_pretrained(model)
    tokenizer("smollm").save_pretrained(model)
    export(model, tmp_path / "a.gguf")
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="a.gguf", dtype=torch.float32
    ).eval()
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    assert type(found) is type(oracle)
    expected = oracle.state_dict()
    for name, tensor in found.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name].numpy(), name)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        np.testing.assert_allclose(found(ids).logits, oracle(ids).logits, atol=1e-4)


def tensors(file: Path) -> dict:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def plain(tensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def test_half_precision_is_kept_and_eight_bits_are_as_near_as_they_can_be(source, tmp_path):
    exact = tensors(export(source("qwen3"), tmp_path / "f32.gguf"))
    for name, dtype in {"f16": "float16", "bf16": "bfloat16"}.items():
        model = source("qwen3", dtype)
        file = export(model, tmp_path / f"{name}.gguf")  # as the model came
        whole = tensors(export(model, tmp_path / f"{name}-f32.gguf", "--type", "f32"))
        for key, tensor in tensors(file).items():
            kind = "F32" if len(tensor.shape) == 1 else name.upper()
            assert tensor.tensor_type.name == kind
            np.testing.assert_array_equal(plain(tensor), plain(whole[key]), key)
    eight = tensors(export(source("qwen3"), tmp_path / "q8_0.gguf", "--type", "q8_0"))
    assert eight.keys() == exact.keys()
    for key, tensor in eight.items():
        value, found = plain(exact[key]), plain(tensor)
        if len(tensor.shape) == 1:
            np.testing.assert_array_equal(found, value)
            continue
        assert tensor.tensor_type.name == "Q8_0"
        largest = np.abs(value.reshape(*value.shape[:-1], -1, 32)).max(-1, keepdims=True)
        # Half a step of 1/127 of the block's largest; its scale is rounded to 11 bits.
        bound = largest / 127 * 0.5 + largest * 2.0**-11
        error = np.abs(found - value).reshape(*value.shape[:-1], -1, 32)
        assert (error <= bound * 1.001).all()


def test_rows_that_eight_bits_do_not_fit_are_half_precision(tmp_path):
    settings: dict[str, Any] = SIZES | {"intermediate_size": 100}
    tiny_models.save("llama", tmp_path / "model", **settings)
    tokenizer("smollm").save_pretrained(tmp_path / "model")
    found = tensors(export(tmp_path / "model", tmp_path / "a.gguf", "--type", "q8_0"))
    assert found["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert found["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"


def test_gemmas_norms_are_those_that_are_computed_with(tmp_path):
    """Scales plus 1, rounded to float32: less 1 again they may have other last bits, no more."""
    tiny_models.save("gemma2", tmp_path / "model", **SIZES | VARIANTS["gemma2"])
    tokenizer("gemma").save_pretrained(tmp_path / "model")
    file = export(tmp_path / "model", tmp_path / "a.gguf")
    convert_gguf(file, tmp_path / "back")
    there, back = (
        load_file(tmp_path / name / "model.safetensors")["model.norm.weight"]
        for name in ("model", "back")
    )
    assert (there != back).any()
    np.testing.assert_array_equal(there + np.float32(1), back + np.float32(1))
    again = tensors(export(tmp_path / "back", tmp_path / "b.gguf"))
    for name, tensor in tensors(file).items():
        np.testing.assert_array_equal(tensor.data, again[name].data, name)


def test_experts_are_one_tensor_and_their_router_is_float32(source, tmp_path):
    model = source("mixtral")
    found = tensors(export(model, tmp_path / "a.gguf", "--type", "bf16"))
    weights = load_file(model / "model.safetensors")
    gates = [weights[f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight"] for e in range(5)]
    merged = plain(found["blk.1.ffn_gate_exps.weight"])
    assert found["blk.1.ffn_gate_exps.weight"].tensor_type.name == "BF16"
    np.testing.assert_allclose(merged, np.stack(gates), rtol=2**-8)
    router = found["blk.1.ffn_gate_inp.weight"]
    np.testing.assert_array_equal(
        router.data, weights["model.layers.1.block_sparse_moe.gate.weight"]
    )


def test_a_window_becomes_the_longest_text(source, tmp_path, capsys):
    convert_gguf(export(source("mistral"), tmp_path / "a.gguf"), tmp_path / "back")
    assert "have no sliding window (16 tokens)" in capsys.readouterr().out
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["max_position_embeddings"] == 16 and config["model_type"] == "llama"


def test_what_ends_a_reply_is_in_the_file(source, tmp_path):
    model = shutil.copytree(source("llama"), tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    file = export(model, tmp_path / "a.gguf")
    fields = gguf.GGUFReader(file).fields
    ends = {name: fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")}
    assert ends == {"eos": 2, "eot": 5}
    convert_gguf(file, tmp_path / "back")
    assert stop_tokens(tmp_path / "back") == [2, 5]


@pytest.mark.parametrize("scaling", [LinearRope(8), YarnRope(8, 4096)])
def test_factors_are_floating_point_whatever_a_config_has(scaling):
    """llama.cpp reads no others."""
    architecture = of_family("qwen3")
    assert architecture is not None
    fields, _ = scaling_fields(Rope(1e6, scaling), 64, architecture)
    assert isinstance(fields["rope.scaling.factor"], float)


YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 24, "attention_factor": 2.0}


@pytest.mark.parametrize(
    ("family", "own", "message"),
    [
        ("apertus", {}, "are written of .*; this one is apertus"),
        ("llama", {"rope_parameters": YARN}, "with rope_scaling=YarnRope"),
        ("qwen2", {}, "cannot hold heads of width 24: .*, 4 of them are hidden_size=64"),
        ("qwen3", {"rope_parameters": tiny_models.LLAMA3_ROPE}, "cannot hold stretched rotary"),
        ("qwen3_windows", {"use_sliding_window": True, "max_window_layers": 1}, "layer_kinds="),
        ("gemma2", {}, "with attention_multiplier="),
        ("gemma2", {"attn_logit_softcapping": None}, "with .*attn_logit_softcapping=None"),
        ("gemma3_text", {"final_logit_softcapping": 3.0}, "with .*final_logit_softcapping=3.0"),
        ("gemma3_text", {}, "with .*layer_kinds="),
        ("olmo2", SQUARE | {"tie_word_embeddings": True}, "olmo2 model cannot be its embedding"),
        ("olmo3", SQUARE, "with .*layer_kinds="),
        ("cohere", SQUARE | {"tie_word_embeddings": False}, "command-r model must be its embed"),
        ("qwen3_moe", VARIANTS["qwen3_moe"] | {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("qwen3_moe", VARIANTS["qwen3_moe"] | {"mlp_only_layers": [1]}, r"dense_layers=\(1,\)"),
    ],
)  # fmt: skip
def test_models_that_would_become_others_are_refused(family, own, message, tmp_path):
    from transformers import AutoConfig

    variant = tiny_models.VARIANTS.get(family, {})
    settings = tiny_models.SIZES | variant | SIZES | {"num_hidden_layers": 3} | own
    theirs = AutoConfig.for_model(family.removesuffix("_windows"), **settings)
    with pytest.raises(CheckpointError, match=message):
        save_gguf(
            Decoder.abstract(DecoderConfig.from_hf(theirs.to_dict())),
            tmp_path / "a.gguf",
            tokenizer=tokenizer("smollm"),
            dtypes=collections.defaultdict(lambda: "float32"),
        )
    assert not list(tmp_path.iterdir())


def test_files_that_are_there_or_called_otherwise_are_refused(source, tmp_path, capsys):
    path = source("llama")
    (tmp_path / "a.gguf").touch()
    assert main(["to-gguf", str(path), str(tmp_path / "a.gguf")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["to-gguf", str(path), str(tmp_path / "a")]) == 2
    assert "ends in .gguf" in capsys.readouterr().err


def without_a_merge(content: dict) -> None:
    del content["model"]["merges"][-1]


def with_mixed_merges(content: dict) -> None:
    """The two ways to make " the" apart."""
    merges = content["model"]["merges"]
    merges.insert(0, merges.pop(next(i for i, m in enumerate(merges) if m[0] == "\u2581t")))


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        (
            "llama",
            lambda content: content.update(pre_tokenizer={"type": "Whitespace"}),
            "splits text in a way that has no name here: known are pre=smollm, .*to_gguf.py",
        ),
        # A space before the first text only, not before that after a special token.
        (
            "mixtral",
            lambda content: content.update(
                normalizer=None,
                pre_tokenizer={
                    "type": "Metaspace",
                    "replacement": "\u2581",
                    "prepend_scheme": "first",
                    "split": False,
                },
            ),
            "splits text in a way that has no name here: known are add_space_prefix",
        ),
        ("gemma2", without_a_merge, "joins tokens in an order that no scores say"),
        ("gemma2", with_mixed_merges, "joins tokens in an order that no scores say"),
    ],
    ids=["split", "prefix", "missing", "mixed"],
)
def test_other_tokenizers_are_refused(source, tmp_path, capsys, variant, change, message):
    model = shutil.copytree(source(variant), tmp_path / "model")
    content = json.loads((model / "tokenizer.json").read_text())
    change(content)
    (model / "tokenizer.json").write_text(json.dumps(content))
    assert main(["to-gguf", str(model), str(tmp_path / "a.gguf")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tokens_that_take_in_spaces_are_refused(source, tmp_path, capsys):
    model = shutil.copytree(source("phi3"), tmp_path / "model")
    content = json.loads((model / "tokenizer.json").read_text())
    content["added_tokens"][0]["rstrip"] = True
    (model / "tokenizer.json").write_text(json.dumps(content))
    assert main(["to-gguf", str(model), str(tmp_path / "a.gguf")]) == 2
    assert "'<|endoftext|>' takes in the spaces beside it" in capsys.readouterr().err


def test_values_beyond_float16_are_refused(source, tmp_path, capsys):
    from safetensors.numpy import save_file

    model = shutil.copytree(source("llama"), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert main(["to-gguf", str(model), str(tmp_path / "a.gguf"), "--type", "f16"]) == 2
    assert "up_proj.weight has values beyond the range of float16" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_reads_the_same_model(source, variant, tmp_path):
    """Where a package with llama.cpp is installed: its tokens, its prompt, and its likelihoods."""
    llama_cpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: xllamacpp")
    import torch
    from transformers import AutoModelForCausalLM

    model = source(variant)
    export(model, tmp_path / "a.gguf")
    params = llama_cpp.CommonParams()
    params.model.path = str(tmp_path / "a.gguf")
    params.n_ctx, params.n_parallel, params.warmup = 96, 1, False
    server = llama_cpp.Server(params)

    def ask(path: str, **request):
        body = json.dumps(request).encode()
        with urllib.request.urlopen(f"{server.listening_address}{path}", body) as answer:
            return json.load(answer)

    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert ask("/tokenize", content=TEXT, parse_special=True)["tokens"] == ids
    messages = [{"role": "user", "content": "Hi!"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ask("/apply-template", messages=messages)["prompt"] == prompt

    answer = ask("/completion", prompt=ids, n_predict=1, n_probs=20, temperature=0)
    first = answer["completion_probabilities"][0]
    found = {one["id"]: one["logprob"] for one in first["top_logprobs"]}
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0, -1].log_softmax(-1).numpy()
    assert first["id"] == expected.argmax()
    # llama.cpp keeps keys and values in half precision.
    np.testing.assert_allclose(list(found.values()), expected[list(found)], atol=0.02)
