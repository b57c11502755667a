"""Chat templates run as what they are: programs from elsewhere, within limits.

A template is rendered as ``transformers`` does it (`apply_chat_template`), in a sandbox, but counts
what it does: passes through loops, and the characters it makes. These are numbers, not seconds, so
that every process and machine refuses the same conversations.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from jaxmoo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_PASSES = 1_000_000  # through loops and macros, of one rendering
MOST_CHARACTERS = 20_000_000  # of a rendering and of any text on the way
_MOST_MADE = 50 * MOST_CHARACTERS  # of all texts on the way together
_MOST_NUMBER = 1_000_000  # given to a filter or method, as a width or count
_MOST_BITS = 100_000  # of a whole number
_MOST_PARTS = 1_000_000  # of a list or mapping that becomes text

_WIDTHS = re.compile(r"[0-9]{5}|\*")
_GROWING = {"replace", "indent", "expandtabs", "tojson"}
# Filters that take lists and mappings without making text of them.
_NO_TEXT = {
    *("attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last"),
    *("length", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse"),
    *("select", "selectattr", "slice", "sort", "sum", "unique"),
}


class Rendered(NamedTuple):
    """What a template makes of a conversation.

    Attributes:
      text: the text.
      marked: where what it marks as generated (``{% generation %}``) begins and ends, in
        characters.
    """

    text: str
    marked: list[tuple[int, int]]


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
      tokenizer: the tokenizer; its special tokens are known to the template by their names.

    Raises:
      DataError: it has no template, several of which none is the default, or one that is broken.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._variables = dict(tokenizer.special_tokens_map)
        self._sources = _sources(getattr(tokenizer, "chat_template", None))
        _compiled(self._sources[0])

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """Render a conversation.

        Args:
          messages: the messages.
          tools: descriptions of tools.
          add_generation_prompt: whether to end with what the assistant's reply follows.

        Raises:
          DataError: the template fails, or does more than the limits of this module allow.
        """
        plain, for_tools = self._sources
        template = _compiled(for_tools if tools else plain)
        run = _Run()
        token = _RUN.set(run)
        try:
            for part in template.generate(
                messages=list(messages),
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            ):
                run.write(part)
        # Whatever a program may raise, recursion and want of memory included.
        except Exception as error:
            raise DataError(_failed(error, messages)) from None
        finally:
            _RUN.reset(token)
        return Rendered("".join(run.parts), run.marked)


def _sources(template: Any) -> tuple[str, str]:
    """The template of a tokenizer, and the one for conversations with tools."""
    if isinstance(template, Mapping) and template:
        if "default" not in template:
            raise DataError(
                f"The tokenizer has several chat templates ({', '.join(map(str, template))}), none "
                "of which is called default. Write the one you mean to a file, and give that "
                "(data.chat_template)."
            )
        return template["default"], template.get("tool_use", template["default"])
    if not isinstance(template, str) or not template:
        raise DataError(
            "The tokenizer has no chat template. Use an instruction-tuned model's tokenizer, or "
            "give a template (data.chat_template, tokenizer.chat_template)."
        )
    return template, template


def _failed(error: Exception, messages: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == "<template>"
    ]
    what = str(error) if isinstance(error, jinja2.TemplateError) else _named(error)
    shown = [(message["role"], str(message["content"])[:40]) for message in messages[:4]]
    return (
        f"the chat template cannot render {str(shown)[:-1]}"
        f"{', ...]' if len(messages) > 4 else ']'}: {what[:200]}"
        f"{f' (line {lines[-1]} of the template)' if lines else ''}. Change the data, or give "
        "another template (data.chat_template)."
    )


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


# Counting


class _Run:
    """What one rendering has done so far."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.marked: list[tuple[int, int]] = []
        self.written = self.passes = self.made = 0

    def write(self, part: str) -> None:
        self.parts.append(part)
        self.written += len(part)
        _check_size(self.written)

    def count_pass(self) -> str:
        self.passes += 1
        if self.passes > MOST_PASSES:
            raise jinja2.TemplateRuntimeError(f"more than {MOST_PASSES:,} passes through its loops")
        return ""

    def make(self, size: int) -> None:
        self.made += size
        if self.made > _MOST_MADE:
            raise jinja2.TemplateRuntimeError(f"more than {_MOST_MADE:,} characters made")


_RUN: ContextVar[_Run] = ContextVar("rendering")


def _run() -> _Run:
    # What is constant in a template is computed when it is compiled, in no rendering.
    return _RUN.get(None) or _Run()


def _check_size(size: int) -> None:
    if size > MOST_CHARACTERS:
        raise jinja2.TemplateRuntimeError(f"more than {MOST_CHARACTERS:,} characters")


def _measured(result: Any) -> Any:
    if isinstance(result, str | list | tuple | dict):
        _check_size(len(result))
        _run().make(len(result))
    return result


def _joined(parts: Iterable[str], between: str = "") -> str:
    found, size = [], 0
    for part in parts:
        found.append(part)
        size += len(part) + len(between)
        _check_size(size)
    return _measured(between.join(found))


