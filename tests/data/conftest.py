"""A small tokenizer of the same make as the real one: byte-level BPE and a ChatML template."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:  # seconds of importing, which collecting does without
    from transformers import PreTrainedTokenizerFast

TEXT = ["Hello, how are you?", "Ciao, come stai?", "سلام، حال شما چطور است؟", "你好吗", "0123 456"]

# As SmolLM2 does, it puts a default system prompt before a conversation without one.
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer():
    """A function that makes a tokenizer with a given chat template."""
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT, trainer)
    trained = bpe.to_str()

    def make(chat_template: str | None = CHATML, **options) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(trained),
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            chat_template=chat_template,
            **({"model_max_length": 512} | options),
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    """The tokenizer with the ChatML template."""
    return make_tokenizer()


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path, monkeypatch):
    """Keep what `datasets` caches inside the test's own directory."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / ".datasets")
