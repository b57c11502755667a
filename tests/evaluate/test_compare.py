"""Comparisons of two evaluations: which intervals they show, and what may be compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from jaxmoo.commands.evaluate import main
from jaxmoo.errors import CheckpointError, DataError
from jaxmoo.evaluate.compare import compare
from jaxmoo.evaluate.intervals import Differences, proportion_difference, studentised_mean
from jaxmoo.evaluate.results import LanguageResult, Results, ResultStore, read_results

N = 80


def language(seed, shift=0.0, *, units=None, data="d", noise=0.3):
    """Numbers of N examples; those of one seed differ by their shift and some noise."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 40, N)
    nats = tokens * rng.gamma(4, 0.5, N)
    correct = rng.random(N) < 0.5
    rng = np.random.default_rng([seed, int(shift * 100), 1])
    nats = nats + shift * tokens + noise * tokens * rng.normal(size=N)
    columns = {
        "nats": nats.tolist(),
        "tokens": tokens.tolist(),
        "bytes": (tokens * 3).tolist(),
        "correct": (correct | (rng.random(N) < shift)).astype(int).tolist(),
    }
    return LanguageResult(data, units or [f"{seed}/{i}" for i in range(N)], columns, {})


def results(name, seen=("en", "fa"), unseen=("uk",), shift=0.0, **options):
    languages = {
        code: language(i, shift, **options) for i, code in enumerate((*seen, *unseen), start=1)
    }
    return Results(Path(name), name, list(seen), list(unseen), languages)


@pytest.fixture(scope="module")
def pair():
    return results("a"), results("b", shift=0.1)


def test_results_of_different_dates_are_compared_with_a_word_on_it(pair):
    a, b = pair
    assert compare(a, b).notes == []
    a = a._replace(date="2026-07-26")
    assert compare(a, b._replace(date="2026-07-26")).notes == []
    for date, said in ((None, "none"), ("2026-07-27", "2026-07-27")):
        (note,) = compare(a, b._replace(date=date)).notes
        assert f"A 2026-07-26 and B {said}" in note and "--date" in note


def test_intervals_are_those_of_the_examples(pair):
    found = compare(*pair)
    for code in ("en", "uk"):
        a, b = (one.languages[code].columns for one in pair)
        apart = Differences(
            np.subtract(b["nats"], a["nats"]), np.array(a["tokens"]), pair[0].languages[code].units
        )
        row = found.rows["nll"][code]
        assert (row.low, row.high) == studentised_mean([apart])
        assert row.difference == pytest.approx(sum(apart.values) / sum(apart.below))
        bits = found.rows["bits_per_byte"][code]
        assert bits.low == pytest.approx(row.low / 3 / math.log(2))
        gained = sum(x < y for x, y in zip(a["correct"], b["correct"], strict=True))
        lost = sum(x > y for x, y in zip(a["correct"], b["correct"], strict=True))
        accuracy = found.rows["accuracy"][code]
        assert accuracy[3:] == pytest.approx(proportion_difference(gained, lost, N))


def test_means_over_independent_languages_are_surer_than_languages(pair):
    rows = compare(*pair).rows["nll"]
    assert rows["seen mean"].difference == pytest.approx(
        (rows["en"].difference + rows["fa"].difference) / 2
    )
    widths = {label: row.high - row.low for label, row in rows.items()}
    assert widths["seen mean"] < 0.85 * min(widths["en"], widths["fa"])
    assert rows["unseen mean"] == rows["uk"]


def test_parallel_examples_are_drawn_together():
    """Twice the same numbers tell no more than once, if they are of the same sentences."""

    def both(shift, units):
        once = language(1, shift, units=units)
        return Results(Path("x"), "x", ["en", "fa"], [], {"en": once, "fa": once})

    groups = [str(i) for i in range(N)]
    rows = compare(both(0, groups), both(0.1, groups)).rows["nll"]
    assert rows["seen mean"] == rows["en"] == rows["fa"]


def test_examples_of_one_group_are_drawn_as_one():
    units = [str(i // 5) for i in range(N)]
    wide = compare(results("a", units=units), results("b", shift=0.1, units=units, noise=0.0))
    one = compare(results("a", units=["0"] * N), results("b", units=["0"] * N))
    assert all(row.low <= row.difference <= row.high for row in wide.rows["nll"].values())
    assert math.isnan(one.rows["nll"]["en"].low) and " - |" in one.table()
    assert "No interval (-): fewer than 12 examples" in one.table()
    assert "No interval" not in wide.table()


def test_equal_results_differ_by_nothing(pair):
    """No answer differs: but of other examples, some might."""
    rows = compare(pair[0], pair[0]).rows
    for row in rows["nll"].values():
        assert (row.difference, row.low, row.high) == (0, 0, 0)
    for row in rows["accuracy"].values():
        assert row.difference == 0 and row.low < -0.01 and row.high > 0.01


def test_likelihoods_per_token_are_left_out_when_tokens_differ(pair):
    other = results("b")
    for one in other.languages.values():
        one.columns["tokens"][0] += 1
    found = compare(pair[0], other)
    assert "nll" not in found.rows and "bits_per_byte" in found.rows
    assert "NLL is left out" in found.table()


def test_only_results_of_the_same_data_are_compared(pair):
    with pytest.raises(DataError, match="has no results of uk"):
        compare(pair[0], results("b", unseen=()))
    with pytest.raises(DataError, match="different examples in en, fa, uk"):
        compare(pair[0], results("b", data="other"))
    cut = results("b")
    cut.languages["fa"].columns["bytes"][3] -= 1
    with pytest.raises(DataError, match="different parts of the replies in fa"):
        compare(pair[0], cut)
    bare = results("b")
    for one in bare.languages.values():
        del one.columns["correct"], one.columns["nats"]
    with pytest.raises(DataError, match="no measure in common"):
        compare(pair[0], bare)


def test_the_command_reads_what_an_evaluation_wrote(pair, tmp_path, capsys):
    for one in pair:
        store = ResultStore(tmp_path / f"{one.path}.json")
        for code, found in one.languages.items():
            store.store(code, {}, found)
        store.finish(one.languages, one.seen, one.unseen, model=one.model)
    a, b, out = (str(tmp_path / name) for name in ("a.json", "b.json", "out.json"))
    assert main(["--compare", a, b, "--output", out]) == 0
    shown = capsys.readouterr().out
    rows = json.loads(Path(out).read_text())
    expected = compare(*pair)
    assert rows == expected.to_dict()
    assert expected.table() in shown and "accuracy (higher is better)" in shown

    (tmp_path / "b.examples" / "fa.json").unlink()
    assert main(["--compare", a, b]) == 2
    assert "fa.json cannot be read" in capsys.readouterr().err
    assert main(["--compare", a, out]) == 2
    assert "not what evaluate.py writes" in capsys.readouterr().err


def test_damaged_results_are_refused(pair, tmp_path):
    store = ResultStore(tmp_path / "r.json")
    found = pair[0].languages["en"]
    store.store("en", {"weights": "x"}, found)
    assert store.stored("en", {"weights": "x"}) == found and store.stored("fa", {}) is None
    store.finish({"en": found}, ["en"], [], model="m")
    short = found._replace(units=found.units[:-1])
    store.store("en", {"weights": "x"}, short)
    with pytest.raises(CheckpointError, match="columns have lengths"):
        read_results(store.output)
