"""A random chat model that reads single bytes, and a small parallel data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tiny_models
from small_runs import CHATML, SPECIAL
from tiny_tokenizer import bytes_tokenizer

if TYPE_CHECKING:  # seconds of importing, which collecting does without
    from transformers import PreTrainedTokenizerFast

LABELS = ["sports", "travel", "politics"]
TEXTS = {
    "en": ["A fast horse", "The long way home", "They voted", "A ball", "By train", "A new law"],
    "ja": ["速い馬", "長い帰り道", "投票した", "ボール", "電車で", "新しい法律"],
    "uk": ["Швидкий кінь", "Довга дорога", "Вони голосували", "М'яч", "Потягом", "Закон"],
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and ChatML."""
    return bytes_tokenizer(
        SPECIAL,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        model_max_length=256,
    )


@pytest.fixture(scope="session")
def chat_model(tokenizer, tmp_path_factory) -> Path:
    """A directory as exported, with weights of a spread that makes choices differ."""
    import torch

    path = tmp_path_factory.mktemp("chat") / "model"
    model = tiny_models.make(
        "llama",
        vocab_size=260,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(1.5)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def topics(tmp_path_factory) -> str:
    """A file pattern: text, topic and id, parallel in three languages."""
    path = tmp_path_factory.mktemp("topics")
    for language, texts in TEXTS.items():
        rows = [
            {"id": str(i), "text": text, "topic": LABELS[i % 3]} for i, text in enumerate(texts)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (path / f"{language}.jsonl").write_text(lines, "utf-8")
    return str(path / "{language}.jsonl")
