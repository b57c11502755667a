"""The held-out split: nothing leaks, and nothing moves an example to the other side."""

from __future__ import annotations

import random

import pytest

from jaxmoo.data.example import Example
from jaxmoo.data.split import deduplicate, hash_fraction, split_examples
from jaxmoo.errors import ConfigError


def pairs(n, replies=None, language="en"):
    """n examples over n // 3 prompts."""
    return [
        Example.from_pair(language, f"question {i % (n // 3)}", f"reply {i % (replies or n)}")
        for i in range(n)
    ]


def replies_of(examples):
    return {example.reply for example in examples}


def test_deduplicating_keeps_the_first_and_the_order():
    examples = [Example.from_pair("en", *pair) for pair in ["ab", "cd", "ab", "ce", "cd"]]
    assert deduplicate(examples) == [examples[0], examples[1], examples[3]]


def test_every_example_is_on_one_side_and_no_prompt_on_both():
    examples = pairs(300)
    train, held_out = split_examples(examples, 0.3)
    assert replies_of(train) | replies_of(held_out) == replies_of(examples)
    assert len(train) + len(held_out) == len(examples)
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}


def test_the_fraction_is_about_the_one_asked_for():
    examples = [Example.from_pair("en", f"question {i}", "reply") for i in range(4000)]
    _, held_out = split_examples(examples, 0.2)
    # 4 standard deviations of a binomial
    assert abs(len(held_out) - 800) < 4 * (4000 * 0.2 * 0.8) ** 0.5


def test_order_does_not_matter():
    examples = pairs(300)
    shuffled = random.Random(0).sample(examples, len(examples))
    train, held_out = split_examples(examples, 0.3)
    again, held_again = split_examples(shuffled, 0.3)
    assert replies_of(train) == replies_of(again)
    assert held_out == held_again, "held-out examples come in the order of their hashes"


def test_examples_added_later_move_none():
    few, many = pairs(300)[:100], pairs(300)
    _, held_few = split_examples(few, 0.3)
    _, held_many = split_examples(many, 0.3)
    assert replies_of(held_few) == replies_of(held_many) & replies_of(few)


def test_a_larger_fraction_holds_out_more_of_the_same():
    smaller, larger = (replies_of(split_examples(pairs(300), f)[1]) for f in (0.1, 0.4))
    assert smaller < larger


def test_all_or_nothing_can_be_held_out():
    examples = pairs(30)
    assert split_examples(examples, 0.0) == (examples, [])
    train, held_out = split_examples(examples, 1.0)
    assert not train and len(held_out) == 30


def test_groups_stay_on_one_side_in_every_language():
    sides = {}
    for language in ("en", "fa", "zh"):
        examples = [
            Example.from_pair(language, f"{language} {i} {j}", f"r{i}", group=f"text {i}")
            for i in range(100)
            for j in range(2)
        ]
        train, held_out = split_examples(examples, 0.3)
        groups = {e.group for e in train}, {e.group for e in held_out}
        assert not groups[0] & groups[1]
        sides[language] = groups
    assert sides["en"] == sides["fa"] == sides["zh"]


def test_a_prompt_that_occurs_in_two_groups_joins_them():
    chain = [
        Example.from_pair("en", f"prompt {(i + 1) // 2}", f"r{i}", group=str(i // 2))
        for i in range(40)
    ]
    train, held_out = split_examples(chain, 0.5)
    assert not train or not held_out


def test_disjoint_replies_keeps_paraphrases_of_a_question_together():
    examples = [
        Example.from_pair("en", f"paraphrase {i} of {j}", f"answer {j}")
        for j in range(50)
        for i in range(6)
    ]
    train, held_out = split_examples(examples, 0.3)
    assert replies_of(train) & replies_of(held_out), "the default splits by prompt alone"
    train, held_out = split_examples(examples, 0.3, disjoint_replies=True)
    assert train and held_out
    assert not replies_of(train) & replies_of(held_out)
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}


def test_the_hash_never_changes():
    # Pinned: another value would move examples between training and evaluation of old runs.
    assert hash_fraction("") == 0xE3B0C44298FC / 2**48  # SHA-256 of nothing begins so
    assert 0 <= min(map(hash_fraction, map(str, range(1000)))) < 0.01
    assert 0.99 < max(map(hash_fraction, map(str, range(1000)))) < 1


@pytest.mark.parametrize("fraction", [-0.1, 1.5, 15])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ConfigError, match="fraction between 0 and 1"):
        split_examples(pairs(9), fraction)
