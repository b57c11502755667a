"""The token that ends a reply."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxmoo.data.tokenizer import ending_token
from tiny_tokenizer import bytes_tokenizer

SHIPPED = Path(__file__).parents[2] / "configs" / "chat_templates"
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
