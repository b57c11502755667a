"""A run's tokenizer: templates that read the clock see one date, and a token ends replies."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from jaxmoo.data.tokenization.tokenizer import at_date, ending_token, reads_clock
from tiny_tokenizer import bytes_tokenizer

DAY = datetime.date(2020, 2, 3)
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
# As in templates of Llama 3.1, Mistral, gpt-oss and SmolLM3.
USES = [
    "{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{{ date_string }}",
    '{% set today = strftime_now("%Y-%m-%d") %}{{ today }}/{{ today[:4] | int - 1 }}',
    "{% macro head() %}{{ strftime_now('%-d %B, 100%% of day %j') }}{% endmacro %}{{ head() }}",
    "{% for m in messages %}{{ strftime_now(format='%A %H:%M') + m['role'] }}{% endfor %}",
]


# The first of them strips the white space before it, whatever it is.
@pytest.mark.parametrize(
    ("first", "start"),
    [
        *((0, start) for start in ("", "\n\n  ", "x\n")),
        *((1, start) for start in ("", "\n", "\n\n  ", "  ", "{# a note #}\n  ", "x\n")),
    ],
)
def test_a_template_writes_on_any_day_what_it_writes_on_that_one(
    first, start, make_tokenizer, monkeypatch
):
    from transformers.utils import chat_template_utils

    # What the white space at the start becomes depends on what follows it.
    uses = USES[first:] + USES[:first]
    template = start + "|".join(uses) + "{% for m in messages %}\n  {{ m['content'] }}{% endfor %}"
    assert reads_clock(template) and all(map(reads_clock, uses))

    class ThatDay(datetime.datetime):
        @classmethod
        def now(cls):
            return datetime.datetime.combine(DAY, datetime.time())

    fixed = make_tokenizer(at_date(template, DAY)).apply_chat_template(CHAT, tokenize=False)
    tokenizer = make_tokenizer(template)
    assert fixed != tokenizer.apply_chat_template(CHAT, tokenize=False), "today is another day"
    monkeypatch.setattr(chat_template_utils, "datetime", ThatDay)
    assert fixed == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_other_templates_stay_as_they_are():
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert at_date(template, DAY) is template and not reads_clock(template)


SHIPPED = Path(__file__).parents[3] / "configs" / "chat_templates"
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
CHATML = (SHIPPED / "chatml.jinja").read_text()
STRICT = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system?') }}{% endif %}"


def ending(template, special):
    """The ending of a base model's tokenizer, whose texts end with <|end_of_text|>."""
    tokenizer = bytes_tokenizer(
        special, bos_token=special[0], eos_token="<|end_of_text|>", chat_template=template
    )
    number = ending_token(tokenizer)
    return None if number is None else tokenizer.convert_ids_to_tokens(number)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ((SHIPPED / "llama-3.jinja").read_text(), "<|eot_id|>"),
        (CHATML, "<|im_end|>"),
        (STRICT + CHATML, "<|im_end|>"),
        ("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}", "<|end_of_text|>"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", None),
        ("{{ raise_exception('never') }}", None),
        # A tag that opens the next turn ends none.
        ("{% for m in messages %}<|im_start|>{{ m['content'] }}\n{% endfor %}", None),
        (None, "<|end_of_text|>"),
    ],
    ids=["llama", "chatml", "strict", "eos", "new line", "broken", "opened", "texts"],
)
def test_a_reply_ends_with_the_special_token_behind_it(template, expected):
    assert ending(template, [*LLAMA, "<|eot_id|>", "<|im_start|>", "<|im_end|>"]) == expected
