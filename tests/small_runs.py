"""A model small enough to train in seconds, with the real tokenizer and real data."""

import json
import shutil

import numpy as np
import pytest
import yaml
from flax import nnx
from safetensors.numpy import save_file

from jaxmoo.hf.names import hf_tensor
from jaxmoo.models import Decoder, DecoderConfig, logical_paths
from jaxmoo.models.paths import named_leaves


@pytest.fixture(scope="session")
def tiny_model(smollm2_dir, tmp_path_factory):
    """A random decoder of four layers that speaks SmolLM2's vocabulary, in HF format."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    path.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
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
    (path / "config.json").write_text(json.dumps(config))
    state = nnx.state(Decoder(DecoderConfig.from_hf(config), rngs=nnx.Rngs(0)))
    weights = {}
    for leaf_path, leaf in named_leaves(state):
        for layer, logical in enumerate(logical_paths(leaf_path, leaf.shape)):
            name, transposed = hf_tensor(logical)
            value = np.asarray(leaf[layer] if leaf_path[0] == "layers" else leaf)
            weights[name] = np.ascontiguousarray(value.T if transposed else value)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (smollm2_dir / name).exists():
            shutil.copy(smollm2_dir / name, path)
    return path


@pytest.fixture
def write_config(tiny_model, tmp_path):
    """Write a config of a short run of the tiny model, with changes; return its path."""

    def write(**changes):
        config = {
            "output": str(tmp_path / "run"),
            "model": {"source": str(tiny_model), "trainable": r"^layers\.[23]\."},
            "data": {
                "source": "chatterbot",
                "seen": ["it", "pt", "es", "fa"],
                "unseen": ["de"],
                "batch_size": 2,
                "sequence_length": 96,
                "max_held_out": 4,
            },
            "resolve": {"aggregator": "pcgrad", "blocks": "layer"},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
            "train": {"steps": 4, "checkpoint_every": 2},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                config[section][name] = value
            else:
                config[section] = value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write
