"""From conversations and texts to token sequences with a loss mask over what is learnt."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxmoo.data.example import MARK, Example
from jaxmoo.data.sources.records import Malformed
from jaxmoo.data.tokenization.chat import Conversation, Turn, locate, no_end, not_a_prefix
from jaxmoo.data.tokenization.encode import Encoded, Encoder, given, lost
from jaxmoo.data.tokenization.template import ChatTemplate
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
      length: T before truncation; at least so much, of a text of more than 250,000
        characters.
      own: `scored`, where it is not `loss_mask`.
      ended: whether its last reply ends with a special token, cut off or not.
      uneven: whether a reply in the middle of it is rendered otherwise than it would be at the end.
      spelled: special tokens that its texts spell, every time; learnt as text unless asked for.
      ignored: keys of its messages that the template shows nothing of.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    reply_bytes: int
    length: int
    own: np.ndarray | None = None
    ended: bool = True
    uneven: bool = False
    spelled: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

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


def tokenize(
    example: Example,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    *,
    special_tokens: str = "text",
) -> Tokenized:
    """Render an example by the tokenizer's chat template and tokenise it.

    `tokenize_all` describes how, and does many at once far faster.

    Args:
      example: the example.
      tokenizer: a fast tokenizer with a chat template.
      max_length: the most tokens to keep.
      special_tokens: as in `tokenize_all`.

    Returns:
      The tokens and the mask of the replies.

    Raises:
      DataError: nothing to learn is left within `max_length`, or the template or tokenizer
        cannot be used.
    """
    (result,) = tokenize_all([example], tokenizer, max_length, special_tokens=special_tokens)
    if result.loss_mask.any():
        return result
    raise DataError(
        f"An example of {example.language!r} has no reply token within {max_length} tokens: its "
        f"reply is {example.reply[:60]!r}, its rendering has {result.length} tokens."
    )


def tokenize_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    *,
    special_tokens: str = "text",
) -> list[Tokenized]:
    """Render examples by the tokenizer's chat template and tokenise them.

    The template decides everything around the text, a default system prompt included, because
    that is what the model will be prompted with later. Every assistant turn that follows another
    message is learnt: from where the generation prompt ends (`chat.locate`) up to the
    first special token behind the reply's text, its end-of-turn token, or to the end of the turn's
    rendering when the template ends turns without one. So is what the template puts between the
    prompt and the reply, such as empty thoughts, for the model will have to say it; but it is not
    scored. Where a template marks what the assistant generates (``{% generation %}``) and its marks
    hold every reply's text, what it leaves unmarked before the text is not learnt. What comes after
    the last reply is cut, for no token is learnt from it. Sequences longer than `max_length` lose
    their end.

    What spells a special token in the data, such as ``<|im_end|>``, is no such token, for it would
    end a turn or begin one that nobody took; it is tokenised as the text it is.

    Plain text is tokenised as the tokenizer does by itself (with a token at its start, if it puts
    one there), ends with the tokenizer's end token, and is learnt whole but for its first token.

    Args:
      examples: of one language, or any.
      tokenizer: a fast tokenizer with a chat template; plain text needs none.
      max_length: the most tokens to keep of each.
      special_tokens: ``tokens`` makes special tokens of all that spells them.

    Returns:
      One `Tokenized` per example. Where nothing of any reply's text is left (an empty reply, or a
      prompt as long as `max_length`) its `loss_mask` is false everywhere.

    Raises:
      DataError: the tokenizer has no chat template, gives no character offsets, or knows less than
        half of the replies' characters; or, naming the place of an example, the template fails, a
        rendered prompt is no prefix of the whole rendering, or a reply's text is changed.
    """
    strict = Malformed("the examples", 0.0)
    return tokenize_good(examples, tokenizer, max_length, strict, special_tokens=special_tokens)[1]


def tokenize_good(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    malformed: Malformed,
    *,
    special_tokens: str = "text",
) -> tuple[list[Example], list[Tokenized]]:
    """As `tokenize_all`, without the examples that the template cannot render.

    Args:
      examples: as in `tokenize_all`.
      tokenizer: as in `tokenize_all`.
      max_length: as in `tokenize_all`.
      malformed: notes what is wrong with each that is left out.
      special_tokens: as in `tokenize_all`.

    Returns:
      The examples that are left, and one `Tokenized` for each.

    Raises:
      DataError: there are more of them than `malformed` allows; else as `tokenize_all`.
    """
    found = tokenize_part(examples, tokenizer, max_length, malformed, special_tokens=special_tokens)
    if found.tokens:
        check_known(found.characters, found.missing, examples[found.kept[0]].language)
    return [examples[number] for number in found.kept], found.tokens


class Part(NamedTuple):
    """What becomes of examples, or of a part of them.

    Attributes:
      kept: numbers of those that are left.
      tokens: one for each of these.
      characters: how many they are to learn.
      missing: for how many of these the tokenizer has no tokens.
    """

    kept: list[int]
    tokens: list[Tokenized]
    characters: int
    missing: int


def tokenize_part(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    malformed: Malformed,
    *,
    special_tokens: str = "text",
) -> Part:
    """As `tokenize_good`, but leaves it to the caller to `check_known`, for all parts together."""
    if not examples:
        return Part([], [], 0, 0)
    encoder = Encoder(tokenizer, special_tokens, max_length)
    chats = [example for example in examples if example.text is None]
    texts = [example for example in examples if example.text is not None]
    chat_results = iter(_chats(chats, encoder, malformed) if chats else ())
    text_results = iter(_plain(texts, encoder, malformed) if texts else ())
    found = [next(chat_results if e.text is None else text_results) for e in examples]
    kept = [number for number, one in enumerate(found) if one is not None]
    good = [one for one in found if one is not None]
    tokenized = [
        dataclasses.replace(_masked(one, max_length), spelled=tuple(encoder.spelled(one.example)))
        for one in good
    ]
    return Part(kept, tokenized, *_unknown(good, tokenizer))


class _Read(NamedTuple):
    """An example as tokens, with the replies in it."""

    example: Example
    encoded: Encoded
    turns: list[_Turn]
    ignored: tuple[str, ...] = ()


def _plain(
    examples: Sequence[Example], encoder: Encoder, malformed: Malformed
) -> list[_Read | None]:
    eos: Any = encoder.tokenizer.eos_token_id
    results: list[_Read | None] = []
    texts = [example.reply for example in examples]
    for example, encoded in zip(examples, encoder.encode(texts, plain=True), strict=True):
        if isinstance(encoded, DataError):
            malformed.add(example.error(encoded))
            results.append(None)
            continue
        ids, offsets = list(encoded.ids), list(encoded.offsets)
        size = len(encoded.text)
        if ids and eos not in (None, ids[-1]):
            ids.append(eos)
            offsets.append((size, size))
        # A text is a reply to nothing; its first token is predicted by nothing and has no part.
        whole = _Turn(1, 1, len(ids), offsets[0][1] if ids else 0, size)
        turns = [whole] if len(ids) > 1 else []
        results.append(_Read(example, Encoded(encoded.text, ids, offsets), turns))
    return results


def _unknown(examples: Sequence[_Read], tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """How many characters are to be learnt, and of how many of these no token tells."""
    unknown: Any = tokenizer.unk_token_id
    characters = missing = 0
    for one in examples:
        spans = [(turn.text_start, turn.text_end) for turn in one.turns]
        if one.example.text is not None:
            spans = [(0, len(one.encoded.text))]
        for start, end in spans:
            characters += end - start
            missing += lost(one.encoded, start, end, unknown)
    return characters, missing


def check_known(characters: int, missing: int, language: str) -> None:
    """Raise where a tokenizer has no tokens for most of what is to be learnt.

    Args:
      characters: how many are to be learnt.
      missing: for how many of these it has none.
      language: theirs.
    """
    if missing > characters / 2:
        raise DataError(
            f"The tokenizer loses the text of language {language!r}: it has no tokens "
            f"for {missing:,} of the {characters:,} characters to learn. Take a model whose "
            "tokenizer knows the language's script, or mend tokenizer.json."
        )


def reply_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    *,
    special_tokens: str = "text",
) -> list[np.ndarray]:
    """Return the tokens that lead to every example's last reply, to be continued.

    They end where the reply's own text begins: behind what the template puts between its
    generation prompt and any reply.

    Args:
      examples: conversations whose last reply is not empty.
      tokenizer: a fast tokenizer with a chat template.
      special_tokens: as in `tokenize_all`.

    Returns:
      int32 [T] each.

    Raises:
      DataError: as `tokenize_all`.
    """
    found = _chats(examples, Encoder(tokenizer, special_tokens), Malformed("the examples", 0.0))
    # None is left out where none may be malformed.
    read = [one for one in found if one is not None]
    return [np.asarray(one.encoded.ids[: one.turns[-1].begin], np.int32) for one in read]


def tokenize_choices(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    *,
    special_tokens: str = "text",
) -> list[list[Tokenized]]:
    """Tokenise every choice of examples in the reply's place, as lm-evaluation-harness cuts them.

    White space before the choice is scored with it, for tokenizers join it with a word; the
    end-of-turn token is not scored.

    Args:
      examples: conversations, each with its `choices`.
      tokenizer: a fast tokenizer with a chat template.
      special_tokens: as in `tokenize_all`.

    Raises:
      DataError: the tokenizer joins what comes before a choice with it; else as `tokenize_all`.
    """
    for example in examples:
        if not all(example.choices):
            raise example.error(f"expected choices with text, found {list(example.choices)}.")
    asked = [
        dataclasses.replace(
            example,
            messages=(*example.messages[:-1], {"role": "assistant", "content": choice}),
        )
        for example in examples
        for choice in example.choices
    ]
    encoder, template = Encoder(tokenizer, special_tokens), ChatTemplate(tokenizer)
    located = [_located(one, template, encoder) for one in asked]
    texts = encoder.encode([one.text[: one.turns[-1].end] for one in located])
    contexts = encoder.encode([one.text[: one.turns[-1].start].rstrip() for one in located])
    found = []
    for one, text, before in zip(located, texts, contexts, strict=True):
        try:
            ids, context = given(text).ids, given(before).ids
        except DataError as error:
            raise one.example.error(error) from None
        turn, size = one.turns[-1], len(context)
        if ids[:size] != context or len(ids) == size:
            raise one.example.error(
                f"choice {one.example.reply[:40]!r}: its tokens cannot be told from those of the "
                "prompt, because the tokenizer joins them. End the chat template's generation "
                "prompt with a special token or a new line."
            )
        scored = len(one.text[turn.start : turn.end].replace(MARK, "").encode())
        mask = np.arange(len(ids)) >= size
        found.append(Tokenized(np.asarray(ids, np.int32), mask, scored, len(ids)))
    rest = iter(found)
    return [[next(rest) for _ in example.choices] for example in examples]


def _located(example: Example, template: ChatTemplate, encoder: Encoder) -> Conversation:
    """Where replies lie in a conversation, with marks in what spells a special token."""
    if encoder.as_text and encoder.spelled(example):
        example = encoder.marked(example)
    try:
        return locate(example, template)
    except DataError as error:
        raise example.error(error) from None


def _chats(
    examples: Sequence[Example], encoder: Encoder, malformed: Malformed
) -> list[_Read | None]:
    """Conversations as tokens, with the turns that are learnt; None for those left out."""
    template = ChatTemplate(encoder.tokenizer)
    located = []
    for number, example in enumerate(examples):
        try:
            located.append((number, _located(example, template, encoder)))
        except DataError as error:
            malformed.add(error)
    texts = encoder.encode([one.text for _, one in located])
    prompts = [turn.prompt for _, one in located for turn in one.turns]
    prompts = iter(encoder.encode(prompts))
    found: list[_Read | None] = [None] * len(examples)
    for (number, one), encoded in zip(located, texts, strict=True):
        some = [next(prompts) for _ in one.turns]
        try:
            tokens = given(encoded)
            turns = _turns(one, tokens, some, encoder.special)
            found[number] = _Read(examples[number], tokens, turns, one.ignored)
        except DataError as error:
            malformed.add(examples[number].error(error))
    return found


def _turns(
    conversation: Conversation,
    encoded: Encoded,
    prompts: Sequence[Encoded | DataError],
    special: set[int],
) -> list[_Turn]:
    """The turns of a conversation that begin where it was tokenised."""
    turns, size = [], len(encoded.text)
    for turn, prompt in zip(conversation.turns, prompts, strict=True):
        if max(turn.start, len(turn.prompt)) >= size:
            break
        ids = given(prompt).ids
        if encoded.ids[: len(ids)] != ids:
            raise not_a_prefix(conversation, turn)
        if turn.end <= size:
            turns.append(_turn_of_tokens(conversation, encoded, turn, len(ids), special))
        else:
            # Its end was not tokenised, and is cut off in any case.
            cut = turn._replace(end=size, limit=size, uneven=False)
            found = _turn_of_tokens(conversation, encoded, cut, len(ids), special)
            turns.append(found._replace(ended=True))
    if conversation.marked:
        turns = _as_marked(encoded, turns, _marks(encoded, conversation.marked))
    return turns


def _marks(rendered: Encoded, marked: Sequence[tuple[int, int]]) -> np.ndarray:
    """Bool per token: whether any of its characters is marked."""
    inside = np.zeros(len(rendered.text) + 1, np.int64)  # marked characters before each
    for start, end in marked:
        inside[start + 1 : end + 1] = 1
    inside = np.cumsum(inside)
    starts, ends = np.asarray(rendered.offsets, np.int64).reshape(-1, 2).T
    return inside[ends] > inside[starts]


def _turn_of_tokens(
    conversation: Conversation, rendered: Encoded, turn: Turn, start: int, special: set[int]
) -> _Turn:
    """The tokens of one turn, which is learnt from token `start`."""
    offsets = rendered.offsets
    inside = itertools.takewhile(lambda at: offsets[at][0] < turn.limit, range(start, len(offsets)))
    positions = [at for at in inside if offsets[at][1] <= turn.limit]
    if not any(offsets[at][1] > turn.start for at in positions):
        return _Turn(start, start, start, turn.start, turn.end)
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


def _as_marked(rendered: Encoded, turns: list[_Turn], marks: np.ndarray) -> list[_Turn]:
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
        if not said or not all(marks[at] for at in said):
            return turns
        start = said[0]
        while start > turn.start and marks[start - 1]:
            start -= 1
        marked.append(turn._replace(start=start, begin=max(start, turn.begin)))
    return marked


def _masked(read: _Read, max_length: int) -> Tokenized:
    """Cut behind the last turn that is left, and mark the turns."""
    rendered, turns = read.encoded, read.turns
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
            said = rendered.text[turn.text_start : text_end]
            reply_bytes += len(said.replace(MARK, "").encode())
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
        ignored=read.ignored,
    )
