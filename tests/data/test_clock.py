"""Chat templates that read the clock see one date."""

from __future__ import annotations

import datetime

import pytest

from jaxmoo.data.tokenizer import at_date, reads_clock

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


@pytest.mark.parametrize("start", ["", "\n", "\n\n  ", "  ", "{# a note #}\n  ", "x\n"])
@pytest.mark.parametrize("use", USES)
def test_a_template_writes_on_any_day_what_it_writes_on_that_one(
    use, start, make_tokenizer, monkeypatch
):
    from transformers.utils import chat_template_utils

    template = start + use + "{% for m in messages %}\n  {{ m['content'] }}{% endfor %}"
    assert reads_clock(template)

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
