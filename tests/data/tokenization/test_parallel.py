"""Tokenising in several processes gives what one gives, complaints and errors included."""

from __future__ import annotations

import pytest

from data.test_token_table import fields
from jaxmoo.data.example import Example
from jaxmoo.data.sources.records import Malformed
from jaxmoo.data.tokenization import parallel
from jaxmoo.data.tokenization.parallel import Tokenizing
from jaxmoo.data.tokenization.tokenize import tokenize_good
from jaxmoo.errors import DataError

PICKY = "{% if 'bad' in messages[0]['content'] %}{{ raise_exception('bad') }}{% endif %}"


@pytest.fixture
def examples():
    return [
        Example.from_text("en", f"a text {i}")
        if i % 5 == 0
        else Example.from_pair("en", f"{'bad' if i in (3, 44) else 'good'} {i}", f"reply {i % 9}")
        for i in range(60)
    ]


def test_several_processes_make_what_one_makes(examples, make_tokenizer, monkeypatch):
    monkeypatch.setattr(parallel, "_PART", 7)
    monkeypatch.setattr(parallel, "_WORTH", 1)
    plain = make_tokenizer()
    tokenizer = make_tokenizer(PICKY + plain.chat_template)
    expected, noted = Malformed("these", 0.1), Malformed("these", 0.1)
    good, tokens = tokenize_good(examples, tokenizer, 24, expected)
    advanced = []
    with Tokenizing(tokenizer, 24, "text", expected=60, cores=2) as tokenizing:
        assert len(tokenizing._helpers) == 2
        kept, table = tokenizing.tokenize(examples, noted, advanced.append)
        assert kept == good and [fields(one) for one in table] == [fields(one) for one in tokens]
        assert noted.complaints == expected.complaints and len(noted.complaints) == 2
        assert sum(advanced) == 60 and len(advanced) == 9
        with pytest.raises(DataError, match=r"cannot render .*bad 3"):
            tokenizing.tokenize(examples, Malformed("these", 0.0))
        for helper in tokenizing._helpers:
            helper._process.kill()
        with pytest.raises(DataError, match="Memory may have run out"):
            tokenizing.tokenize(examples, Malformed("these", 0.1))


def test_few_examples_are_not_worth_another_process(examples, tokenizer):
    with Tokenizing(tokenizer, 24, "text", expected=60, cores=8) as tokenizing:
        assert not tokenizing._helpers
