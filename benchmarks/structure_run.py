"""Train a tiny random model, and print which files of `jaxmoo` had a part in it.

    python benchmarks/structure_run.py CHECKOUT FOLDER

Two languages with a file of lines each, two steps of training, weights exported. A file has a part
if a function of it is called; what only runs on import is not counted. The last line printed is
JSON: the files' paths in the checkout. `benchmarks/structure.py` calls this.
"""

from __future__ import annotations

import inspect
import json
import runpy
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HIDDEN, INTERMEDIATE, LAYERS, HEAD = 16, 32, 2, 8
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% generation %}{{ message['content'] + '</s>' }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_model(folder: Path) -> None:
    """Write a random Llama of two layers, with a tokenizer of single bytes."""
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=TEMPLATE, **names
    ).save_pretrained(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary),
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HIDDEN // HEAD,
        "num_key_value_heads": 1,
        "head_dim": HEAD,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (len(vocabulary), HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (HIDDEN,),
                "post_attention_layernorm": (HIDDEN,),
                "self_attn.q_proj": (HIDDEN, HIDDEN),
                "self_attn.k_proj": (HEAD, HIDDEN),
                "self_attn.v_proj": (HEAD, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HIDDEN),
                "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
                "mlp.up_proj": (INTERMEDIATE, HIDDEN),
                "mlp.down_proj": (HIDDEN, INTERMEDIATE),
            }.items()
        }
    rng = np.random.default_rng(0)
    weights = {
        name: (0.1 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_run(folder: Path) -> Path:
    """Write model, data and settings; return the file of the settings."""
    model = folder / "model"
    model.mkdir(parents=True)
    write_model(model)
    for language in ("en", "fa"):
        records = [
            {"prompt": f"{language} question {i}", "completion": f"answer {i}"} for i in range(24)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{language}.jsonl").write_text(text)
    config = {
        "output": str(folder / "run"),
        "model": {"source": str(model)},
        "data": {
            "source": str(folder / "{language}.jsonl"),
            "seen": ["en", "fa"],
            "batch_size": 1,
            "sequence_length": 64,
            "held_out": 0.2,
        },
        "resolve": {"aggregator": "mgda", "blocks": "layer"},
        "train": {"steps": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def main() -> None:
    root, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    config = write_run(folder)
    sys.path.insert(0, str(root))
    import jaxmoo.train.run  # noqa: F401 -- so that little of what follows is an import

    called: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            called.add(frame.f_code)

    sys.argv = ["train.py", "--config", str(config)]
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        runpy.run_path(str(root / "scripts/train.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    functions = {code for code in called if code.co_flags & inspect.CO_OPTIMIZED}
    package = root / "jaxmoo"
    files = {Path(code.co_filename) for code in functions}
    passed = sorted(str(file.relative_to(root)) for file in files if package in file.parents)
    print(json.dumps(passed))


if __name__ == "__main__":
    main()
