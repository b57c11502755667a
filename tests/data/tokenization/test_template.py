"""Chat templates are programs from elsewhere: rendered as transformers does, within limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxmoo.data.example import Example
from jaxmoo.data.tokenization.template import MOST_CHARACTERS, ChatTemplate
from jaxmoo.data.tokenization.tokenize import tokenize
from jaxmoo.errors import DataError
from tiny_tokenizer import chat_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHIPPED = Path(__file__).parents[3] / "configs" / "chat_templates"
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
MESSAGES = [
    {"role": "system", "content": "Sii breve.\n"},
    {"role": "user", "content": "  Che tempo fa? 😀"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "Hm."},
    {"role": "tool", "content": "12", "name": "weather"},
    {"role": "assistant", "content": "12 gradi.\n\n"},
]
TOOLS = [{"name": "weather", "description": 'The "weather" of a città.'}]
# What templates of published models use, in one.
EVERYTHING = """\
{%- macro shown(function, indent=none) %}[{{ function.name }} {{ function.arguments | tojson }}]
{%- endmacro %}
{{- bos_token }}
{%- if tools %}
    {{- "Tools: " ~ (tools | map(attribute='name') | join(", ")) + "\n" }}
    {%- for tool in tools %}{{ tool | tojson(indent=2) }}{% endfor %}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1, seen=[]) %}
{%- for m in messages[::-1] %}
    {%- if m.role == "user" %}{% set ns.last = messages | length - 1 - loop.index0 %}{% break %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set ns.seen = ns.seen + [m.role] %}
    {{- "<" ~ m['role'] ~ (" " ~ m.name if m.name is defined else "") ~ ">" }}
    {%- if m.reasoning_content is string and loop.index0 > ns.last %}
        {{- '<think>' + m.reasoning_content.strip('\n') + '</think>' }}
    {%- endif %}
    {%- if m.role == "assistant" %}{% generation %}{{ m.content | trim }}{% endgeneration %}
    {%- else %}{{- m.content.split('\n')[0].replace("a", "aa") | upper }}{% endif %}
    {%- for call in m.tool_calls or [] %}{{ shown(function=call.function) }}{% endfor %}
    {{- "%s of %d" % (loop.index, messages | length) }}{{ '{:>4}'.format(2 * 3 - 1) }}
    {%- if loop.last %}{{ ns.seen | unique | list }} {{ dict(a=1).items() | list }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}
