"""A model small enough to train in seconds, and conversations in five languages to train it on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tiny_tokenizer import bytes_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # with SmolLM2's numbers
SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(SPECIAL) + 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}
# Per language, nouns and verbs. Two short conversations fit into a row of 96 bytes.
WORDS = {
    "it": ("gatto luna zio treno", "dorme canta arriva ride cade"),
    "pt": ("gato lua tio trem", "dorme canta chega ri cai"),
    "es": ("gato luna tío tren", "duerme canta llega ríe cae"),
    "fa": ("ماه گل آب باد", "رفت شد دید زد بود"),
    "de": ("Katze Mond Onkel Zug", "ruht singt kommt lacht fällt"),
}


def save_model(path: Path) -> Path:
    """Save a random decoder of four layers, without a tokenizer, in Hugging Face's format."""
    from flax import nnx
    from safetensors.numpy import save_file

    from jaxmoo.hf.names import hf_tensor
    from jaxmoo.models import Decoder, DecoderConfig, logical_paths
    from jaxmoo.models.paths import named_leaves

    path.mkdir()
    (path / "config.json").write_text(json.dumps(SIZES))
    state = nnx.state(Decoder(DecoderConfig.from_hf(SIZES), rngs=nnx.Rngs(0)))
    weights = {}
    for leaf_path, leaf in named_leaves(state):
        for layer, logical in enumerate(logical_paths(leaf_path, leaf.shape)):
            name, transposed, _ = hf_tensor(logical)
            value = np.asarray(leaf[layer] if leaf_path[0] == "layers" else leaf)
            weights[name] = np.ascontiguousarray(value.T if transposed else value)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random decoder that reads single bytes, in Hugging Face's format, with ChatML."""
    path = save_model(tmp_path_factory.mktemp("tiny") / "model")
    tokenizer = bytes_tokenizer(
        SPECIAL,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
        model_max_length=256,
    )
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> str:
    """The pattern of one file per language of ``WORDS``, each of 60 prompts and replies."""
    path = tmp_path_factory.mktemp("conversations")
    for language, (nouns, verbs) in WORDS.items():
        pairs = itertools.product(nouns.split(), enumerate(verbs.split()), (1, 6, 11))
        rows = [
            {"prompt": f"{n + start} {noun}?", "completion": f"{noun} {verb}"}
            for noun, (n, verb), start in pairs
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (path / f"{language}.jsonl").write_text(lines, "utf-8")
    return str(path / "{language}.jsonl")


def save_config(path: Path, settings: dict[str, Any], changes: dict[str, Any]) -> Path:
    """Write settings to a file, changed as in ``{"report": False, "train__steps": 1}``."""
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            settings.setdefault(section, {})[name] = value
        else:
            settings[section] = value
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def write_config(tiny_model, conversations, tmp_path) -> Callable[..., Path]:
    """Write a config of a short run of the tiny model, with changes; return its path."""

    def write(**changes: Any) -> Path:
        config = {
            "output": str(tmp_path / "run"),
            "report_samples": 0,
            "model": {"source": str(tiny_model), "trainable": r"^layers\.[23]\."},
            "data": {
                "source": conversations,
                "seen": ["it", "pt", "es", "fa"],
                "unseen": ["de"],
                "batch_size": 2,
                "sequence_length": 96,
                "max_held_out": 4,
                "cache": str(tmp_path / "tokens"),
            },
            "resolve": {"aggregator": "pcgrad", "blocks": "layer"},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
            "train": {"steps": 4, "checkpoint_every": 2},
        }
        return save_config(tmp_path / "config.yaml", config, changes)

    return write
