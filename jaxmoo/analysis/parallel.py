"""Parallel sentences: one text file per language, whose n-th lines say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxmoo.errors import ConfigError, DataError, did_you_mean
from jaxmoo.files.outputs import typed_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Sentence", "read_parallel", "tokenize_parallel"]

# Translations of one text differ in length by far less than texts do; below this correlation of
# their lengths (0.8 to 0.95 is usual) the lines of two files are not each other's translations.
_LEAST_CORRELATION = 0.3
_ENOUGH = 30


@dataclass(frozen=True, eq=False)
class Sentence:
    """A sentence as the model reads it.

    Attributes:
      tokens: int32 [T].
      mask: bool [T]: the tokens that count. Not the first one, in which models keep what belongs
        to no token (an *attention sink*, a hundred times the size of the others), and no special
        tokens.
    """

    tokens: np.ndarray
    mask: np.ndarray


def read_parallel(
    pattern: str,
    languages: Sequence[str],
    *,
    codes: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> dict[str, list[str]]:
    """Read parallel sentences and check that they are parallel.

    Args:
      pattern: path of the text files, ``{language}`` standing for the language, such as
        ``"sentences/{language}.txt"``; UTF-8, one sentence per line.
      languages: at least two.
      codes: the files' own names of languages, ``{"en": "eng"}``, where they differ.
      limit: the most sentences to take, from the beginning.

    Returns:
      Per language its sentences, equally many.

    Raises:
      ConfigError: the pattern or the languages make no sense.
      DataError: a language has no file, or the files are not parallel: they differ in their number
        of lines, a line is empty, two languages have the same text, or the lengths of their
        lines have nothing to do with each other.
    """
    if "{language}" not in pattern:
        raise ConfigError(
            f"expected the path of parallel text with {{language}} in it, such as "
            f"sentences/{{language}}.txt, found {pattern!r}"
        )
    if len(languages) < 2:
        raise ConfigError("parallel text needs at least two languages")
    names = {language: (codes or {}).get(language, language) for language in languages}
    texts = {language: _lines(pattern, name) for language, name in names.items()}
    counts = {language: len(lines) for language, lines in texts.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{language} {count}" for language, count in counts.items())
        raise DataError(
            f"{pattern} is not parallel: line n of every file must say the same, but their numbers "
            f"of lines differ: {found}."
        )
    for language, lines in texts.items():
        empty = next((n for n, line in enumerate(lines, 1) if not line.strip()), None)
        if empty is not None:
            raise DataError(
                f"{pattern}: line {empty} of {language} is empty. Drop that line from the files of "
                "all languages."
            )
    sentences = {language: [x.strip() for x in lines[:limit]] for language, lines in texts.items()}
    count = len(next(iter(sentences.values())))
    if count < 2:
        raise DataError(f"{pattern}: expected at least 2 sentences, found {count}.")
    _check_translated(pattern, sentences)
    return sentences


def _lines(pattern: str, name: str) -> list[str]:
    path = typed_path(pattern.replace("{language}", name))
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        template = typed_path(pattern).name
        head, _, tail = template.partition("{language}")
        # Where the language names a folder, its neighbours are not listed.
        there = sorted(
            p.name[len(head) : len(p.name) - len(tail)]
            for p in path.parent.glob("*")
            if "{language}" in template and p.name.startswith(head) and p.name.endswith(tail)
        )
        raise DataError(
            f"{pattern} has no language {name!r}: there is no {path}. Available: "
            f"{', '.join(there) or 'none'}.{did_you_mean(name, there)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _check_translated(pattern: str, sentences: Mapping[str, Sequence[str]]) -> None:
    codes = list(sentences)
    seen: dict[tuple[str, ...], str] = {}
    for code in codes:
        other = seen.setdefault(tuple(sentences[code]), code)
        if other != code:
            raise DataError(f"{pattern}: {other} and {code} have the same text; one is missing.")
    lengths = np.log([[len(s.encode()) for s in sentences[code]] for code in codes])
    if lengths.shape[1] < _ENOUGH:
        return
    for i, code in enumerate(codes):
        others = np.delete(lengths, i, axis=0).mean(0)
        if min(lengths[i].std(), others.std()) < 0.1:  # all of one length: nothing can be told
            continue
        correlation = float(np.corrcoef(lengths[i], others)[0, 1])
        if correlation < _LEAST_CORRELATION:
            raise DataError(
                f"{pattern} is not parallel: line n of every file must say the same, but the "
                f"lengths of the lines of {code} and of the other languages have a correlation of "
                f"{correlation:.2f} (translations: about 0.9). Are its lines in another order?"
            )


def tokenize_parallel(
    sentences: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerFast,
    *,
    vocab_size: int,
    max_length: int,
) -> dict[str, list[Sentence]]:
    """Tokenise sentences as plain text, with the special tokens that the tokenizer adds.

    Args:
      sentences: per language.
      tokenizer: the model's.
      vocab_size: of the model.
      max_length: the longest sequence of the model.

    Raises:
      ConfigError: the model does not know a token of the tokenizer.
      DataError: a sentence is too long, or has only one token.
    """
    result = {}
    for language, texts in sentences.items():
        encoded = tokenizer(
            list(texts), return_special_tokens_mask=True, return_attention_mask=False
        )
        found = []
        for number, (ids, special) in enumerate(
            zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True), 1
        ):
            tokens = np.asarray(ids, np.int32)
            if len(tokens) and tokens.max() >= vocab_size:
                raise ConfigError(
                    f"model and tokenizer disagree: the tokenizer gives token {tokens.max()} for a "
                    f"sentence of {language!r}, and the model's vocabulary ends at {vocab_size - 1}"
                )
            mask = ~np.asarray(special, bool)
            mask[:1] = False
            if len(tokens) > max_length:
                raise DataError(
                    f"sentence {number} of {language!r} has {len(tokens)} tokens, more than the "
                    f"{max_length} that the model reads. Split or drop it in all languages."
                )
            if not mask.any():
                raise DataError(
                    f"sentence {number} of {language!r} has fewer than two tokens: "
                    f"{texts[number - 1]!r}. Drop it in all languages."
                )
            found.append(Sentence(tokens, mask))
        result[language] = found
    return result
