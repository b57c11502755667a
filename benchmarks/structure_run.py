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

import yaml

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from tiny_tokenizer import chat_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% generation %}{{ message['content'] + '</s>' }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_model(folder: Path) -> None:
    """Write a random Llama of two layers, with a tokenizer of single bytes."""
    from flax import nnx

    from jaxmoo.hf import save_model
    from jaxmoo.models import Decoder, DecoderConfig

    source = folder / "source"
    tokenizer = chat_tokenizer(TEMPLATE)
    tokenizer.save_pretrained(source)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
    }
    (source / "config.json").write_text(json.dumps(config))
    model = Decoder(DecoderConfig.from_hf(config), rngs=nnx.Rngs(0))
    save_model(model, folder / "model", source=source, dtype="float32")


def write_run(folder: Path) -> Path:
    """Write model, data and settings; return the file of the settings."""
    write_model(folder)
    for language in ("en", "fa"):
        records = [
            {"prompt": f"{language} question {i}", "completion": f"answer {i}"} for i in range(24)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{language}.jsonl").write_text(text)
    config = {
        "output": str(folder / "run"),
        "model": {"source": str(folder / "model")},
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
    sys.path.insert(0, str(root))
    config = write_run(folder)
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
