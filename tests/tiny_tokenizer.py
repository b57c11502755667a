"""A tokenizer of single bytes, for models too small for a real one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def bytes_tokenizer(special: list[str], **options: Any) -> PreTrainedTokenizerFast:
    """Make a tokenizer.

    Args:
      special: special tokens, which come before the 256 bytes.
      options: those of `PreTrainedTokenizerFast`, such as which special token is which.
    """
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    bpe = Tokenizer(models.BPE(vocabulary, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **options)


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer of bytes with the special tokens <pad>, <s> and </s> and a chat template."""
    return bytes_tokenizer(
        ["<pad>", "<s>", "</s>"],
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
    )
