"""The built-in corpus, as published."""

from __future__ import annotations

import pytest

from data.tables import read_examples
from jaxmoo.data.sources.chatterbot import FOLDERS
from jaxmoo.data.split import deduplicate

# Prompts and replies, entries skipped, distinct prompts and replies.
COUNTS = {
    "en": (2025, 1, 897),
    "es": (280, 0, 277),
    "it": (562, 0, 558),
    "ja": (568, 0, 565),
    "ko": (454, 0, 454),
    "zh": (467, 0, 465),
    "fa": (773, 0, 773),
    "pt": (321, 0, 318),
    "de": (113, 0, 112),
    "fr": (89, 0, 87),
    "nl": (314, 0, 313),
    "id": (163, 0, 162),
    "uk": (456, 9, 455),
}


@pytest.fixture(scope="module")
def corpus():
    return read_examples("chatterbot", list(FOLDERS)).languages


def test_every_language_of_the_wheel_is_read(corpus):
    assert len(corpus) == 28
    assert all(examples for examples, *_ in corpus.values())


def test_counts(corpus):
    found = {
        language: (len(examples), skipped, len(deduplicate(examples)))
        for language, (examples, skipped, _) in corpus.items()
        if language in COUNTS
    }
    assert found == COUNTS


def test_an_example_is_the_first_two_entries_of_a_conversation(corpus):
    replies = {e.reply for e in corpus["en"][0] if e.prompt == "You are arrogant"}
    assert replies == {"Arrogance is not one of my emotions."}


def test_no_example_is_empty_and_no_byte_order_mark_is_left(corpus):
    for examples, *_ in corpus.values():
        assert all(e.prompt and e.reply and "\ufeff" not in e.prompt + e.reply for e in examples)
