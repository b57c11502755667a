"""SentencePiece tokenizers of GGUF files (``tokenizer.ggml.model`` = "llama"), and back.

llama.cpp joins two neighbours whose text is a token, of all such pairs those with the highest
score first, the leftmost of equals. Hugging Face's library wants a list of pairs, the first first.
One becomes the other where the list has every pair that makes a token, and all pairs of a token
beside each other: the order of the tokens is that of their scores.

Some models have tokens of several spaces that come before all others (Gemma). llama.cpp looks for
them in the text, and so they have spaces in its files; Hugging Face's library joins them first.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from gguf import GGUFValueType, TokenType
from tokenizers import decoders, models, normalizers

from jaxmoo.errors import CheckpointError
from jaxmoo.hf.gguf_fields import Fields

__all__ = ["is_sentencepiece", "pieces", "sentencepiece", "sentencepiece_fields"]

_SPACE = "\u2581"  # stands for a space
_OWN = TokenType.USER_DEFINED
_LONGEST = 1000  # characters of a token
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def sentencepiece(
    fields: Fields, vocabulary: Mapping[str, int], kinds: Sequence[int]
) -> tokenizers.Tokenizer:
    """Build a tokenizer, but for its added tokens.

    Args:
      fields: of the header, below ``tokenizer.ggml.``.
      vocabulary: numbers of tokens.
      kinds: of the tokens.

    Raises:
      CheckpointError: its fields are missing, of other types or do not go together.
    """
    tokens, scores = list(vocabulary), fields.numbers("scores")
    if len(scores) != len(tokens):
        raise CheckpointError(f"the tokenizer has {len(tokens)} tokens, but {len(scores)} scores")
    longest = max(tokens, key=len)
    if len(longest) > _LONGEST:  # whose halves would take long to try
        raise CheckpointError(f"the tokenizer has a token of {len(longest)} characters")
    joined = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.NORMAL]
    joined.sort(key=lambda token: -scores[vocabulary[token]])  # which keeps the order of equals
    spaces = [token for token in tokens if kinds[vocabulary[token]] == _OWN and _is_spaces(token)]
    first = [pair for token in spaces for pair in _pairs(token, vocabulary)]
    first.sort(key=lambda pair: (-len(pair[0]), -len(pair[1])))
    number = fields.token("unknown_token_id", tokens, 0)
    assert number is not None
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=dict(vocabulary),
            merges=[*first, *(pair for token in joined for pair in _pairs(token, vocabulary))],
            unk_token=tokens[number],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    begins = fields.flag("add_space_prefix", True)
    prepended = [normalizers.Prepend(_SPACE)] if begins else []
    tokenizer.normalizer = normalizers.Sequence([*prepended, normalizers.Replace(" ", _SPACE)])
    stripped = [decoders.Strip(" ", 1, 0)] if begins else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    return tokenizer


def _is_spaces(token: str) -> bool:
    return not token.strip(_SPACE)


def pieces(tokens: Sequence[str], kinds: Sequence[int]) -> list[str]:
    """Tokens as Hugging Face's library has them, from those of a file."""
    return [
        token.replace(" ", _SPACE) if kind == _OWN and not token.strip(" ") else token
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _pairs(token: str, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, those of the earliest tokens first."""
    halves = ((token[:i], token[i:]) for i in range(1, len(token)))
    found = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
    return sorted(found, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))


def is_sentencepiece(content: Mapping[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` is of this kind."""
    return content["model"].get("type") == "BPE" and bool(content["model"].get("byte_fallback"))


def sentencepiece_fields(
    content: Mapping[str, Any], tokens: list[str], kinds: list[int]
) -> dict[str, tuple[Any, ...]]:
    """Return the fields that say which tokens are joined.

    Args:
      content: of the ``tokenizer.json``.
      tokens: all tokens; those of spaces are changed.
      kinds: of the tokens; those of bytes and of the unknown token are changed.

    Raises:
      CheckpointError: its pairs are none that scores can say.
    """
    model, added = content["model"], {token["content"] for token in content["added_tokens"]}
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    merges = [pair for pair in merges if "".join(pair) not in added]
    groups = {token: list(pairs) for token, pairs in itertools.groupby(merges, "".join)}
    told = {pair for token in tokens if token not in added for pair in _pairs(token, vocabulary)}
    if sum(map(len, groups.values())) != len(merges) or told != set(merges):
        raise CheckpointError(
            "the tokenizer joins tokens in an order that no scores say: it is not one of "
            "SentencePiece's"
        )
    places = {token: -float(place) for place, token in enumerate(groups)}
    scores = [places.get(token, -float(len(places))) for token in tokens]
    for token, number in vocabulary.items():
        if token == model.get("unk_token"):
            kinds[number] = int(TokenType.UNKNOWN)
        elif kinds[number] == TokenType.NORMAL and _BYTE.fullmatch(token):
            kinds[number] = int(TokenType.BYTE)
        elif kinds[number] == _OWN and _is_spaces(token):
            tokens[number] = token.replace(_SPACE, " ")
    each = GGUFValueType.ARRAY
    return {
        "model": ("llama", GGUFValueType.STRING),
        "pre": ("default", GGUFValueType.STRING),
        "scores": (scores, each, GGUFValueType.FLOAT32),
    }
