"""From conversations to token sequences with a loss mask over the reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxmoo.data.example import Example
from jaxmoo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, eq=False)
class Tokenized:
    """One example as the model sees it.

    Attributes:
      tokens: int32 [T]; the rendered conversation up to and including the end-of-turn token of
        its last reply.
      loss_mask: bool [T]; true on the reply's tokens and on its end-of-turn token.
      reply_bytes: UTF-8 length of the reply's text that `tokens` holds.
      length: T before truncation.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    reply_bytes: int
    length: int

    @property
    def truncated(self) -> bool:
        """Whether the end of the reply, with its end-of-turn token, was cut off."""
        return self.length > len(self.tokens)


def tokenize(example: Example, tokenizer: PreTrainedTokenizerFast, max_length: int) -> Tokenized:
    """Render an example by the tokenizer's chat template and tokenise it.

    `tokenize_all` describes how, and does many at once far faster.

    Args:
      example: the example.
      tokenizer: a fast tokenizer with a chat template.
      max_length: the most tokens to keep.

    Returns:
      The tokens and the mask of the reply.

    Raises:
      DataError: nothing of the reply is left within `max_length`, or the template or tokenizer
        cannot be used.
    """
    result = tokenize_all([example], tokenizer, max_length)[0]
    if result.loss_mask.any():
        return result
    raise DataError(
        f"An example of {example.language!r} has no reply token within {max_length} tokens: its "
        f"reply is {example.reply[:60]!r}, its rendering has {result.length} tokens."
    )


def tokenize_all(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[Tokenized]:
    """Render examples by the tokenizer's chat template and tokenise them.

    The template decides everything around the text, a default system prompt included, because
    that is what the model will be prompted with later. The loss mask is a difference of prefixes:
    the conversation is rendered once up to where the reply begins (``add_generation_prompt``)
    and once whole, and what the second has more is the reply. Its end is the first special token
    after the reply's text, the end-of-turn token, or the end of the rendering when the template
    ends turns without one; what the template writes after it is cut, for no token is learnt from
    it. Sequences longer than `max_length` lose their end.

    Args:
      examples: of any languages.
      tokenizer: a fast tokenizer with a chat template.
      max_length: the most tokens to keep of each.

    Returns:
      One `Tokenized` per example. Where nothing of the reply's text is left (an empty reply, or a
      prompt as long as `max_length`) its `loss_mask` is false everywhere.

    Raises:
      DataError: the tokenizer has no chat template or gives no character offsets, the rendered
        prompt is no prefix of the whole rendering, or the template changes the reply's text.
    """
    if not examples:
        return []
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer "
            "(tokenizer.json) is needed."
        )
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "The tokenizer has no chat template. Use an instruction-tuned model's tokenizer, or "
            "set tokenizer.chat_template."
        )
    prompts = tokenizer.apply_chat_template(
        [list(example.messages[:-1]) for example in examples],
        tokenize=False,
        add_generation_prompt=True,
    )
    wholes = tokenizer.apply_chat_template(
        [list(example.messages) for example in examples], tokenize=False
    )
    # The template has written every special token, the first included.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    prompt_ids = tokenizer(prompts, **options)["input_ids"]
    encoded = tokenizer(wholes, return_offsets_mapping=True, **options)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return [
        _mask_reply(*columns, special, max_length)
        for columns in zip(
            examples,
            prompts,
            wholes,
            prompt_ids,
            encoded["input_ids"],
            encoded["offset_mapping"],
            strict=True,
        )
    ]


def _mask_reply(
    example: Example,
    prompt: str,
    whole: str,
    prompt_ids: list[int],
    ids: list[int],
    offsets: list[tuple[int, int]],
    special: set[int],
    max_length: int,
) -> Tokenized:
    start = len(prompt_ids)
    if ids[:start] != prompt_ids or not whole.startswith(prompt):
        raise DataError(
            f"{_described(example)}: expected the rendered prompt to be a prefix of the rendered "
            f"conversation, token by token; found a prompt that ends in {prompt[-40:]!r} and a "
            f"conversation that goes on as {whole[max(len(prompt) - 20, 0) :][:60]!r}. The chat "
            "template does not suit training on replies: give the tokenizer one whose generation "
            "prompt is how a reply begins."
        )
    text_start = whole.find(example.reply, len(prompt))
    if text_start < 0:
        raise DataError(
            f"{_described(example)}: expected the chat template to render the reply as it is, "
            f"found {whole[len(prompt) :][:60]!r}."
        )
    text_end = text_start + len(example.reply)
    stop = next(
        (
            position + 1
            for position in range(start, len(ids))
            if ids[position] in special and offsets[position][0] >= text_end
        ),
        len(ids),
    )
    kept = min(stop, max_length)
    mask = np.zeros(kept, bool)
    reply_bytes = 0
    # Special tokens that the template puts before the reply's text are no reply.
    if example.reply and any(offsets[at][1] > text_start for at in range(start, kept)):
        mask[start:] = True
        # A character cut in the middle of its bytes counts whole.
        reply_bytes = len(whole[text_start : min(text_end, offsets[kept - 1][1])].encode())
    return Tokenized(np.asarray(ids[:kept], np.int32), mask, reply_bytes, stop)


def _described(example: Example) -> str:
    return f"Language {example.language!r}, reply {example.reply[:40]!r}"
