"""The tokenizer of a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jaxmoo.errors import CheckpointError, shown
from jaxmoo.files.at_hand import at_hand
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.load import load_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["check_tokenizer", "load_tokenizer"]

# What transformers reads of a directory to make a tokenizer.
_FILES = ("*.json", "*.jinja")


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model, chat template and special tokens included.

    ``tokenizer.json`` is used as it is. (Some tokenizer classes of transformers 5 keep only its
    vocabulary and build the rest themselves, which loses, for one, the splitting of numbers into
    digits that SmolLM2 was trained with.)

    Args:
      path: a Hugging Face directory.

    Returns:
      The tokenizer.

    Raises:
      CheckpointError: when ``tokenizer.json`` is missing or unusable, the longest text is no
        number, or the directory's model does not know all of the tokens.
      ConfigError: when the architecture of the directory's model is not supported.
    """
    file = typed_path(path) / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no tokenizer.json. Copy the base model's tokenizer files into it; a "
            "directory with only tokenizer.model can be converted with "
            "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    from transformers import PreTrainedTokenizerFast

    try:
        with at_hand(typed_path(path), _FILES) as directory:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    # The Rust library raises bare Exception on a file it cannot parse.
    except Exception as error:
        raise CheckpointError(f"the tokenizer in {path} cannot be loaded: {error}") from error
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
        raise CheckpointError(
            f"the tokenizer in {path} cannot be used: model_max_length, in tokenizer_config.json, "
            f"must be a number of tokens, found {shown(longest)}"
        )
    if (typed_path(path) / "config.json").is_file():
        check_tokenizer(tokenizer, load_config(path).vocab_size, path)
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, vocab_size: int, path: Path) -> None:
    """Raise unless a model has a vector for every token.

    Models may have more: many pad their tables.

    Args:
      tokenizer: the tokenizer.
      vocab_size: rows of the model's table.
      path: where both came from.

    Raises:
      CheckpointError: the tokenizer has tokens that the model does not know.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < 0:
        raise CheckpointError(f"the tokenizer in {path} has no tokens at all")
    if largest >= vocab_size:
        raise CheckpointError(
            f"model and tokenizer in {path} do not belong together: the tokenizer has tokens up to "
            f"number {largest}, the model's config.json says vocab_size={vocab_size}. Copy the "
            "tokenizer files of the model that the weights come from."
        )
