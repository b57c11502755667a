"""The tokenizer of a GGUF file, as the Hugging Face library's."""

from __future__ import annotations

from typing import Any, NamedTuple

import tokenizers
from gguf import TokenType
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jaxmoo.errors import CheckpointError, did_you_mean, shown
from jaxmoo.hf.gguf_fields import Fields

__all__ = ["gguf_tokenizer"]

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Rules(NamedTuple):
    """What the vocabulary does not tell.

    Attributes:
      split: pattern of the pieces that text is split into before merging; None for GPT-2's, every
        digit on its own.
      ignore_merges: whether a piece that is a token is never split.
      normalise: whether text is brought into Unicode's normal form C.
      begins: whether a text begins with the token for that, where the file does not say.
    """

    split: str | None
    ignore_merges: bool = False
    normalise: bool = False
    begins: bool = False


# By GGUF's name for it, tokenizer.ggml.pre.
_RULES = {
    "smollm": _Rules(split=None),
    "llama-bpe": _Rules(split=_WORDS % "{1,3}", ignore_merges=True, begins=True),
    "qwen2": _Rules(split=_WORDS % "", normalise=True),
}


def gguf_tokenizer(
    fields: Fields, context_length: int
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Build a tokenizer from the fields of a GGUF file.

    Args:
      fields: of the header.
      context_length: longest sequence of the model.

    Returns:
      The tokenizer and the contents of its ``tokenizer_config.json``.

    Raises:
      CheckpointError: it is of another kind, or its fields are missing, of other types or do not
        go together.
    """
    model, pre = fields.text("tokenizer.ggml.model"), fields.text("tokenizer.ggml.pre", "")
    if model != "gpt2" or pre not in _RULES:
        raise CheckpointError(
            f"tokenizer {shown(model)} with pre-tokenizer {shown(pre)} cannot be converted."
            f"{did_you_mean(pre, _RULES)} Supported: 'gpt2' with "
            f"{', '.join(map(repr, _RULES))}"
        )
    tokens = fields.texts("tokenizer.ggml.tokens")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges, kinds = _merges(fields, vocabulary), fields.integers("tokenizer.ggml.token_type")
    if len(vocabulary) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if vocabulary[token] != number)
        raise CheckpointError(f"the tokenizer has the token {shown(twice)} twice")
    if len(kinds) != len(tokens):
        raise CheckpointError(f"the tokenizer has {len(tokens)} tokens, but {len(kinds)} types")
    try:
        return _built(fields, _RULES[pre], vocabulary, merges, kinds, context_length)
    except CheckpointError:
        raise
    # The library raises bare Exception on what it cannot use.
    except Exception as error:
        raise CheckpointError(f"the tokenizer cannot be built: {error}") from error


def _merges(fields: Fields, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Which pairs of tokens become one, the first first."""
    merges = []
    for text in fields.texts("tokenizer.ggml.merges"):
        left, _, right = text.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise CheckpointError(
                f"the tokenizer joins {shown(text)}: expected two tokens that make a third"
            )
        merges.append((left, right))
    return merges


def _built(
    fields: Fields,
    rules: _Rules,
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    kinds: list[int],
    context_length: int,
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    tokens = list(vocabulary)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rules.ignore_merges)
    )
    if rules.normalise:
        tokenizer.normalizer = normalizers.NFC()
    if rules.split is None:
        split = pre_tokenizers.Digits(individual_digits=True)
    else:
        split = pre_tokenizers.Split(tokenizers.Regex(rules.split), "isolated")
    # GPT-2's own splitting is part of ByteLevel.
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules.split is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    pairs = list(zip(tokens, kinds, strict=True))
    tokenizer.add_special_tokens([token for token, kind in pairs if kind == TokenType.CONTROL])
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(token, normalized=False)
            for token, kind in pairs
            if kind == TokenType.USER_DEFINED
        ]
    )
    config = {
        # The class that takes tokenizer.json as it is, in transformers 4 and 5 alike.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        number = fields.token(f"tokenizer.ggml.{key}_token_id", tokens, None)
        if number is not None:
            config[f"{name}_token"] = tokens[number]
    if fields.flag("tokenizer.ggml.add_bos_token", rules.begins):
        number = fields.token("tokenizer.ggml.bos_token_id", tokens)
        assert number is not None
        first = tokens[number]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A",
            pair=f"{first} $A {first}:1 $B:1",
            special_tokens=[(first, number)],
        )
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields.text("tokenizer.chat_template")
    return tokenizer, config