"""


@pytest.mark.parametrize("tools", [[], TOOLS], ids=["", "tools"])
@pytest.mark.parametrize(
    "source",
    [CHATML, EVERYTHING, *(file.read_text("utf-8") for file in sorted(SHIPPED.iterdir()))],
    ids=["chatml", "everything", *(file.stem for file in sorted(SHIPPED.iterdir()))],
)
def test_a_conversation_is_rendered_as_transformers_does(source, tools):
    tokenizer = chat_tokenizer(source)
    template = ChatTemplate(tokenizer)
    for count in range(1, len(MESSAGES) + 1):
        for prompt in (False, True):
            options = {"add_generation_prompt": prompt}
            expected = tokenizer.apply_chat_template(
                MESSAGES[:count], tools=tools or None, tokenize=False, **options
            )
            assert template.render(MESSAGES[:count], tools, **options).text == expected


def test_what_a_template_marks_is_known_by_its_characters():
    text, marked = ChatTemplate(chat_tokenizer(EVERYTHING)).render(MESSAGES)
    assert [text[start:end] for start, end in marked] == ["", "12 gradi."]


DOUBLED = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}%s{%% endfor %%}{{ ns.x %s }}"
FOREIGN = {
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    "types": ("{{ 'a' + 1 }}", "TypeError: can only concatenate"),
    "nothing": ("{{ messages[0].text.strip() }}", "has no attribute 'text'"),
    "index": ("{{ 'abc'.index('d') }}", "ValueError: substring not found"),
    "key": ("{{ {}['a'] + 'b' }}", "has no attribute 'a'"),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
    "range": ("{% for i in range(10 ** 9) %}{% endfor %}", "range with a number above 1,000,000"),
    "its own": ("{{ raise_exception('No users here.') }}", "No users here"),
    "loops": ("{% for a in range(9999) %}" * 3 + "{% endfor %}" * 3, "more than 1,000,000 passes"),
    "copies": ("{{ 'a' * 10 ** 9 }}", "more than 20,000,000 characters"),
    "list": ("{{ [1] * 10 ** 9 }}", "more than 20,000,000 characters"),
    "output": ("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "20,000,000 characters"),
    "power": ("{{ 9 ** (9 ** 9) }}", "more than 30,000 digits"),
    "width": ("{{ '%1000000000d' % 1 }}", "a width above 9,999"),
    "format": ("{{ '{:1000000000}'.format(1) }}", "a width above 9,999"),
    "method": ("{{ 'a'.ljust(10 ** 9) }}", "ljust with a number above 1,000,000"),
    "filter": ("{{ 'a' | center(10 ** 9) }}", "center with a number above 1,000,000"),
    "replace": ("{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}", "20,000,000 characters"),
    "join": ("{{ (['a' * 10 ** 6] * 1000) | join }}", "20,000,000 characters"),
    "str.join": ("{{ ''.join(['a' * 10 ** 6] * 1000) }}", "20,000,000 characters"),
    "added": (DOUBLED % ("'a'", "{% set ns.x = ns.x + ns.x %}", ""), "20,000,000 characters"),
    "joined": (DOUBLED % ("'a'", "{% set ns.x = ns.x ~ ns.x %}", ""), "20,000,000 characters"),
    "captured": (
        DOUBLED % ("'a'", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}", ""),
        "20,000,000 characters",
    ),
    "nested": (DOUBLED % ("['a']", "{% set ns.x = [ns.x, ns.x] %}", ""), "1,000,000 parts"),
    "as JSON": (DOUBLED % ("[]", "{% set ns.x = [ns.x, ns.x] %}", "| tojson"), "1,000,000 parts"),
    "class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "format string": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
    "change": ("{{ messages.append(1) }}", "unsafe"),
    "namespace": ("{% set ns = namespace(__class__=1) %}", "no attribute '__class__'"),
    "globals": ("{{ raise_exception.__globals__.json }}", "unsafe"),
}


@pytest.mark.parametrize(("source", "complaint"), FOREIGN.values(), ids=FOREIGN.keys())
def test_whatever_a_template_does_ends_as_an_error_with_its_place(source, complaint):
    tokenizer = chat_tokenizer("{# messages #}\n" + source)
    example = Example.from_messages("en", MESSAGES, place="en.jsonl:7")
    with pytest.raises(DataError, match=complaint) as raised:
        tokenize(example, tokenizer, 512)
    message = str(raised.value)
    assert message.startswith("en.jsonl:7: the chat template cannot render [('system', 'Sii breve")
    assert "(line 2 of the template)" in message or "{{ 'a' * 999 }}" in source
    assert len(message) < 600


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("\n{% for m in messages %}", r"broken, line 2: Unexpected end of template"),
        ("{% for m in messages %}" * 30 + "{% endfor %}" * 30, "broken: .*nested"),
        ("{{ " + "-" * 50_000 + "1 }}", "broken: RecursionError"),
        ("{{ 'a' | nothing }}", "broken, line 1: No filter named 'nothing'"),
        ({"rag": CHATML, "tool_use": CHATML}, r"several chat templates \(rag, tool_use\), none"),
        (None, "no chat template"),
        ("", "no chat template"),
    ],
)
def test_a_template_that_cannot_be_used_at_all_is_refused_at_once(source, complaint):
    with pytest.raises(DataError, match=complaint):
        ChatTemplate(chat_tokenizer(source))


def test_of_several_templates_the_default_is_taken_or_the_one_for_tools():
    named = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools[0].name }}"}
    template = ChatTemplate(chat_tokenizer(named))
    assert template.render(MESSAGES).text == MESSAGES[0]["content"]
    assert template.render(MESSAGES, TOOLS).text == "weather"


def test_a_conversation_as_large_as_a_record_may_be_is_rendered():
    large = [{"role": "user", "content": "a" * (MOST_CHARACTERS // 2)}]
    text = ChatTemplate(chat_tokenizer(CHATML)).render(large).text
    assert len(text) > MOST_CHARACTERS // 2
