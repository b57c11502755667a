"""From conversations and texts to token sequences with a loss mask over what is learnt."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np

from jaxmoo.data.example import Example
from jaxmoo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, eq=False)
class Tokenized:
    """One example as the model sees it.

    Attributes:
      tokens: int32 [T]; the rendered conversation up to and including the end-of-turn token of
        its last reply, or a text and its end token.
      loss_mask: bool [T]; true on every reply's tokens and on its end-of-turn token.
      reply_bytes: UTF-8 length of the replies' text that `tokens` holds and `loss_mask` marks.
      length: T before truncation.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    reply_bytes: int
    length: int

    @property
    def truncated(self) -> bool:
        """Whether something that should be learnt was cut off at the end."""
        return self.length > len(self.tokens)


class _Turn(NamedTuple):
    """What is learnt of one assistant turn: a span of tokens, and the text in it."""

    start: int
    stop: int  # behind its end-of-turn token
    text_start: int  # characters
    text_end: int


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
    message is learnt. The loss mask is the template's own where it marks what the assistant
    generates (``{% generation %}``) and its marks hold every reply's text. Otherwise it is a
    difference of prefixes: the conversation is rendered up to where each reply begins
    (``add_generation_prompt``) and whole, and what the whole has more, up to the first special
    token after the reply's text, is the reply with its end-of-turn token; up to the end of the
    turn's rendering when the template ends turns without one. What comes after the last reply is
    cut, for no token is learnt from it. Sequences longer than `max_length` lose their end.

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
        whole = _Turn(1, len(ids), offsets[0][1] if ids else 0, len(rendered.text))
        rendered = rendered._replace(ids=ids, offsets=offsets)
        results.append(_masked(rendered, [whole] if len(ids) > 1 else [], max_length))
    return results


def _tokenize_chats(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[Tokenized]:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "The tokenizer has no chat template. Use an instruction-tuned model's tokenizer, or "
            "give a template (data.chat_template, tokenizer.chat_template)."
        )
    conversations = [list(example.messages) for example in examples]
    wholes = _render(tokenizer, conversations)
    encoded = list(_encode(examples, wholes, tokenizer))
    turns: list[list[_Turn] | None] = [None] * len(examples)
    if _GENERATION.search(str(tokenizer.chat_template)):
        marked = tokenizer.apply_chat_template(
            conversations, return_assistant_tokens_mask=True, return_dict=True
        )
        for i, rendered in enumerate(encoded):
            if marked["input_ids"][i] == rendered.ids:
                turns[i] = _marked_turns(rendered, marked["assistant_masks"][i])
    rest = [i for i, found in enumerate(turns) if found is None]
    for i, found in zip(rest, _prefix_turns([encoded[i] for i in rest], tokenizer), strict=True):
        turns[i] = found
    return [
        _masked(rendered, found or [], max_length)
        for rendered, found in zip(encoded, turns, strict=True)
    ]


def _render(
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[list[Mapping[str, str]]],
    **options: Any,
) -> list[str]:
    """Render conversations, or say which one the template refuses and why."""
    if not conversations:
        return []
    try:
        return tokenizer.apply_chat_template(list(conversations), tokenize=False, **options)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"The chat template is broken, line {error.lineno}: {error}") from None
    except jinja2.TemplateError as error:
        failure = error
    for conversation in conversations:
        try:
            tokenizer.apply_chat_template(conversation, tokenize=False, **options)
        except jinja2.TemplateError as error:
            shown = [(message["role"], message["content"][:40]) for message in conversation]
            raise DataError(
                f"The chat template cannot render {shown}: {error}. Change the data, or give "
                "another template (data.chat_template)."
            ) from None
    raise DataError(f"The chat template cannot be used: {failure}")


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
    reply_bytes = kept = 0
    for turn in turns:
        end = min(turn.stop, max_length)
        # Special tokens that the template puts before the reply's text are no reply.
        if any(rendered.offsets[at][1] > turn.text_start for at in range(turn.start, end)):
            mask[turn.start : end] = True
            kept = end
            # A character cut in the middle of its bytes counts whole.
            text_end = min(turn.text_end, rendered.offsets[end - 1][1])
            reply_bytes += len(rendered.text[turn.text_start : text_end].encode())
    # With no token left to learn, the whole is kept to be shown in a complaint.
    kept = kept or len(mask)
    return Tokenized(np.asarray(rendered.ids[:kept], np.int32), mask[:kept], reply_bytes, stop)


