"""From a model of any kind to a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jaxmoo.convert.kinds import tokenizer_of
from jaxmoo.convert.models import open_model
from jaxmoo.data.tokenization.tokenizer import NO_ENDING, ending_token
from jaxmoo.errors import CheckpointError
from jaxmoo.files.buckets import is_bucket
from jaxmoo.files.outputs import check_writable, typed_path
from jaxmoo.hf.generation import stop_tokens
from jaxmoo.hf.gguf_architectures import longest_text
from jaxmoo.hf.gguf_write import save_gguf
from jaxmoo.hf.tokenizer import check_tokenizer, load_tokenizer

__all__ = ["to_gguf"]


def to_gguf(
    source: Path,
    out: Path,
    *,
    kind: str | None = None,
    step: int | None = None,
    base: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Convert a model into a GGUF file for llama.cpp, Ollama and whatever else reads them.

    Args:
      source: a Hugging Face directory, adapters, a checkpoint directory or a training run.
      out: the file to make; there must be none.
      kind: type of the matrices, one of :data:`jaxmoo.hf.gguf_write.KINDS`; by default as the model
        came.
      step: which of a run's checkpoints; the newest by default.
      base: see :func:`jaxmoo.convert.models.to_hf`.
      say: called with lines for a person to read.

    Raises:
      CheckpointError: when ``out`` is there, ``source`` is damaged, or the format cannot hold it.
      ConfigError: nothing can be written there, or there is no such kind.
    """
    source, out = typed_path(source), typed_path(out)
    if is_bucket(out):
        raise CheckpointError(f"{out}: name a file of this machine, and copy it to the bucket.")
    if out.suffix != ".gguf":
        raise CheckpointError(f"{out}: name a file that ends in .gguf")
    if out.exists():
        raise CheckpointError(
            f"{out} already exists; nothing was written. Choose another path or remove it yourself."
        )
    check_writable(out.absolute().parent, str(out))
    opened = open_model(source, step=step, base=base, say=say)
    config, directory = opened.model.config, tokenizer_of(source, opened.source)
    tokenizer = load_tokenizer(directory)
    check_tokenizer(tokenizer, config.vocab_size, directory)
    if opened.chat_template is not None:
        tokenizer.chat_template = opened.chat_template
    ending = ending_token(tokenizer)
    if ending is None:
        say(NO_ENDING)
    longest = longest_text(config)
    if longest < config.max_position_embeddings:
        say(
            f"Note: GGUF files of this architecture have no sliding window ({longest} tokens), so "
            "that is the longest text that the file says the model reads."
        )
    save_gguf(
        opened.model,
        out,
        tokenizer=tokenizer,
        dtypes=opened.dtypes,
        kind=kind,
        stop=[*([] if ending is None else [ending]), *stop_tokens(opened.source), *opened.stop],
        name=source.absolute().name if opened.card is None else opened.card.title,
    )
