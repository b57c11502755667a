"""Batches: a pure function of seed and step, every example once per epoch."""

from __future__ import annotations

import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from devices import run_python
from jaxmoo.data.batches import LanguageBatches, count_tokens
from jaxmoo.data.tokenization.tokenize import Tokenized
from jaxmoo.errors import ConfigError, DataError

LENGTH = 8


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def examples(n, first=10):
    """n examples of different lengths, told apart by their first token."""
    rng = np.random.default_rng(n)
    result = []
    for i in range(n):
        length = int(rng.integers(3, LENGTH + 1))
        tokens = np.full(length, first + i, np.int32)
        result.append(Tokenized(tokens, np.arange(length) >= 2, length, length))
    return result


def numbers(batches, steps, language=0):
    """Which examples the steps show of one language."""
    shown = [batches.batch(step)["tokens"][language, :, 0].tolist() for step in steps]
    return [number for batch in shown for number in batch]


@pytest.fixture
def data():
    return {"en": examples(40), "fa": examples(7), "zh": examples(40)}


def make(data, languages=("en", "fa", "zh"), batch_size=4, seed=0):
    return LanguageBatches(data, languages, batch_size, LENGTH, seed, pad_id=1)


def test_a_batch_holds_each_example_padded_on_the_right(data):
    batch = make(data).batch(3)
    assert batch["tokens"].shape == batch["loss_mask"].shape == (3, 4, LENGTH)
    assert batch["tokens"].dtype == np.int32 and batch["loss_mask"].dtype == bool
    for k, language in enumerate(("en", "fa", "zh")):
        for tokens, mask in zip(batch["tokens"][k], batch["loss_mask"][k], strict=True):
            example = data[language][tokens[0] - 10]
            n = len(example.tokens)
            assert tokens[:n].tolist() == example.tokens.tolist()
            assert mask[:n].tolist() == example.loss_mask.tolist()
            assert (tokens[n:] == 1).all() and not mask[n:].any()


def test_a_batch_does_not_depend_on_earlier_ones(data):
    one = make(data)
    for step in range(20):
        one.batch(step)
    for step in (17, 0, 1000):
        fresh = make(data).batch(step)
        again = one.batch(step)
        assert all((fresh[name] == again[name]).all() for name in fresh)


