"""What a run's data looks like: numbers, notes, and examples with what is learnt marked."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmoo.data.batches import LanguageBatches
from jaxmoo.data.corpus import Corpus
from jaxmoo.data.packing import ShuffledRows, plan_rows
from jaxmoo.data.table import text_table
from jaxmoo.data.token_table import TokenTable
from jaxmoo.data.tokenization.tokenize import Tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_QUANTILES = (0, 5, 25, 50, 75, 95, 100)
_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"


def describe(corpus: Corpus, batches: LanguageBatches, steps: int) -> dict[str, Any]:
    """Count what a run has and what it will show of it.

    Args:
      corpus: tokenised examples.
      batches: made from the corpus.
      steps: of the run.

    Returns:
      What JSON can hold. ``languages`` maps every language to

      - its `LanguageReport`;
      - ``length_quantiles``: of the rendered examples' tokens before truncation, by per cent;
      - of a language that is trained on also ``rows`` of an epoch, ``tokens`` and ``targets`` in
        them, ``filled`` (the share of the rows' places that hold a token), ``filled_padded`` and
        ``filled_packed`` (what that would be with and without packing), ``steps`` in which it
        takes part, ``epochs`` of the run, and its shares of the corpus's and the run's tokens.
    """
    length = batches.sequence_length
    epochs = batches.epochs(steps)
    taken = [steps] * len(batches.languages)
    if batches.mixture is not None:
        taken = batches.mixture.taken(steps).tolist()
    train = corpus.at_hand()
    languages: dict[str, dict[str, Any]] = {}
    for language, report in corpus.report.items():
        examples = TokenTable.of(train.get(language) or corpus.held_out[language])
        quantiles = {str(q): float(np.percentile(examples.lengths, q)) for q in _QUANTILES}
        languages[language] = report.to_dict() | {"length_quantiles": quantiles}
    for number, language in enumerate(batches.languages):
        examples = TokenTable.of(train[language])
        kept = examples.sizes.tolist()
        order = batches.rows[language]
        if not isinstance(order, ShuffledRows):
            raise TypeError("expected batches of examples in memory, as of Corpus.at_hand()")
        rows, tokens = len(order), sum(kept)
        packed = rows if batches.packing else len(plan_rows(kept, length))
        languages[language] |= {
            "rows": rows,
            "tokens": tokens,
            "targets": int(examples.targets.sum()),
            "filled": tokens / (rows * length),
            "filled_padded": tokens / (len(kept) * length),
            "filled_packed": tokens / (packed * length),
            "steps": taken[number],
            "epochs": epochs[language],
        }
    trained = [languages[language] for language in batches.languages]
    corpus_tokens = sum(one["tokens"] for one in trained)
    run_tokens = sum(one["tokens"] * one["epochs"] for one in trained)
    for one in trained:
        one["share_of_corpus"] = one["tokens"] / corpus_tokens
        one["share_of_run"] = one["tokens"] * one["epochs"] / run_tokens if run_tokens else 0.0
    return {
        "sequence_length": length,
        "batch_size": batches.batch_size,
        "packing": batches.packing,
        "languages_per_step": len(batches.in_step(0)),
        "steps": steps,
        "languages": languages,
    }


def epochs_table(description: Mapping[str, Any]) -> str:
    """Return what a run shows of each language as an aligned table.

    Args:
      description: from :func:`describe`.

    Returns:
      The table, and a line about packing.
    """
    header = ["language", "rows", "tokens", "filled", "targets", "steps", "epochs"]
    header += ["% of corpus", "% of run"]
    trained = {language: one for language, one in description["languages"].items() if "rows" in one}
    rows = [
        [
            language,
            one["rows"],
            one["tokens"],
            f"{one['filled']:.1%}",
            f"{one['targets'] / one['tokens']:.1%}",
            one["steps"],
            f"{one['epochs']:.2f}",
            f"{100 * one['share_of_corpus']:.1f}",
            f"{100 * one['share_of_run']:.1f}",
        ]
        for language, one in trained.items()
    ]
    padded, packed = (
        sum(one["tokens"] for one in trained.values())
        / sum(one["tokens"] / one[kind] for one in trained.values())
        for kind in ("filled_padded", "filled_packed")
    )
    return (
        f"{text_table(header, rows)}\n"
        f"An epoch's rows of {description['sequence_length']} tokens are {padded:.1%} full with "
        f"one example each, {packed:.1%} full when packed"
        f" ({'as here' if description['packing'] else 'data.packing=true'})."
    )


def marked(example: Tokenized, tokenizer: PreTrainedTokenizerFast, *, colour: bool) -> str:
    """Return an example as text, with what is learnt marked.

    Args:
      example: a tokenised example.
      tokenizer: what tokenised it.
      colour: mark by colour, for a terminal; else by double brackets.

    Returns:
      The text, special tokens included; other control characters than line breaks are escaped.
    """
    before, after = (_GREEN, _PLAIN) if colour else ("\u27e6", "\u27e7")
    edges = np.flatnonzero(np.diff(example.loss_mask)) + 1
    parts = []
    for span in np.split(np.arange(len(example.tokens)), edges):
        text = _shown(str(tokenizer.decode(example.tokens[span])))
        parts.append(f"{before}{text}{after}" if example.loss_mask[span[0]] else text)
    return "".join(parts)


def sample(examples: Sequence[Tokenized], count: int) -> list[Tokenized]:
    """Return a few examples from all over a list, the same ones every time."""
    places = np.linspace(0, len(examples) - 1, min(count, len(examples))).round().astype(int)
    return [examples[place] for place in places]


def notes(tokenized: Mapping[str, Sequence[Tokenized]], limit: str) -> list[str]:
    """Say what a chat template or a short limit makes of examples.

    Args:
      tokenized: per language its examples.
      limit: what the setting of the most tokens is called.

    Example:
      >>> import numpy as np
      >>> cut = Tokenized(np.array([5, 6]), np.array([False, True]), 1, length=9)
      >>> notes({"en": [cut]}, "--max-length")
      ['All examples of en lose their end, the longest of 9 tokens: no end of a reply is learnt or \
scored. Raise --max-length.']
    """
    tables = {code: TokenTable.of(part) for code, part in tokenized.items()}

    def some(number: Callable[[TokenTable], int]) -> dict[str, int]:
        found = {code: int(number(part)) for code, part in tables.items()}
        return {code: number for code, number in found.items() if number}

    def counted(found: Mapping[str, int]) -> str:
        return ", ".join(f"{code}: {n} of {len(tables[code])}" for code, n in found.items())

    lines = []
    unended = some(lambda part: (~part.ended).sum())
    if unended:
        lines.append(
            f"The chat template ends no reply with a special token ({counted(unended)} examples): "
            "nothing tells a model where to stop, and what it generates goes on to the limit. Give "
            "a template that ends replies (data.chat_template)."
        )
    uneven = some(lambda part: part.uneven.sum())
    if uneven:
        lines.append(
            "The chat template renders replies within a conversation otherwise than at its end, as "
            f"those do that drop thoughts there ({counted(uneven)} examples). They are learnt and "
            "scored as they stand there, not as the model would be prompted to give them. Divide "
            "conversations so that each reply comes last, or give another template "
            "(data.chat_template)."
        )
    for key in sorted({key for part in tables.values() for key in part.ignored()}):
        having = some(lambda part, key=key: part.ignored().get(key, 0))
        lines.append(
            f"The chat template shows nothing of {key!r}, which messages have beside their text "
            f"({counted(having)} examples): it is ignored."
        )
    cut = some(lambda part: part.truncated.sum())
    for code in [code for code, number in cut.items() if number == len(tables[code])]:
        longest = tables[code].lengths.max()
        lines.append(
            f"All examples of {code} lose their end, the longest of {longest:,} tokens: no end of "
            f"a reply is learnt or scored. Raise {limit}."
        )
    return lines


def _shown(text: str) -> str:
    # What data holds must not steer the terminal.
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else f"\\x{ord(c):02x}" for c in text
    )
