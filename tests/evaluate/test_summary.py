"""Summaries: each language counts once, and the worst one is named."""

from __future__ import annotations

import math

import pytest

from jaxmoo.errors import ConfigError
from jaxmoo.evaluate import LanguageScore, before_after_table, summarise

SCORES = {
    "en": LanguageScore(1.0, 0.5, 1000, 3000, 100),
    "fa": LanguageScore(2.0, 0.9, 10, 40, 2),
    "de": LanguageScore(4.0, 0.7, 30, 50, 3),
    "uk": LanguageScore(3.0, 0.6, 30, 50, 3),
}


def test_means_are_over_languages_not_tokens():
    summary = summarise(SCORES, ["en", "fa"], ["de", "uk"])
    assert (summary.seen_nll, summary.unseen_nll) == (1.5, 3.5)
    assert summary.seen_bits_per_byte == pytest.approx(0.7)
    assert summary.unseen_bits_per_byte == pytest.approx(0.65)


def test_the_worst_language_is_sought_by_both_measures():
    summary = summarise(SCORES, ["en", "fa"], ["de", "uk"])
    assert (summary.worst, summary.worst_nll) == ("de", 4.0)
    assert (summary.worst_by_bytes, summary.worst_bits_per_byte) == ("fa", 0.9)
    assert summarise(SCORES, ["en", "fa"]).worst == "fa"


def test_without_unseen_languages_their_mean_is_none():
    summary = summarise(SCORES, ["en"])
    assert summary.unseen_nll is None and summary.to_dict()["unseen_bits_per_byte"] is None


def test_not_a_number_is_worst_of_all():
    broken = SCORES | {"en": LanguageScore(math.nan, math.nan, 1, 1, 1)}
    for order in (["en", "fa"], ["fa", "en"]):
        assert summarise(broken, order).worst == "en"


def test_a_language_without_score_is_named():
    with pytest.raises(ConfigError, match=r"No score of 'ukr'. Did you mean 'uk'"):
        summarise(SCORES, ["en"], ["ukr"])
    with pytest.raises(ConfigError, match="at least one seen language"):
        summarise(SCORES, [])


def test_the_table_shows_every_language_and_the_change():
    after = {
        language: LanguageScore(s.nll - 0.5, s.bits_per_byte / 2, s.tokens, s.bytes, s.examples)
        for language, s in SCORES.items()
    } | {"uk": LanguageScore(5.0, 1.25, 30, 50, 3)}
    table = before_after_table(SCORES, after, ["en", "fa"], ["de", "uk"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    rows = {line[0]: line[1:] for line in lines[2:]}
    assert len({len(line) for line in table.splitlines()}) == 1, "aligned"
    assert list(rows) == [
        "en",
        "fa",
        "de (unseen)",
        "uk (unseen)",
        "seen mean",
        "unseen mean",
        "worst NLL: de → uk",
        "worst bits/byte: fa → uk",
    ]
    assert rows["fa"] == ["2.000 → 1.500", "-0.500", "0.900 → 0.450", "-0.450", "2"]
    assert rows["seen mean"][:2] == ["1.500 → 1.000", "-0.500"]
    assert rows["unseen mean"][:2] == ["3.500 → 4.250", "+0.750"]
    assert rows["worst NLL: de → uk"][:2] == ["4.000 → 5.000", "+1.000"]
    assert rows["worst bits/byte: fa → uk"][2:4] == ["0.900 → 1.250", "+0.350"]
