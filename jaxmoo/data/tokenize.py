"""From conversations and texts to token sequences with a loss mask over what is learnt."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxmoo.data.chat import (
    Conversation,
    Turn,
    assistant_marks,
    locate,
    no_end,
    not_a_prefix,
)
from jaxmoo.data.example import Example
from jaxmoo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, eq=False)
class Tokenized:
    """One example as the model sees it.

    Attributes:
      tokens: int32 [T]; the rendered conversation up to and including the end-of-turn token of
        its last reply, or a text and its end token.
      loss_mask: bool [T]; true on what is learnt: every reply's tokens and its end-of-turn token,
        and what the template puts before a reply behind the generation prompt.
      reply_bytes: UTF-8 length of the replies' text that `tokens` holds and `scored` marks.
      length: T before truncation.
      own: `scored`, where it is not `loss_mask`.
      ended: whether its last reply ends with a special token, cut off or not.
      uneven: whether a reply in the middle of it is rendered otherwise than it would be at the end.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    reply_bytes: int
    length: int
    own: np.ndarray | None = None
    ended: bool = True
    uneven: bool = False

    @property
    def scored(self) -> np.ndarray:
        """Bool [T]; true on what a likelihood counts: the replies' own tokens and their ends."""
        return self.loss_mask if self.own is None else self.own

    @property
    def truncated(self) -> bool:
        """Whether something that should be learnt was cut off at the end."""
        return self.length > len(self.tokens)


class _Turn(NamedTuple):
    """One reply: spans of tokens, and the text in it."""

    start: int  # what is learnt begins: what the model is prompted with ends
    begin: int  # the reply's own text begins
    stop: int  # behind its end-of-turn token
    text_start: int  # characters
    text_end: int
    ended: bool = True  # with a special token
    uneven: bool = False  # rendered otherwise than as the last one


class _Rendered(NamedTuple):
    """A conversation or text as tokens, with the characters each stands for."""

    example: Example
    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]


def tokenize(example: Example, tokenizer: PreTrainedTokenizerFast, max_length: int) -> Tokenized:
    """Render an example by the tokenizer's chat template and tokenise it.

    `tokenize_all` describes how, and does many at once far faster.

    Args:
      example: the example.
      tokenizer: a fast tokenizer with a chat template.
      max_length: the most tokens to keep.

    Returns:
      The tokens and the mask of the replies.

    Raises:
      DataError: nothing to learn is left within `max_length`, or the template or tokenizer
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
    that is what the model will be prompted with later. Every assistant turn that follows another
    message is learnt: from where the generation prompt ends (`jaxmoo.data.chat.locate`) up to the
    first special token behind the reply's text, its end-of-turn token, or to the end of the turn's
    rendering when the template ends turns without one. So is what the template puts between the
    prompt and the reply, such as empty thoughts, for the model will have to say it; but it is not
    scored. Where a template marks what the assistant generates (``{% generation %}``) and its marks
    hold every reply's text, what it leaves unmarked before the text is not learnt. What comes after
    the last reply is cut, for no token is learnt from it. Sequences longer than `max_length` lose
    their end.

    Plain text is tokenised as the tokenizer does by itself (with a token at its start, if it puts
    one there), ends with the tokenizer's end token, and is learnt whole but for its first token.

    Args:
      examples: of any languages.
      tokenizer: a fast tokenizer with a chat template; plain text needs none.
      max_length: the most tokens to keep of each.

    Returns:
      One `Tokenized` per example. Where nothing of any reply's text is left (an empty reply, or a
      prompt as long as `max_length`) its `loss_mask` is false everywhere.

    Raises:
      DataError: the tokenizer has no chat template or gives no character offsets, a rendered
        prompt is no prefix of the whole rendering, or the template changes a reply's text.
    """
    if not examples:
        return []
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer "
            "(tokenizer.json) is needed."
        )
    chats = [example for example in examples if example.text is None]
    texts = [example for example in examples if example.text is not None]
    chat_results = iter(_tokenize_chats(chats, tokenizer, max_length) if chats else ())
    text_results = iter(_tokenize_texts(texts, tokenizer, max_length) if texts else ())
    return [next(chat_results if example.text is None else text_results) for example in examples]


