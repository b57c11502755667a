"""A finished run of a tiny model, on data and with a tokenizer made here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from jaxmoo.config.training import load_config
from jaxmoo.train.run import train
from tiny_tokenizer import chat_tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
LETTERS = {"en": "abcdefgh", "es": "hijklmnop", "it": "nopqrstu", "de": "stuvwxyz"}


def words(language: str, lengths: np.ndarray, seed: int) -> list[str]:
    """Sentences of so many words in a language's own letters."""
    rng = np.random.default_rng(seed)
    return [
        " ".join("".join(rng.choice(list(LETTERS[language]), 3)) for _ in range(n)) for n in lengths
    ]


@pytest.fixture(scope="session")
def sentences(tmp_path_factory) -> str:
    """Parallel text; the pattern of its files."""
    directory = tmp_path_factory.mktemp("sentences")
    lengths = np.random.default_rng(0).integers(2, 9, 32)
    for seed, language in enumerate(LETTERS):
        text = "\n".join(words(language, lengths, seed))
        (directory / f"{language}.txt").write_text(text + "\n")
    return str(directory / "{language}.txt")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """Three steps in three languages, checkpoints of steps 2 and 3."""
    directory = tmp_path_factory.mktemp("analysed")
    tiny_models.save("llama", directory / "model", vocab_size=262, max_position_embeddings=128)
    chat_tokenizer(TEMPLATE).save_pretrained(directory / "model")
    for seed, language in enumerate(LETTERS):
        lengths = np.full(40, 3)
        pairs = zip(words(language, lengths, seed), words(language, lengths, seed + 9), strict=True)
        lines = [json.dumps({"prompt": a, "completion": b}) for a, b in pairs]
        (directory / f"{language}.jsonl").write_text("\n".join(lines) + "\n")
    config = {
        "output": str(directory / "run"),
        "tensorboard": False,
        "report": False,
        "export": False,
        "model": {"source": str(directory / "model"), "trainable": r"^layers\.[12]\."},
        "data": {
            "source": str(directory / "{language}.jsonl"),
            "seen": ["en", "es", "it"],
            "unseen": ["de"],
            "batch_size": 4,
            "sequence_length": 96,
            "max_held_out": 4,
        },
        "resolve": {"aggregator": "unit_mean", "blocks": "module"},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"steps": 3, "checkpoint_every": 1, "gram_every": 2},
    }
    (directory / "config.yaml").write_text(json.dumps(config))
    train(load_config(directory / "config.yaml"), say=lambda _: None)
    return directory / "run"
