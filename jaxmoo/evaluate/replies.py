"""Replies of a model to prompts, from its settings to texts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from jaxmoo import mesh
from jaxmoo.config import DataConfig
from jaxmoo.config import load_config as load_run_config
from jaxmoo.convert.kinds import kind_of, source_of, tokenizer_of
from jaxmoo.data import Example
from jaxmoo.data.example import checked_text
from jaxmoo.data.sources.files import open_file
from jaxmoo.data.tokenization.tokenize import reply_prompts
from jaxmoo.data.tokenization.tokenizer import chat_tokenizer
from jaxmoo.errors import ConfigError, DataError, shown
from jaxmoo.evaluate.generated import reply_text, stop_tokens
from jaxmoo.evaluate.generator import Generator
from jaxmoo.evaluate.opened import open_on
from jaxmoo.hf import check_tokenizer, load_config
from jaxmoo.hf.generation import sampling_of
from jaxmoo.models.sampling import Sampling
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.runtime.processes import check_same, is_first, said_by_first

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Prompt", "Replies", "Reply", "read_prompts", "reply"]


class Prompt(NamedTuple):
    """What a model is asked.

    Attributes:
      messages: a conversation that ends with a question; for the chat template.
      text: or a text to continue as it is.
      stop: tokens that end the reply beside the model's own: their texts, or their numbers.
      place: where it was found, for errors.
    """

    messages: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    stop: tuple[str | int, ...] = ()
    place: str = "the prompt"


class Reply(NamedTuple):
    """What a model said.

    Attributes:
      text: without special tokens and white space at its ends.
      tokens: how many there are, with the one that ended it.
      stopped: whether a token ended it, not the limit.
    """

    text: str
    tokens: int
    stopped: bool


@dataclasses.dataclass(frozen=True)
class Replies:
    """What decides replies.

    Attributes:
      model: directory of any kind that `jaxmoo.convert.models.open_model` opens.
      prompts: what it is asked.
      step: which of a run's checkpoints; None for the newest.
      base: the model that a run or adapters began with, if it has moved.
      new_tokens: the most tokens of a reply.
      stop: tokens that end every reply, beside the model's own: texts or numbers.
      sample: whether tokens are drawn, as the model's ``generation_config.json`` says but for
        `sampling`; else the likeliest is taken.
      sampling: other settings of how they are drawn, by their names in
        :class:`jaxmoo.models.sampling.Sampling`.
      seed: of all that is drawn.
      batch_size: prompts at a time.
      dtype: dtype of the computation.
      mesh: see :class:`jaxmoo.evaluate.Evaluation`.
    """

    model: Path
    prompts: Sequence[Prompt]
    step: int | None = None
    base: str | None = None
    new_tokens: int = 256
    stop: tuple[str | int, ...] = ()
    sample: bool = False
    sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    batch_size: int = 16
    dtype: str = "float32"
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError("There is no prompt: give --prompt TEXT or --file prompts.jsonl.")
        for name, value in {"max-tokens": self.new_tokens, "batch-size": self.batch_size}.items():
            if value < 1:
                raise ConfigError(f"--{name} takes a positive number, found {value}.")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"--seed takes a number from 0 to {2**31 - 1}, found {self.seed}.")


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts from a file: JSON Lines, JSON, CSV or Parquet.

    Args:
      path: the file. Each record has ``prompt``, a text, or ``messages``, a conversation that ends
        with what is asked; and may have ``stop``, a list of tokens.

    Raises:
      DataError: the file cannot be read, or a record is no such thing; names the line.
    """
    try:
        records = list(open_file(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    return [_prompt(place, record) for place, record in records if record is not None]


def _prompt(place: str, record: Mapping[str, Any] | DataError) -> Prompt:
    if isinstance(record, DataError):
        raise record
    prompt, messages = record.get("prompt"), record.get("messages")
    stop = record.get("stop")
    stop = [] if stop is None else stop if isinstance(stop, list) else [stop]
    if not all(type(one) in (str, int) for one in stop):
        raise DataError(f"{place}: stop is a list of tokens, found {shown(stop)}")
    try:
        if (prompt is None) == (messages is None):
            raise DataError("expected either a prompt or messages")
        if prompt is not None:
            messages = [{"role": "user", "content": checked_text(prompt)}]
        _as_example(messages)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    return Prompt(tuple(messages or ()), stop=tuple(stop), place=place)


def _as_example(messages: Any, place: str = "") -> Example:
    """A conversation with a reply in the place of the one that is asked for."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"expected a list of messages, found {shown(messages)}")
    last = messages[-1]
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        raise DataError("the last message is the assistant's: expected one to reply to")
    said = {"role": "assistant", "content": "!"}
    return Example.from_messages("", [*messages, said], place=place)


def reply(settings: Replies, say: Callable[[str], None] = print) -> list[Reply]:
    """Let a model reply to prompts.

    A reply is continued from where one begins in training (and in `evaluate`): behind what the chat
    template puts before it. It ends with a token of the model's ``generation_config.json``, the
    tokenizer's own end token, or the one that ends turns in the template.

    In several processes (see :mod:`jaxmoo.runtime.processes`) all of them call this.

    Args:
      settings: what is asked, and how.
      say: called with lines for a person to read, in the first process.

    Returns:
      A reply for each prompt, in every process.

    Raises:
      JaxmooError: anything that would make it fail; before weights are read, but for damaged ones.
    """
    say = said_by_first(say)
    source = source_of(settings.model, base=settings.base)
    architecture = load_config(source)
    tokenizer, _ = chat_tokenizer(tokenizer_of(settings.model, source), _data(settings.model))
    check_tokenizer(tokenizer, architecture.vocab_size, settings.model)
    sampling = _sampling(settings, source, say)
    prompts = [_tokens(one, tokenizer) for one in settings.prompts]
    own = (*stop_tokens(source, tokenizer), *_numbers(settings.stop, tokenizer, "--stop"))
    stop = [
        sorted({*own, *_numbers(one.stop, tokenizer, f"{one.place}: stop")})
        for one in settings.prompts
    ]
    room = architecture.max_position_embeddings - settings.new_tokens
    for one, tokens in zip(settings.prompts, prompts, strict=True):
        if len(tokens) > room:
            raise DataError(
                f"{one.place} has {len(tokens)} tokens; with {settings.new_tokens} new ones it "
                f"exceeds {architecture.max_position_embeddings}, the longest sequence of the "
                "model. Shorten it, or lower --max-tokens."
            )
    check_same(
        prompts=json.dumps([[one.tolist() for one in prompts], stop]),
        settings=repr(dataclasses.replace(settings, prompts=("",))),
    )

    device_mesh = mesh.make_mesh(1, **dict[str, Any](settings.mesh))
    opened, decoder = open_on(
        device_mesh,
        settings.model,
        step=settings.step,
        base=settings.base,
        dtype=settings.dtype,
        say=say,
    )
    rows = min(settings.batch_size, len(prompts))
    pad_id: Any = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    generator = Generator(
        decoder,
        device_mesh,
        batch_size=-(-rows // device_mesh.size) * device_mesh.size,
        new_tokens=settings.new_tokens,
        pad_id=pad_id,
        sampling=sampling,
        seed=settings.seed,
    )
    # None: only on a terminal
    with tqdm(total=len(prompts), unit="reply", disable=None if is_first() else True) as bar:
        found = generator(nnx.state(opened.model), prompts, stop, bar.update)
    replies = []
    for tokens, ends in zip(found, stop, strict=True):
        text, stopped = reply_text(tokens, ends, tokenizer)
        replies.append(Reply(text, len(tokens), stopped))
    return replies


def _data(model: Path) -> DataConfig:
    """The settings of a run's data, for its chat template; else none."""
    if kind_of(model) == "run":
        return load_run_config(RunDirectory(model).config).data
    return DataConfig()


def _sampling(settings: Replies, source: Path, say: Callable[[str], None]) -> Sampling | None:
    if not settings.sample:
        return None
    own, others = sampling_of(source)
    if others:
        say(f"Note: generation_config.json also asks for {', '.join(others)}, which is not done.")
    return dataclasses.replace(own, **settings.sampling)


def _tokens(prompt: Prompt, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    if prompt.text is None:
        return reply_prompts([_as_example(prompt.messages, prompt.place)], tokenizer)[0]
    tokens = np.asarray(tokenizer.encode(prompt.text), np.int32)
    if not len(tokens):
        raise DataError(f"{prompt.place} is empty")
    return tokens


def _numbers(stop: Sequence[str | int], tokenizer: PreTrainedTokenizerFast, what: str) -> list[int]:
    """Numbers of tokens that are given by their texts or numbers."""
    found = []
    for one in stop:
        ids = [one] if isinstance(one, int) else tokenizer.encode(one, add_special_tokens=False)
        if len(ids) != 1 or not 0 <= ids[0] < len(tokenizer):
            raise ConfigError(
                f"{what} takes tokens: {one!r} is "
                + ("none of them." if isinstance(one, int) else f"{len(ids)} of them.")
            )
        found += ids
    return found