def _tokenize_texts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[Tokenized]:
    results = []
    for rendered in _encode(examples, [e.reply for e in examples], tokenizer, plain=True):
        ids, offsets = list(rendered.ids), list(rendered.offsets)
        if ids and tokenizer.eos_token_id not in (None, ids[-1]):
            ids.append(tokenizer.eos_token_id)
            offsets.append((len(rendered.text), len(rendered.text)))
        # A text is a reply to nothing; its first token is predicted by nothing and has no part.
        whole = _Turn(1, 1, len(ids), offsets[0][1] if ids else 0, len(rendered.text))
        rendered = rendered._replace(ids=ids, offsets=offsets)
        results.append(_masked(rendered, [whole] if len(ids) > 1 else [], max_length))
    return results


def _tokenize_chats(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[Tokenized]:
    return [_masked(rendered, turns, max_length) for rendered, turns in _chats(examples, tokenizer)]


def reply_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast
) -> list[np.ndarray]:
    """Return the tokens that lead to every example's last reply, to be continued.

    They end where the reply's own text begins: behind what the template puts between its
    generation prompt and any reply.

    Args:
      examples: conversations whose last reply is not empty.
      tokenizer: a fast tokenizer with a chat template.

    Returns:
      int32 [T] each.

    Raises:
      DataError: as `tokenize_all`.
    """
    return [
        np.asarray(rendered.ids[: turns[-1].begin], np.int32)
        for rendered, turns in _chats(examples, tokenizer)
    ]


def tokenize_choices(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast
) -> list[list[Tokenized]]:
    """Tokenise every choice of examples in the reply's place, as lm-evaluation-harness cuts them.

    White space before the choice is scored with it, for tokenizers join it with a word; the
    end-of-turn token is not scored.

    Args:
      examples: conversations, each with its `choices`.
      tokenizer: a fast tokenizer with a chat template.

    Raises:
      DataError: the tokenizer joins what comes before a choice with it; else as `tokenize_all`.
    """
    for example in examples:
        if not all(example.choices):
            raise DataError(
                f"Language {example.language!r}: expected choices with text, found "
                f"{list(example.choices)}."
            )
    asked = [
        dataclasses.replace(
            example,
            messages=(*example.messages[:-1], {"role": "assistant", "content": choice}),
        )
        for example in examples
        for choice in example.choices
    ]
    located = locate(asked, tokenizer)
    texts = [one.text[: one.turns[-1].end] for one in located]
    contexts = [one.text[: one.turns[-1].start].rstrip() for one in located]
    found = []
    for one, ids, context in zip(
        located, _ids(tokenizer, texts), _ids(tokenizer, contexts), strict=True
    ):
        turn, size = one.turns[-1], len(context)
        if ids[:size] != context or len(ids) == size:
            raise DataError(
                f"Language {one.example.language!r}, choice {one.example.reply[:40]!r}: its tokens "
                "cannot be told from those of the prompt, because the tokenizer joins them. End "
                "the chat template's generation prompt with a special token or a new line."
            )
        scored = len(one.text[turn.start : turn.end].encode())
        mask = np.arange(len(ids)) >= size
        found.append(Tokenized(np.asarray(ids, np.int32), mask, scored, len(ids)))
    rest = iter(found)
    return [[next(rest) for _ in example.choices] for example in examples]