def _text(value: Any) -> str:
    """A value as text, if that is not far longer than it looks."""
    if not isinstance(value, str):
        _check_parts(value)
    return str(value)


def _check_parts(value: Any) -> Any:
    """Raise where lists in lists, each there often, would make an endless text."""
    size = parts = 0
    rest = [value]
    while rest:
        part = rest.pop()
        parts += 1
        if isinstance(part, str):
            size += len(part)
        elif isinstance(part, Mapping):
            rest += [*part, *part.values()]
        elif isinstance(part, list | tuple):
            rest += part
        if parts + len(rest) > _MOST_PARTS:
            raise jinja2.TemplateRuntimeError(f"a list of more than {_MOST_PARTS:,} parts as text")
        _check_size(size)
    return value


def _check_call(name: str, arguments: Sequence[Any], *, as_text: bool = True) -> None:
    """Raise where a call could make far more than it is given."""
    sizes = []
    for argument in arguments:
        if isinstance(argument, int):
            sizes.append(abs(argument))
            if abs(argument) > _MOST_NUMBER:
                raise jinja2.TemplateRuntimeError(f"{name} with a number above {_MOST_NUMBER:,}")
        elif isinstance(argument, str | list | tuple):
            sizes.append(len(argument))
            _run().make(len(argument))
        if as_text and isinstance(argument, list | tuple | Mapping):
            _check_parts(argument)
    if name in _GROWING and len(sizes) > 1:
        one, other = sorted(sizes)[-2:]
        _check_size(one * other // 100)
    if name in ("format", "format_map"):
        for argument in arguments[:2]:
            if isinstance(argument, str) and _WIDTHS.search(argument):
                raise jinja2.TemplateRuntimeError(f"{name} with a width above 9,999")


def _counted_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        _check_call(name, [*arguments, *named.values()], as_text=name not in _NO_TEXT)
        return _measured(function(*arguments, **named))

    return run


# The sandbox


class _Counting(NodeTransformer):
    """Lets loops and macros count their passes, and texts that are joined their sizes."""

    def _count(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        count = nodes.Call(nodes.EnvironmentAttribute("count_pass"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(count).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _count

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        joined = nodes.EnvironmentAttribute("join_texts")
        return nodes.Call(joined, node.nodes, [], None, None).set_lineno(node.lineno)


class _Generation(Extension):
    """The tag ``{% generation %}``, which marks what the assistant generates."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        run = _run()
        run.marked.append((run.written, run.written + len(text)))
        return text


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_joined)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_check_parts,
        )
        self.filters |= {"tojson": _to_json, "join": _join}
        self.filters = {name: _counted_filter(name, f) for name, f in self.filters.items()}
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": _now,
            "dict": _Dictionary(),
            "namespace": _Namespace,
        }
        del self.globals["lipsum"]

    def count_pass(self) -> str:
        return _run().count_pass()

    def join_texts(self, *parts: Any) -> str:
        return _joined(map(_text, parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "*" and not whole:
            for one, times in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(times, int):
                    _check_size(len(one) * max(times, 0))
        elif operator == "**" and whole:
            _check_bits(left.bit_length() * max(right, 0))
        elif operator == "*":
            _check_bits(left.bit_length() + right.bit_length())
        elif operator == "%" and isinstance(left, str):
            _check_call("format", [left, _check_parts(right)])
        return _measured(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_call("format", [value.__self__])
        return wrapped

    def call(self, context: Any, function: Any, /, *arguments: Any, **named: Any) -> Any:
        if function == self.count_pass:
            return self.count_pass()
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str):
            _check_call(name, [owner, *arguments, *named.values()])
            if name == "join":
                return _joined(*arguments, between=owner)
        elif function != self.join_texts:
            # Functions of the template count what they make by themselves.
            _check_call(name or "a macro", [*arguments, *named.values()], as_text=False)
        return _measured(super().call(context, function, *arguments, **named))


def _check_bits(bits: int) -> None:
    if bits > _MOST_BITS:
        raise jinja2.TemplateRuntimeError("a number of more than 30,000 digits")


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = _Environment()
    try:
        return environment.from_string(_Counting().visit(environment.parse(source)))
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"The chat template is broken, line {error.lineno}: {error}") from None
    except Exception as error:
        raise DataError(f"The chat template is broken: {_named(error)[:200]}") from None


# What templates find beside Jinja's own filters and functions.


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment, value: Any, d: str = "", attribute: str | int | None = None
) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return _joined(map(_text, value), _text(d))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes what would be HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


class _Dictionary:
    """``dict``, without what an attribute of a class leads to."""

    def __call__(self, /, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _Namespace(Namespace):
    """``namespace``, whose attributes are no internals."""

    def __init__(*arguments: Any, **named: Any) -> None:  # as Jinja's own, which takes any name
        self, *given = arguments
        attributes = dict(*given, **named)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"no attribute {name!r} in a namespace")
