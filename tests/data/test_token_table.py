"""Tables of tokenised examples: each comes out as it went in, from memory and from a file."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxmoo.data.token_table import TokenTable
from jaxmoo.data.tokenization.tokenize import Tokenized
from jaxmoo.files.arrays import map_arrays, write_arrays


def example(number, largest=300):
    """An example that differs from others in everything."""
    rng = np.random.default_rng(number)
    size = int(rng.integers(0 if number % 7 == 0 else 1, 9))
    mask = rng.random(size) < 0.6
    return Tokenized(
        rng.integers(0, largest, size).astype(np.int32),
        mask,
        int(rng.integers(0, 50)),
        size + int(rng.integers(0, 3)),
        own=mask & (rng.random(size) < 0.5) if number % 3 else None,
        ended=number % 2 == 0,
        uneven=number % 5 == 0,
        spelled=("<|x|>",) * (number % 4 // 2),
        ignored=("id", "name")[: number % 3],
    )


def fields(one):
    """All of an example, to be compared."""
    return [
        (value.dtype, value.tolist()) if isinstance(value, np.ndarray) else (type(value), value)
        for value in (getattr(one, field.name) for field in dataclasses.fields(one))
    ]


def same(table, examples):
    return [fields(one) for one in table] == [fields(one) for one in examples]


@pytest.fixture(params=[300, 2**20], ids=["small vocabulary", "large vocabulary"])
def examples(request):
    return [example(number, request.param) for number in range(60)]


def test_every_example_comes_out_as_it_went_in(examples, tmp_path):
    table = TokenTable.of(examples)
    assert same(table, examples) and TokenTable.of(table) is table
    assert fields(table[-1]) == fields(examples[-1])
    assert same(table[3:50:7], examples[3:50:7])
    with pytest.raises(IndexError, match="60 examples, not one of number 60"):
        table[60]
    write_arrays(tmp_path / "table", table.arrays)
    assert same(TokenTable(map_arrays(tmp_path / "table")[0], table.words), examples)


def test_tables_are_joined_and_chosen_from_as_lists_are(examples):
    parts = [examples[:20], [], examples[20:21], examples[21:]]
    joined = TokenTable.joined([TokenTable.of(part) for part in parts])
    assert same(joined, examples)
    which = np.arange(len(examples)) % 3 == 1
    assert same(joined.chosen(which), [one for one, ok in zip(examples, which, strict=True) if ok])
    numbers = [3, 3, 0, 7, 59, 3]
    repeated = joined.repeated(numbers)
    assert same(repeated, [examples[number] for number in numbers])
    assert repeated.arrays["tokens"] is joined.arrays["tokens"]
    assert same(TokenTable.joined([repeated, joined])[2:9:6], [examples[0], examples[2]])
    assert same(TokenTable.joined([]), []) and same(joined.chosen(which & False), [])


def test_facts_are_those_of_the_examples(examples):
    for table in (TokenTable.of(examples), TokenTable.of(examples).without_tokens()):
        assert table.sizes.tolist() == [len(one.tokens) for one in examples]
        assert table.lengths.tolist() == [one.length for one in examples]
        assert table.learnt.tolist() == [one.loss_mask.sum() for one in examples]
        assert table.targets.tolist() == [one.loss_mask[1:].sum() for one in examples]
        assert table.truncated.tolist() == [one.truncated for one in examples]
        assert table.ended.tolist() == [one.ended for one in examples]
        assert table.uneven.tolist() == [one.uneven for one in examples]
        assert table.spelled() == {"<|x|>": sum(len(one.spelled) for one in examples)}
        counted = {key: sum(key in one.ignored for one in examples) for key in ("id", "name")}
        assert table.ignored() == counted
