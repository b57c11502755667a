"""Packing: nothing lost, nothing twice, no row over its length, and rows worth having."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoo.data.batches import LanguageBatches, count_tokens
from jaxmoo.data.packing import Rows, plan_rows
from jaxmoo.data.tokenization.tokenize import Tokenized
from jaxmoo.errors import DataError

CAPACITY = 16
lengths = st.lists(st.integers(2, CAPACITY), min_size=1, max_size=60)


@settings(deadline=None)
@given(lengths)
def test_a_plan_has_every_place_once_and_fills_no_row_too_far(lengths):
    rows = plan_rows(lengths, CAPACITY)
    ordered = sorted(lengths, reverse=True)
    assert Counter(place for row in rows for place in row) == Counter(range(len(lengths)))
    filled = sorted(sum(ordered[place] for place in row) for row in rows)
    assert filled[-1] <= CAPACITY
    # No two rows could have been one.
    assert len(filled) < 2 or filled[0] + filled[1] > CAPACITY


@settings(deadline=None)
@given(lengths, st.integers(0, 2**31 - 1))
def test_every_epoch_has_every_example_once_in_rows_that_hold_them(lengths, seed):
    rows = Rows(lengths, CAPACITY, packing=True, seed=seed)
    for epoch in (3, 0):
        shown = [rows.examples(row, epoch) for row in range(len(rows))]
        assert Counter(n for row in shown for n in row) == Counter(range(len(lengths)))
        assert all(sum(lengths[n] for n in row) <= CAPACITY for row in shown)


def test_epochs_put_other_examples_together():
    rows = Rows([5] * 30 + [6] * 30, CAPACITY, packing=True, seed=0)
    together = [
        {frozenset(rows.examples(row, epoch)) for row in range(len(rows))} for epoch in (0, 1)
    ]
    assert len(together[0] & together[1]) < len(rows) / 2


def test_chat_lengths_are_packed_almost_without_loss():
    lengths = np.random.default_rng(0).lognormal(4, 0.8, 5000).astype(int).clip(4, 1024)
    assert lengths.sum() / (1024 * len(plan_rows(lengths, 1024))) > 0.99


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(DataError, match="17 tokens does not fit a row of 16"):
        plan_rows([3, 17], 16)


def corpus(lengths, number):
    """Examples told apart by their tokens, the later half of each learnt, and its first."""
    return [
        Tokenized(
            np.arange(n, dtype=np.int32) + 100 * i + 10_000 * number,
            (np.arange(n) >= n // 2) | (np.arange(n) == 0),
            n,
            n,
        )
        for i, n in enumerate(lengths)
    ]


def segments(batch):
    """(language, row, tokens, mask) of every packed example of a batch, padding checked."""
    for k, b in np.ndindex(batch["tokens"].shape[:2]):
        row = {name: x[k, b] for name, x in batch.items()}
        ids = row["segment_ids"]
        end = int((ids > 0).sum())
        assert not ids[end:].any() and not row["loss_mask"][end:].any()
        assert (row["tokens"][end:] == 7).all() and not row["positions"][end:].any()
        assert set(np.diff(ids[:end])) <= {0, 1} and ids[0] == 1
        for segment in range(1, ids[end - 1] + 1):
            here = ids == segment
            assert row["positions"][here].tolist() == list(range(here.sum()))
            assert not row["loss_mask"][here][0]
            yield k, b, row["tokens"][here], row["loss_mask"][here]


@settings(max_examples=25, deadline=None)
@given(lengths, lengths, st.integers(1, 4), st.integers(0, 1000))
def test_batches_show_every_token_of_an_epoch_once(first, second, batch_size, seed):
    data = {"en": corpus(first, 0), "fa": corpus(second, 1)}
    batches = LanguageBatches(
        data, ["en", "fa"], batch_size, CAPACITY, seed, pad_id=7, packing=True
    )
    for k, language in enumerate(batches.languages):
        rows = len(batches.rows[language])
        shown = Counter()
        for index in range(rows, 2 * rows):  # the second epoch
            step, b = divmod(index, batch_size)
            batch = batches.batch(step)
            found = [one for one in segments(batch) if one[:2] == (k, b)]
            for *_, tokens, mask in found:
                number = int(tokens[0] - 10_000 * k) // 100
                example = data[language][number]
                assert tokens.tolist() == example.tokens.tolist()
                assert mask[1:].tolist() == example.loss_mask[1:].tolist()
                shown[number] += 1
        assert shown == Counter(range(len(data[language])))
        assert batches.epochs(3 * rows)[language] == 3 * batch_size


def test_tokens_are_counted_without_padding():
    data = {"en": corpus([5, 9, 3, 3], 0)}
    for packing in (False, True):
        batches = LanguageBatches(data, ["en"], 4, CAPACITY, 0, packing=packing)
        steps = 4 if not packing else 2 * len(batches.rows["en"])
        total = sum(int(count_tokens(batches.batch(step))[0]) for step in range(steps))
        assert total == 20 * batches.epochs(steps)["en"]
