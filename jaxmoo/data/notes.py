"""What is odd about tokenised examples although they can be used: lines for a person to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from jaxmoo.data.tokenize import Tokenized


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

    def some(flag: Callable[[Tokenized], bool]) -> dict[str, int]:
        found = {code: sum(map(flag, part)) for code, part in tokenized.items()}
        return {code: number for code, number in found.items() if number}

    def counted(found: Mapping[str, int]) -> str:
        return ", ".join(f"{code}: {n} of {len(tokenized[code])}" for code, n in found.items())

    lines = []
    unended = some(lambda one: not one.ended)
    if unended:
        lines.append(
            f"The chat template ends no reply with a special token ({counted(unended)} examples): "
            "nothing tells a model where to stop, and what it generates goes on to the limit. Give "
            "a template that ends replies (data.chat_template)."
        )
    uneven = some(lambda one: one.uneven)
    if uneven:
        lines.append(
            "The chat template renders replies within a conversation otherwise than at its end, as "
            f"those do that drop thoughts there ({counted(uneven)} examples). They are learnt and "
            "scored as they stand there, not as the model would be prompted to give them. Divide "
            "conversations so that each reply comes last, or give another template "
            "(data.chat_template)."
        )
    for key in sorted({key for part in tokenized.values() for one in part for key in one.ignored}):
        having = some(lambda one, key=key: key in one.ignored)
        lines.append(
            f"The chat template shows nothing of {key!r}, which messages have beside their text "
            f"({counted(having)} examples): it is ignored."
        )
    cut = some(lambda one: one.truncated)
    for code in [code for code, number in cut.items() if number == len(tokenized[code])]:
        longest = max(one.length for one in tokenized[code])
        lines.append(
            f"All examples of {code} lose their end, the longest of {longest:,} tokens: no end of "
            f"a reply is learnt or scored. Raise {limit}."
        )
    return lines
