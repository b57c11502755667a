"""The tokenizer of a GGUF file, as the Hugging Face library's, and the other way round."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import tokenizers
from gguf import GGUFValueType, TokenType
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jaxmoo.errors import CheckpointError, did_you_mean, shown
from jaxmoo.hf.gguf_fields import Fields
from jaxmoo.hf.gguf_sentencepiece import (
    is_sentencepiece,
    pieces,
    sentencepiece,
    sentencepiece_fields,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["gguf_tokenizer", "tokenizer_fields"]

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
    "dbrx": _Rules(split=_WORDS % "{1,3}"),  # OLMo 2
    "command-r": _Rules(split=None, normalise=True, begins=True),
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
    if model != "llama" and (model != "gpt2" or pre not in _RULES):
        raise CheckpointError(
            f"tokenizer {shown(model)} with pre-tokenizer {shown(pre)} cannot be converted."
            f"{did_you_mean(pre, _RULES)} Supported: 'llama', and 'gpt2' with "
            f"{', '.join(map(repr, _RULES))}"
        )
    fields.require({"tokenizer.ggml.add_eos_token": False})
    tokens = fields.texts("tokenizer.ggml.tokens")
    kinds = fields.integers("tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        raise CheckpointError(f"the tokenizer has {len(tokens)} tokens, but {len(kinds)} types")
    if model == "llama":
        tokens = pieces(tokens, kinds)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if vocabulary[token] != number)
        raise CheckpointError(f"the tokenizer has the token {shown(twice)} twice")
    try:
        if model == "llama":
            tokenizer = sentencepiece(fields.under("tokenizer.ggml."), vocabulary, kinds)
            begins = True
        else:
            tokenizer = _byte_level(_RULES[pre], vocabulary, _merges(fields, vocabulary))
            begins = _RULES[pre].begins
        return _finished(tokenizer, fields, tokens, kinds, begins, context_length)
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


def _byte_level(
    rules: _Rules, vocabulary: dict[str, int], merges: list[tuple[str, str]]
) -> tokenizers.Tokenizer:
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
    return tokenizer


def _finished(
    tokenizer: tokenizers.Tokenizer,
    fields: Fields,
    tokens: list[str],
    kinds: list[int],
    begins: bool,
    context_length: int,
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Add special tokens; `begins`: whether one begins a text where the file does not say."""
    pairs = list(zip(tokens, kinds, strict=True))
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    tokenizer.add_special_tokens([token for token, kind in pairs if kind in special])
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
    if fields.flag("tokenizer.ggml.add_bos_token", begins):
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


_ELSEWHERE = (
    "llama.cpp's own convert_hf_to_gguf.py knows more: give it a Hugging Face directory (`jaxmoo "
    "convert to-hf`)"
)

# What tells ways of splitting apart: numbers, apostrophes, white space, other scripts, signs.
_PROBE = (
    "Hello, World! I'VE we'll can't\tx = 12345 + 6.7e-8;\n\n  def f(a_b):\n    return [1, 22]\r\n"
    "   \u00c5ngstro\u0308m na\u00efve \u0645\u0631\u062d\u0628\u0627 \u0661\u0662\u0663 "
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940 "
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 ...!!! #tag @name http://a.b/c?d=1%20 \n "
)