@pytest.mark.parametrize("language", [0, 1], ids=["large", "smaller than two batches"])
def test_every_epoch_shows_every_example_once_in_a_new_order(data, language):
    batches = make(data)
    size = (40, 7)[language]
    shown = numbers(batches, range(3 * size), language)  # 4 * 3 epochs
    epochs = [shown[start : start + size] for start in range(0, len(shown), size)]
    assert all(Counter(epoch) == Counter(range(10, 10 + size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert epochs[0] != sorted(epochs[0])


def test_seeds_and_languages_have_orders_of_their_own(data):
    steps = range(10)
    batches = make(data)
    assert numbers(batches, steps, 0) != numbers(batches, steps, 2), "en and zh are equally many"
    assert numbers(batches, steps, 0) != numbers(make(data, seed=1), steps, 0)


def test_a_languages_order_does_not_depend_on_the_others(data):
    alone = make(data, languages=("zh",))
    assert numbers(alone, range(10), 0) == numbers(make(data), range(10), 2)


def test_the_batch_size_does_not_change_the_order(data):
    assert numbers(make(data), range(10)) == numbers(make(data, batch_size=8), range(5))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 8])
def test_processes_make_their_rows_only_and_together_the_batch_of_one(data, processes, packing):
    options = {"batch_size": 4, "packing": packing, "per_step": 2}
    whole = LanguageBatches(data, list(data), sequence_length=LENGTH, seed=0, **options)
    for step in (0, 7, 30):
        expected = whole.batch(step)
        joined = {name: np.zeros_like(x) for name, x in expected.items()}
        for process in range(processes):
            only = (np.arange(8) % processes == process).reshape(2, 4)
            own = LanguageBatches(data, list(data), sequence_length=LENGTH, seed=0, **options)
            batch = own.batch(step, only)
            assert not batch["loss_mask"][~only].any()
            assert (own.tokens(step, only) == count_tokens(expected)).all()
            for name, x in batch.items():
                joined[name][only] = x[only]
            again = own.batch(step)
            assert all((again[name] == expected[name]).all() for name in expected)
        assert all((joined[name] == expected[name]).all() for name in expected)


def test_epochs_counts_what_was_shown(data):
    assert make(data).epochs(0) == {"en": 0, "fa": 0, "zh": 0}
    assert make(data).epochs(7) == {"en": 0.7, "fa": 4, "zh": 0.7}


MADE = """
import numpy as np
from jaxmoo.data import Example, LanguageBatches, Tokenized, split_examples
examples = [Example.from_pair("fa", f"q{i % 40}", f"r{i % 70}") for i in range(120)]
held_out = [e.reply for e in split_examples(examples, 0.3, disjoint_replies=True)[1]]
e = [Tokenized(np.full(n := 2 + i % 7, i, np.int32), np.ones(n, bool), n, n) for i in range(50)]
seen = ["en", "fa", "zh"]
shares = {"en": 3, "fa": 2, "zh": 1}
batches = LanguageBatches(
    dict.fromkeys(seen, e), seen, 8, 16, 5, packing=True, per_step=2, shares=shares
)
"""
SPLIT = """
import sys
import jax
from jax.experimental import multihost_utils
address, number, out = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(number))
from jaxmoo.mesh import batch_sharding, make_mesh
from jaxmoo.runtime.processes import place
sharding = batch_sharding(make_mesh(2, language=2, fsdp=2, data=2))
found = {"held_out": held_out}
for step in (0, 40):
    batch = place(batches.batch(step), sharding)
    for name, x in batch.items():
        for shard in x.addressable_shards:
            assert (np.asarray(shard.data) == batches.batch(step)[name][shard.index]).all()
        found[f"{step}/{name}"] = multihost_utils.process_allgather(x, tiled=True)
np.savez(out, **found)
"""


@pytest.mark.slow
def test_two_processes_hold_the_stream_of_one_and_split_alike(tmp_path):
    address = f"localhost:{free_port()}"

    def run(number):
        out = tmp_path / f"{number}.npz"
        arguments = ["-c", MADE + SPLIT, address, number, out]
        run_python(arguments, devices=4, PYTHONHASHSEED=str(number))
        return out

    with ThreadPoolExecutor(2) as pool:
        both = [np.load(out) for out in pool.map(run, range(2))]
    alone = {}
    exec(MADE, alone)
    assert all(found["held_out"].tolist() == alone["held_out"] for found in both)
    for step in (0, 40):
        for name, x in alone["batches"].batch(step).items():
            assert all((found[f"{step}/{name}"] == x).all() for found in both), (step, name)


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"languages": ("en", "fs")}, ConfigError, "language 'fs'.* there are en, fa, zh"),
        ({"batch_size": 0}, ConfigError, "batch_size is a positive number, found 0"),
    ],
)
def test_bad_settings_are_refused(change, error, complaint, data):
    with pytest.raises(error, match=complaint):
        make(data, **change)


@pytest.mark.parametrize(
    ("examples", "complaint"),
    [
        ([], "Language 'en' has no training examples"),
        (
            [Tokenized(np.zeros(9, np.int32), np.ones(9, bool), 9, 9)],
            "of 9 tokens, longer than the sequence length 8",
        ),
        # a target at position 0 has nothing to be predicted from
        (
            [Tokenized(np.zeros(2, np.int32), np.array([True, False]), 2, 2)],
            "without target tokens",
        ),
    ],
)
def test_unusable_examples_are_refused(examples, complaint):
    with pytest.raises(DataError, match=complaint):
        make({"en": examples}, languages=("en",))


def test_steps_count_from_zero(data):
    with pytest.raises(ValueError, match="counts from 0"):
        make(data).batch(-1)
