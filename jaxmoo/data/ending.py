"""The token that ends a reply, as a tokenizer's chat template writes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxmoo.data.example import Example
from jaxmoo.data.tokenize import tokenize
from jaxmoo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What to say where there is none.
NO_ENDING = (
    "Note: no special token is known to end a reply, so what is generated ends only where the "
    "model's own generation_config.json says, or at the limit."
)

_ASKED = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
# Some templates want a system message.
_PROBES = (_ASKED, [{"role": "system", "content": "."}, *_ASKED])


def ending_token(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return the token by which a model learns to end its replies.

    Args:
      tokenizer: a fast tokenizer, with the chat template that is trained with.

    Returns:
      The special token that ends an assistant's turn; the tokenizer's own end token without a
      template, for that ends plain texts; None where a turn ends with no special token, or the
      template renders not even a question and its answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer.eos_token_id
    for messages in _PROBES:
        try:
            result = tokenize(Example.from_messages("", messages), tokenizer, 10**9)
        except DataError:
            continue
        return int(result.tokens[-1]) if result.ended else None
    return None
