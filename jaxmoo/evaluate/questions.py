"""The examples of an evaluation, checked, and as token sequences for each measure."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxmoo.config.data_section import LengthsConfig
from jaxmoo.data.example import Example
from jaxmoo.data.lengths import fits_tokens
from jaxmoo.data.sources.records import Malformed
from jaxmoo.data.split import hash_fraction
from jaxmoo.data.tokenization.tokenize import (
    Tokenized,
    reply_prompts,
    tokenize_choices,
    tokenize_good,
)
from jaxmoo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "Questions",
    "check_references",
    "choose_some",
    "digest",
    "prepare_questions",
    "with_choices",
]

REPLIES, COLUMN = "replies", "column:"


class Questions(NamedTuple):
    """One language's examples as token sequences.

    Attributes:
      examples: the examples.
      replies: prompt and reply of each, the reply scored.
      choices: of each, prompt and every choice, the choice scored; empty without choices.
      prompts: of each, the tokens to continue; empty when nothing is generated.
    """

    examples: list[Example]
    replies: list[Tokenized]
    choices: list[list[Tokenized]]
    prompts: list[np.ndarray]

    @property
    def rows(self) -> int:
        """How many sequences a model has to read."""
        return len(self.replies) + sum(map(len, self.choices)) + len(self.prompts)

    @property
    def units(self) -> list[str]:
        """Per example what it is drawn with when examples are drawn again: its group, or itself."""
        return [e.group or f"{e.language}/{number}" for number, e in enumerate(self.examples)]

    def fingerprint(self) -> str:
        """Digest of everything the model will see and is asked."""
        found = hashlib.sha256()
        for one in (*self.replies, *(choice for some in self.choices for choice in some)):
            found.update(one.tokens.tobytes() + b"|" + one.scored.tobytes() + b";")
        for prompt in self.prompts:
            found.update(prompt.tobytes() + b">")
        return found.hexdigest()[:16]


def digest(examples: Sequence[Example]) -> str:
    """Digest of the texts of examples, in order: equal where two evaluations asked the same.

    Example:
      >>> digest([Example.from_pair("en", "Hi", "Hello")])
      'ec07dd1575380a68'
    """
    texts = [
        [*map(dict, e.messages), e.text, e.choices, *([e.tools] if e.tools else [])]
        for e in examples
    ]
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]


def choose_some(examples: Sequence[Example], number: int | None) -> list[Example]:
    """Choose examples by a hash of their text: the same ones on every machine.

    Examples of a group are chosen by the group's name, so that of parallel translations the same
    are chosen in every language.
    """
    if number is None or len(examples) <= number:
        return list(examples)
    keys = [hash_fraction(e.group or "\x1e".join(e.key)) for e in examples]
    chosen = sorted(range(len(examples)), key=keys.__getitem__)[:number]
    return [examples[i] for i in sorted(chosen)]


def check_references(examples: Mapping[str, Sequence[Example]]) -> None:
    """Raise when a reply is empty: there would be nothing to compare with.

    Raises:
      DataError: names the languages, and how many.
    """
    empty = {
        code: sum(not e.reply and not e.says_more for e in part) for code, part in examples.items()
    }
    found = [f"{code}: {n} of {len(examples[code])}" for code, n in empty.items() if n]
    if found:
        raise DataError(
            f"Some examples have an empty reply, and nothing to be scored by ({'; '.join(found)}). "
            "Mend the data, name another column for the completion, or leave such examples out "
            "with --skip-empty."
        )


def with_choices(examples: Mapping[str, Sequence[Example]], what: str) -> dict[str, list[Example]]:
    """Give every example the texts its reply is chosen from.

    Args:
      examples: per language its examples.
      what: ``replies`` for the replies that occur in the data, the same set in every language;
        ``column:NAME`` when examples have their own; or the labels themselves, ``a,b,c``.

    Raises:
      ConfigError: there are fewer than two labels, or one of them twice.
      DataError: languages have different labels, or a reply is none of its choices.

    Example:
      >>> data = {"en": [Example.from_pair("en", "1 < 2?", "yes")]}
      >>> with_choices(data, "yes,no")["en"][0].choices
      ('yes', 'no')
    """
    if what == REPLIES:
        labels = _common_labels(examples)
    elif what.startswith(COLUMN):
        labels = None
    else:
        labels = tuple(label.strip() for label in what.split(","))
        if len(labels) < 2 or len(set(labels)) < len(labels) or not all(labels):
            raise ConfigError(
                f"--choices takes '{REPLIES}', '{COLUMN}NAME' or at least two different labels "
                f"a,b,c; found {what!r}."
            )
    return {
        language: [
            _checked(e if labels is None else dataclasses.replace(e, choices=labels)) for e in part
        ]
        for language, part in examples.items()
    }


def _common_labels(examples: Mapping[str, Sequence[Example]]) -> tuple[str, ...]:
    sets = {language: {e.reply for e in part} for language, part in examples.items()}
    first, labels = next(iter(sets.items()))
    for language, found in sets.items():
        if found != labels:
            only = [f"only {a}: {sorted(x - y)[:5]}" for a, x, y in (
                (language, found, labels), (first, labels, found)) if x - y]  # fmt: skip
            raise DataError(
                f"Languages {first!r} and {language!r} do not have the same labels "
                f"({'; '.join(only)}). If the labels are the same and some are rare, list them: "
                f"--choices a,b,c. If they are translated, give every record a column of its "
                f"choices: --choices {COLUMN}NAME."
            )
    if len({label.strip() for label in labels}) < len(labels):
        raise DataError(
            f"Some replies differ in nothing but white space at their ends: {sorted(labels)[:8]}. "
            "Mend the data: labels are compared as they are."
        )
    if len(labels) < 2:
        raise DataError(f"All replies are {next(iter(labels))!r}: there is nothing to choose.")
    return tuple(sorted(labels))


def _checked(example: Example) -> Example:
    choices = example.choices
    if len(choices) < 2 or len(set(choices)) < len(choices) or not all(choices):
        raise DataError(
            f"Language {example.language!r}, reply {example.reply[:40]!r}: expected at least two "
            f"different choices, found {list(choices)[:8]}."
        )
    if example.reply not in choices:
        same = example.reply.strip() in (choice.strip() for choice in choices)
        raise DataError(
            f"Language {example.language!r}: the reply {example.reply[:40]!r} is none of its "
            f"choices {list(choices)[:8]}."
            f"{' They differ in white space at their ends: mend the data.' if same else ''}"
        )
    return example


def prepare_questions(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    new_tokens: int = 0,
    drop_unusable: bool = False,
    max_malformed: float = 0.0,
    special_tokens: str = "text",
    asked: LengthsConfig | None = None,
) -> Questions:
    """Tokenise one language's examples for every measure that is asked for.

    Args:
      examples: examples; those with choices are also scored by them.
      tokenizer: a fast tokenizer with a chat template.
      max_length: the most tokens of a sequence; the ends of longer replies are not scored.
      new_tokens: the most tokens to generate; 0 generates nothing.
      drop_unusable: leave out examples whose reply is empty or begins beyond `max_length`.
      max_malformed: the largest share of examples that the template may fail to render; they are
        left out.
      special_tokens: as in :func:`~jaxmoo.data.tokenization.tokenize.tokenize_all`.
      asked: examples with fewer or more tokens are left out.

    Raises:
      DataError: a reply begins beyond `max_length`, no example is left, or a prompt leaves no room
        for its choices or for what is generated.
    """
    language = examples[0].language
    malformed = Malformed(f"language {language!r}", max_malformed, total=len(examples))
    options = {"special_tokens": special_tokens}
    examples, replies = tokenize_good(examples, tokenizer, max_length, malformed, **options)
    if asked is not None:
        kept = [fits_tokens(reply.length, asked) for reply in replies]
        if not any(kept):
            raise DataError(f"Language {language!r} has no examples within data.lengths.")
        examples = list(itertools.compress(examples, kept))
        replies = list(itertools.compress(replies, kept))
    usable = [bool(reply.loss_mask[1:].any()) for reply in replies]
    if not all(usable) and not (drop_unusable and any(usable)):
        lengths = [r.length for r, ok in zip(replies, usable, strict=True) if not ok]
        raise DataError(
            f"Language {language!r}: {len(lengths)} of {len(replies)} examples have no reply "
            f"within {max_length} tokens; the longest has {max(lengths)} in all. Raise "
            "--max-length, or leave such examples out with --skip-empty."
        )
    examples = [e for e, ok in zip(examples, usable, strict=True) if ok]
    replies = [r for r, ok in zip(replies, usable, strict=True) if ok]
    choices: list[list[Tokenized]] = []
    prompts: list[np.ndarray] = []
    if examples[0].choices:
        choices = tokenize_choices(examples, tokenizer, **options)
        lengths = [len(one.tokens) for some in choices for one in some]
        _check_room(language, lengths, max_length, "choices")
    if new_tokens:
        prompts = reply_prompts(examples, tokenizer, **options)
        _check_room(language, [len(p) + new_tokens for p in prompts], max_length, "new tokens")
    return Questions(examples, replies, choices, prompts)


def _check_room(language: str, lengths: Sequence[int], max_length: int, what: str) -> None:
    if max(lengths) > max_length:
        raise DataError(
            f"Language {language!r}: {sum(n > max_length for n in lengths)} of {len(lengths)} "
            f"prompts with their {what} exceed {max_length} tokens; the longest has "
            f"{max(lengths)}. Raise --max-length, or shorten or remove those examples."
        )