def tokenizer_fields(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, stop: Sequence[int] = ()
) -> dict[str, tuple[Any, ...]]:
    """Return the fields of a GGUF file from which the same tokenizer is built.

    Args:
      tokenizer: one of byte-level BPE whose splitting llama.cpp knows, or of SentencePiece's BPE;
        with its chat template.
      vocab_size: rows of the model's table; those beyond the tokens are named ``[PAD7]``.
      stop: tokens that end a reply beside its end token; llama.cpp has room for one, and knows the
        usual ones by their names.

    Returns:
      By name: value, type, and for lists the type of their elements.

    Raises:
      CheckpointError: it is of another kind, or has no token that ends a text.
    """
    backend = tokenizer.backend_tokenizer
    content = json.loads(backend.to_str())
    if content["model"].get("type") != "BPE":
        raise CheckpointError(
            "only tokenizers of byte-level BPE and of SentencePiece's BPE can be written into GGUF "
            f"files. {_ELSEWHERE}"
        )
    added = backend.get_added_tokens_decoder()
    for token in added.values():
        if token.lstrip or token.rstrip or token.single_word:
            raise CheckpointError(
                f"the token {shown(token.content)} takes in the spaces beside it (lstrip, rstrip) "
                "or is a word by itself (single_word), which GGUF files cannot say. Where texts "
                "have no spaces there, set these to false in tokenizer.json and try again."
            )
    names = {number: text for text, number in backend.get_vocab(with_added_tokens=True).items()}
    tokens = [names.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    kinds = [int(_kind(number, names, added)) for number in range(vocab_size)]
    u32, text, each = GGUFValueType.UINT32, GGUFValueType.STRING, GGUFValueType.ARRAY
    ends = list(dict.fromkeys(t for t in (tokenizer.eos_token_id, *stop) if t is not None))
    if not ends:
        raise CheckpointError(
            "nothing says which token ends a text: set eos_token in tokenizer_config.json"
        )
    special = {
        "bos": tokenizer.bos_token_id,
        "eos": ends[0],
        "eot": ends[1] if len(ends) > 1 else None,
        "padding": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
    }
    begins = special["bos"] is not None and backend.encode("a").ids[:1] == [special["bos"]]
    if is_sentencepiece(content):
        made = sentencepiece_fields(content, tokens, kinds)
        ways = [{"add_space_prefix": (first, GGUFValueType.BOOL)} for first in (False, True)]
    else:
        merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
        made = {"model": ("gpt2", text), "merges": (merges, each, text)}
        ways = [{"pre": (pre, text)} for pre in _RULES]
    made |= {
        "tokens": (tokens, each, text),
        "token_type": (kinds, each, GGUFValueType.INT32),
        **{
            f"{name}_token_id": (int(number), u32)
            for name, number in special.items()
            if isinstance(number, int)
        },
        "add_bos_token": (begins, GGUFValueType.BOOL),
    }
    fields = {f"tokenizer.ggml.{name}": value for name, value in made.items()}
    fields |= _way(backend, fields, ways)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        fields["tokenizer.chat_template"] = (template, text)
    return fields


def _kind(number: int, names: Mapping[int, str], added: Mapping[int, Any]) -> TokenType:
    if number not in names:
        return TokenType.UNUSED
    if number not in added:
        return TokenType.NORMAL
    return TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED


def _way(
    backend: tokenizers.Tokenizer,
    fields: Mapping[str, tuple[Any, ...]],
    ways: Sequence[Mapping[str, tuple[Any, ...]]],
) -> dict[str, tuple[Any, ...]]:
    """The fields that say how a tokenizer splits text, found by trying all on a text."""
    plain = {name: value for name, (value, *_) in fields.items()}
    wanted = _split(backend)
    for way in ways:
        more = {f"tokenizer.ggml.{name}": value for name, value in way.items()}
        tried = Fields(plain | {name: value for name, (value, *_) in more.items()})
        if _split(gguf_tokenizer(tried, 1)[0]) == wanted:
            return more
    known = [f"{name}={value}" for way in ways for name, (value, *_) in way.items()]
    raise CheckpointError(
        "the tokenizer splits text in a way that has no name here: known are "
        f"{', '.join(known)}. {_ELSEWHERE}"
    )


def _split(backend: tokenizers.Tokenizer) -> tuple[Any, ...]:
    """What tells tokenizers apart: the pieces of a text, and its tokens, alone and among others."""
    split, model = backend.pre_tokenizer, backend.model
    parts = []
    if split is not None and not getattr(model, "byte_fallback", False):
        text = _PROBE
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        parts = [piece for piece, _ in split.pre_tokenize_str(text)]
    added = sorted(backend.get_added_tokens_decoder().values(), key=lambda x: not x.special)[:1]
    spaces = "a".join(" " * n for n in range(1, 65))
    texts = (_PROBE, spaces, *(f"{x.content}a b{x.content} {_PROBE}{x.content}" for x in added))
    ids = [backend.encode(text).ids for text in texts]
    return parts, ids, bool(getattr(model, "ignore_merges", False))