def _chats(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast
) -> list[tuple[_Rendered, list[_Turn]]]:
    """Conversations as tokens, with the turns that are learnt."""
    located = locate(examples, tokenizer)
    encoded = list(_encode(examples, [one.text for one in located], tokenizer))
    prompts = iter(_ids(tokenizer, [turn.prompt for one in located for turn in one.turns]))
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    found = []
    for conversation, rendered in zip(located, encoded, strict=True):
        turns = []
        for turn in conversation.turns:
            prompt = next(prompts)
            if rendered.ids[: len(prompt)] != prompt:
                raise not_a_prefix(conversation, turn)
            turns.append(_turn_of_tokens(conversation, rendered, turn, len(prompt), special))
        found.append(turns)
    for i, (ids, marks) in enumerate(assistant_marks(examples, tokenizer)):
        if ids == encoded[i].ids:
            found[i] = _as_marked(encoded[i], found[i], marks)
    return list(zip(encoded, found, strict=True))


def _turn_of_tokens(
    conversation: Conversation, rendered: _Rendered, turn: Turn, start: int, special: set[int]
) -> _Turn:
    """The tokens of one turn, which is learnt from token `start`."""
    offsets = rendered.offsets
    inside = itertools.takewhile(lambda at: offsets[at][0] < turn.limit, range(start, len(offsets)))
    positions = [at for at in inside if offsets[at][1] <= turn.limit]
    # White space alone belongs to the reply, for tokenizers join it with a word.
    begin = start
    if conversation.text[len(turn.prompt) : turn.start].strip():
        begin = next(at for at in positions if offsets[at][1] > turn.start)
    found = _Turn(start, begin, positions[-1] + 1, turn.start, turn.end, False, turn.uneven)
    for at in positions:
        if rendered.ids[at] in special and offsets[at][0] >= turn.end:
            return found._replace(stop=at + 1, ended=True)
    if turn.uneven:
        raise no_end(conversation, turn)
    return found


def _as_marked(rendered: _Rendered, turns: list[_Turn], marks: Sequence[int]) -> list[_Turn]:
    """Leave out what a template does not mark before a reply's text, if it marks every reply.

    The end of a turn is learnt whether marked or not: a model has to learn to stop.
    """
    marked = []
    for turn in turns:
        said = [
            at
            for at in range(turn.start, turn.stop)
            if rendered.offsets[at][1] > turn.text_start and rendered.offsets[at][0] < turn.text_end
        ]
        if not all(marks[at] for at in said):
            return turns
        start = said[0]
        while start > turn.start and marks[start - 1]:
            start -= 1
        marked.append(turn._replace(start=start, begin=max(start, turn.begin)))
    return marked


def _ids(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    # The template has written every special token, the first included.
    return tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]


def _encode(
    examples: Sequence[Example],
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    plain: bool = False,
) -> Iterator[_Rendered]:
    # A template has written every special token, the first included.
    encoded = tokenizer(
        list(texts),
        add_special_tokens=plain,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    columns = (examples, texts, encoded["input_ids"], encoded["offset_mapping"])
    return itertools.starmap(_Rendered, zip(*columns, strict=True))


def _masked(rendered: _Rendered, turns: Sequence[_Turn], max_length: int) -> Tokenized:
    """Cut behind the last turn that is left, and mark the turns."""
    stop = turns[-1].stop if turns else len(rendered.ids)
    mask = np.zeros(min(stop, max_length), bool)
    own = mask.copy()
    reply_bytes = kept = 0
    for turn in turns:
        end = min(turn.stop, max_length)
        # What the template puts before the reply's text is no reply.
        if any(rendered.offsets[at][1] > turn.text_start for at in range(turn.start, end)):
            mask[turn.start : end] = True
            own[turn.begin : end] = True
            kept = end
            # A character cut in the middle of its bytes counts whole.
            text_end = min(turn.text_end, rendered.offsets[end - 1][1])
            reply_bytes += len(rendered.text[turn.text_start : text_end].encode())
    # With no token left to learn, the whole is kept to be shown in a complaint.
    kept = kept or len(mask)
    return Tokenized(
        np.asarray(rendered.ids[:kept], np.int32),
        mask[:kept],
        reply_bytes,
        stop,
        None if np.array_equal(mask, own) else own[:kept],
        ended=not turns or turns[-1].ended,
        uneven=any(turn.uneven for turn in turns),
    )