def _marked_turns(rendered: _Rendered, marks: Sequence[int]) -> list[_Turn] | None:
    """The turns as a template marks them; None where its marks do not hold every reply's text."""
    edges = np.flatnonzero(np.diff([0, *marks, 0]))
    spans = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    replies = [m["content"] for m in rendered.example.messages if m["role"] == "assistant"]
    replies = [reply for reply in replies if reply]
    if len(spans) != len(replies):
        return None
    turns = []
    for (start, stop), reply in zip(spans, replies, strict=True):
        first, last = rendered.offsets[start][0], rendered.offsets[stop - 1][1]
        at = rendered.text.find(reply, first, last)
        if at < 0:
            return None
        turns.append(_Turn(start, stop, at, at + len(reply)))
    return turns


def _prefix_turns(
    conversations: Sequence[_Rendered], tokenizer: PreTrainedTokenizerFast
) -> list[list[_Turn]]:
    """The turns as differences of prefixes."""
    wanted = [
        (rendered, at)
        for rendered in conversations
        for at, message in enumerate(rendered.example.messages)
        # Nothing leads to a first message, and an empty turn teaches nothing but to stop.
        if at and message["role"] == "assistant" and message["content"]
    ]
    if not wanted:
        return [[] for _ in conversations]
    prompts = _render(
        tokenizer,
        [list(rendered.example.messages[:at]) for rendered, at in wanted],
        add_generation_prompt=True,
    )
    # What follows an inner turn is told apart from it by rendering the conversation up to it.
    inner = [(r, at) for r, at in wanted if at + 1 < len(r.example.messages)]
    ends = iter(
        _render(tokenizer, [list(rendered.example.messages[: at + 1]) for rendered, at in inner])
    )
    prompt_ids = tokenizer(
        prompts, add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    turns: dict[int, list[_Turn]] = {id(rendered): [] for rendered in conversations}
    for (rendered, at), prompt, ids in zip(wanted, prompts, prompt_ids, strict=True):
        end = next(ends) if at + 1 < len(rendered.example.messages) else rendered.text
        reply = rendered.example.messages[at]["content"]
        turns[id(rendered)].append(_prefix_turn(rendered, reply, prompt, ids, end, special))
    for rendered in conversations:
        for turn, following in itertools.pairwise(turns[id(rendered)]):
            if turn.stop > following.start:
                reply = rendered.text[turn.text_start : turn.text_end]
                raise DataError(
                    f"{_described(rendered.example, reply)}: expected the chat template to render "
                    "the reply as it is, but its text is found only in a later turn."
                )
    return [turns[id(rendered)] for rendered in conversations]


def _prefix_turn(
    rendered: _Rendered,
    reply: str,
    prompt: str,
    prompt_ids: list[int],
    ended: str,
    special: set[int],
) -> _Turn:
    """One turn, from the renderings of the conversation before it and up to its end."""
    start, whole, offsets = len(prompt_ids), rendered.text, rendered.offsets
    if rendered.ids[:start] != prompt_ids or not whole.startswith(prompt):
        raise DataError(
            f"{_described(rendered.example, reply)}: expected the rendered prompt to be a prefix "
            f"of the rendered conversation, token by token; found a prompt that ends in "
            f"{prompt[-40:]!r} and a conversation that goes on as "
            f"{whole[max(len(prompt) - 20, 0) :][:60]!r}. The chat template does not suit training "
            "on replies: give one (data.chat_template) whose generation prompt is how a reply "
            "begins, or that marks replies with {% generation %}."
        )
    text_start = whole.find(reply, len(prompt))
    text_end = text_start + len(reply)
    if text_start < 0 or reply not in ended[len(prompt) :]:
        raise DataError(
            f"{_described(rendered.example, reply)}: expected the chat template to render the "
            f"reply as it is, found {whole[len(prompt) :][:60]!r}."
        )
    # Some templates render a turn otherwise once another follows; then only a special token ends
    # it.
    shared = next((i for i, (a, b) in enumerate(zip(whole, ended, strict=False)) if a != b), None)
    shared = min(len(whole), len(ended)) if shared is None else shared
    limit = shared if shared >= text_end else len(whole)
    inside = itertools.takewhile(lambda at: offsets[at][0] < limit, range(start, len(offsets)))
    positions = [at for at in inside if offsets[at][1] <= limit]
    for position in positions:
        if rendered.ids[position] in special and offsets[position][0] >= text_end:
            return _Turn(start, position + 1, text_start, text_end)
    if shared < text_end:
        raise DataError(
            f"{_described(rendered.example, reply)}: cannot tell where this turn ends, for the "
            "chat template renders it otherwise when others follow. Give a template "
            "(data.chat_template) that does not, or that marks replies with {% generation %}."
        )
    return _Turn(start, start + len(positions), text_start, text_end)


def _described(example: Example, reply: str) -> str:
    return f"Language {example.language!r}, reply {reply[:40]!r}"
