"""A run's tokenizer: its chat template, the date that one sees, and the token that ends replies."""

from __future__ import annotations

import datetime
import functools
import re
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmoo.config.data_section import DataConfig
from jaxmoo.data.example import Example
from jaxmoo.data.tokenization.tokenize import tokenize
from jaxmoo.errors import ConfigError, DataError
from jaxmoo.files.bundled import find_config
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "NO_ENDING",
    "at_date",
    "chat_tokenizer",
    "ending_token",
    "read_template",
    "reads_clock",
]

# What to say where there is none.
NO_ENDING = (
    "Note: no special token is known to end a reply, so what is generated ends only where the "
    "model's own generation_config.json says, or at the limit."
)

_ASKED = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
# Some templates want a system message.
_PROBES = (_ASKED, [{"role": "system", "content": "."}, *_ASKED])
_CLOCK = "strftime_now"
# The clock is asked for a format that stands there, or whether there is one.
_WRITTEN = re.compile(rf"{_CLOCK}\s*(?:\(\s*(['\"])([^'\"\\]*)\1\s*\)|is\s+defined\b)")
_SIGN = "\ue000"


def chat_tokenizer(source: Path, data: DataConfig) -> tuple[PreTrainedTokenizerFast, str | None]:
    """Load a model's tokenizer with the chat template that the settings ask for.

    Args:
      source: the model's directory.
      data: the settings.

    Returns:
      The tokenizer, and the date that its template sees: that of the settings, by default today;
      None where the template reads no clock.

    Raises:
      ConfigError, CheckpointError: template or tokenizer cannot be read.
    """
    template = read_template(data.chat_template)
    tokenizer = load_tokenizer(source)
    if template is not None:
        tokenizer.chat_template = template
    date = datetime.date.fromisoformat(data.date) if data.date else datetime.date.today()
    found = tokenizer.chat_template
    named = found if isinstance(found, dict) else {"default": found or ""}
    if not any(map(reads_clock, named.values())):
        return tokenizer, None
    fixed = {name: at_date(text, date) for name, text in named.items()}
    tokenizer.chat_template = fixed if isinstance(found, dict) else fixed["default"]
    return tokenizer, date.isoformat()


def read_template(path: str | None) -> str | None:
    """Read a chat template from a file.

    Args:
      path: the file, or None.

    Returns:
      The template; None without a file.

    Raises:
      ConfigError: there is no such file, or it is not a template.
    """
    if path is None:
        return None
    try:
        text = find_config(typed_path(path)).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.chat_template: cannot read {path} ({error}). Expected a text file with a Jinja "
            "template, such as a model's chat_template.jinja."
        ) from None
    if "messages" not in text:
        raise ConfigError(
            f"data.chat_template: {path} is no chat template: it never mentions messages."
        )
    return text


def reads_clock(template: str) -> bool:
    """Whether what a chat template writes depends on the time at which it is used.

    Example:
      >>> reads_clock("Today is {{ strftime_now('%d %b %Y') }}.")
      True
    """
    return _CLOCK in template


def at_date(template: str, date: datetime.date) -> str:
    """Return a chat template that does the same as another on one date, at midnight, for ever.

    Args:
      template: a template that reads the clock as templates do in transformers, by
        ``strftime_now(format)``; any other comes back unchanged.
      date: the date.

    Example:
      >>> import jinja2
      >>> fixed = at_date("{{ strftime_now('%d %b %Y') }}", datetime.date(2026, 7, 26))
      >>> jinja2.Template(fixed).render()
      '26 Jul 2026'
    """
    if not reads_clock(template):
        return template
    midnight = datetime.datetime.combine(date, datetime.time())
    directives = [f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters]
    known = {one: midnight.strftime(one) for one in directives}
    steps = {"%%": _SIGN, **{one: text for one, text in known.items() if text != one}, _SIGN: "%"}
    # A format that the template spells out, as nearly all do, is looked up: it is written for every
    # rendering of every example.
    formats = {found[2] for found in _WRITTEN.finditer(template) if found[1]}
    texts = {
        form: functools.reduce(lambda text, step: text.replace(*step), steps.items(), form)
        for form in sorted(formats)
    }
    value = f"{texts!r}[format]"
    if _CLOCK in _WRITTEN.sub("", template):
        replaced = "".join(f"|replace({a!r}, {b!r})" for a, b in steps.items())
        value = f"{value} if format in {texts!r} else format{replaced}"
    # Before the first line, so that lines keep their numbers; on a line of its own where the
    # template begins with white space, which Jinja treats by what stands before it.
    space = "\n" if template[:1].isspace() else ""
    macro = f"{{% macro {_CLOCK}(format) %}}{{{{ {value} }}}}{{% endmacro %}}"
    return f"{macro}{space}{template}"


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
        eos: Any = tokenizer.eos_token_id
        return eos
    for messages in _PROBES:
        try:
            result = tokenize(Example.from_messages("", messages), tokenizer, 10**9)
        except DataError:
            continue
        return int(result.tokens[-1]) if result.ended else None
    return None
