"""From rows with single examples to what arms are shown to be worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from jaxmoo.errors import DataError
from jaxmoo.evaluate.measures import measured, score
from jaxmoo.evaluate.results import LanguageResult
from jaxmoo.study.answer import answer, by_kind, headline
from jaxmoo.study.effects import Effects, verdicts
from jaxmoo.study.examples import members, pack_examples, unpack_examples
from jaxmoo.study.figure import forest
from jaxmoo.study.outcome import Arm
from jaxmoo.study.parts import Table, as_markdown
from jaxmoo.study.power import Noise, detectable, noise, power_section
from jaxmoo.study.statistics import Estimate, mean_interval
from jaxmoo.study.web_page import Shown, describe_forest, describe_languages

LANGUAGES = {"en": 0.0, "fi": 0.2, "tr": 0.4, "ja": 0.6}
SEEN, UNSEEN = ["en", "fi", "tr"], ["ja"]
N = 40


def results(rng, gain=0.0, parallel=True):
    found = {}
    for i, (code, level) in enumerate(LANGUAGES.items()):
        fixed = np.random.default_rng(i)
        tokens = fixed.integers(3, 20, N)
        nats = tokens * (1 + level + 0.3 * fixed.normal(size=N))
        # A gain varies with the run, with the example, and with both.
        run = 1 + 0.2 * rng.normal()
        varied = run + 0.5 * fixed.normal(size=N) + 0.1 * rng.normal(size=N)
        nats = nats - gain * tokens * varied + 0.05 * rng.normal(size=N)
        correct = (nats / tokens < 1.2).astype(int)
        columns = {
            "nats": nats.tolist(), "tokens": tokens.tolist(), "bytes": (3 * tokens).tolist(),
            "correct": correct.tolist(),
        }  # fmt: skip
        units = [str(j) if parallel else f"{code}/{j}" for j in range(N)]
        found[code] = LanguageResult("digest", units, columns, {})
    return found


def row(arm, seed, gain=0.0, **options):
    found = results(np.random.default_rng([seed or 0, int(1000 * gain)]), gain, **options)
    scores = {
        code: {"all": {"examples": N} | {m: score(one.columns, m) for m in measured(one.columns)}}
        for code, one in found.items()
    }
    return {
        "arm": arm, "seed": seed, "learning_rate": None if arm is None else 0.1,
        "seen": SEEN, "unseen": UNSEEN, "languages": scores,
        "data": dict.fromkeys(found, "digest"),
        "examples": pack_examples(found, "all", 0.5, base=arm is None),
    }  # fmt: skip


def effects(seeds=(1, 2, 3), gain=0.1, examples=True, **options):
    arms = {}
    for name, one in (("mean", 0.0), ("new", gain)):
        rows = {seed: row(name, seed, one, **options) for seed in seeds}
        if not examples:
            rows = {
                seed: {k: v for k, v in one.items() if k != "examples"}
                for seed, one in rows.items()
            }
        arms[name] = Arm(name, 0.1, {}, (), rows, "all")
    return Effects(arms, "mean", row(None, None))


def test_examples_come_back_from_rows():
    base, one = row(None, None), row("mean", 1)
    back = unpack_examples(one, base, "all")
    expected = results(np.random.default_rng([1, 0]))
    for code, found in back.items():
        assert found.units == expected[code].units
        assert found.columns["correct"] == expected[code].columns["correct"]
        np.testing.assert_allclose(
            found.columns["nats"], expected[code].columns["nats"], atol=0.0005
        )
        assert found.columns["tokens"] == expected[code].columns["tokens"]
    assert unpack_examples(one, base, "report") is None
    assert unpack_examples(one, None, "all") is None
    assert unpack_examples({**one, "examples": None}, base, "all") is None
    units = [str(i) for i in range(100)]
    parts = [members(units, part, 0.3) for part in ("tune", "report")]
    assert sorted(parts[0] + parts[1]) == members(units, "all", 0.3) == list(range(100))
    assert 15 < len(parts[0]) < 45


def test_examples_of_other_scores_are_refused():
    base, one, other = row(None, None), row("new", 1, 0.3), row("mean", 1)
    with pytest.raises(DataError, match=r"A row's NLL of 'en' is .* but that of its single"):
        unpack_examples({**one, "examples": other["examples"]}, base, "all")
    one["examples"]["languages"]["fi"]["nats"].pop()
    with pytest.raises(DataError, match=r"score of 'fi' is of 40 examples, but .* of 39, 40"):
        unpack_examples(one, base, "all")
    del one["examples"]["languages"]["en"]
    with pytest.raises(DataError, match="no single examples of 'en'"):
        unpack_examples(one, base, "all")


@pytest.mark.parametrize(("measure", "group"), [("nll", "seen"), ("accuracy", "worst")])
def test_influences_are_what_leaving_an_example_out_changes(measure, group):
    found = effects()
    differences, influences = found._parts("new", measure, group)
    whole = sum(one.values.sum(1) for one in influences)
    np.testing.assert_allclose(whole, 0, atol=1e-12)
    arms = {name: arm.rows[2] for name, arm in found.arms.items()}
    base = row(None, None)
    loaded = {name: unpack_examples(one, base, "all") for name, one in arms.items()}
    codes = SEEN if group == "seen" else list(LANGUAGES)

    def value(without):
        scores = []
        for one in loaded.values():
            of = []
            for code in codes:
                columns = {
                    k: [x for i, x in enumerate(v) if (code, i) != without]
                    for k, v in one[code].columns.items()
                }
                of.append(score(columns, measure))
            scores.append(np.mean(of) if group == "seen" else min(of))
        return scores[1] - scores[0]

    mine = [one.values[1] for one in influences]
    if group == "seen":
        mine = [one / len(SEEN) for one in mine]
    mine = np.concatenate(mine)
    left = np.array([value(None) - value((code, i)) for code in codes for i in range(N)])
    # Up to the example's share of the rest, to first order.
    np.testing.assert_allclose(mine, left, atol=0.15 * np.abs(left).max())
    assert np.corrcoef(mine, left)[0, 1] > 0.995
    assert differences.mean() == pytest.approx(found.difference("new", measure, group).mean)


def test_intervals_count_examples_where_rows_have_them():
    known, unknown = effects(), effects(examples=False)
    assert known.of_examples and not unknown.of_examples
    for group in ("seen", "unseen", "worst", "fi"):
        a, b = (
            one.difference("new", "nll", group, other_languages=False) for one in (known, unknown)
        )
        assert a.mean == pytest.approx(b.mean)
        assert a.error > b.error
    assert known.difference("new", "nll", "unseen") == known.difference("new", "nll", "ja")
    assert effects(seeds=(1,)).difference("new", "nll", "seen").half == math.inf


def test_claims_are_about_other_languages_or_these():
    found = effects()
    wide = found.difference("new", "nll", "seen")
    these = Effects(found.arms, "mean", row(None, None), other_languages=False)
    narrow = these.difference("new", "nll", "seen")
    assert narrow == found.difference("new", "nll", "seen", other_languages=False)
    assert wide == these.difference("new", "nll", "seen", other_languages=True)
    assert wide.half > narrow.half and wide.mean == narrow.mean
    assert noise(these, "nll", "seen").languages == 0
    assert "of the mean over 3 languages" not in as_markdown(power_section(these, "nll", "seen"))


def test_verdicts_follow_the_tests():
    def of(mean, error, seeds=5):
        return Estimate(mean, error, 10, (0.0,) * seeds)

    found = {
        "better": of(0.30, 0.02),
        "worse": of(-0.30, 0.02),
        "equivalent": of(0.005, 0.004),  # and yet surely not 0
        "not better": of(-0.30, 0.12),
        "undecided": of(0.02, 0.1),
    }
    kinds = verdicts(found, True, 0.05)
    assert {name: one.kind for name, one in kinds.items()} == {name: name for name in found}
    assert by_kind(kinds) == {name: [name] for name in found}
    t = stats.t.ppf(0.975, 10)
    assert kinds["undecided"].gain == pytest.approx(0.02 + 0.1 * t)
    # p-values are adjusted for their number: alone it would be worse.
    assert verdicts({"a": found["not better"]}, True, 0.05)["a"].kind == "worse"
    # Where less is better, all is the other way round.
    flipped = verdicts(found, False, 0.05)
    assert flipped["better"].kind == "worse" and flipped["worse"].kind == "better"
    assert flipped["undecided"].gain == pytest.approx(-0.02 + 0.1 * t)
    # One seed has no interval, but its mean says which is the best.
    single = {"low": mean_interval([0.1]), "high": mean_interval([0.2])}
    assert by_kind(verdicts(single, True, None))["undecided"] == ["high", "low"]
    # Without a smallest effect nothing is equivalent, and from two seeds nothing is tested.
    assert verdicts({"a": found["equivalent"]}, True, None)["a"].kind == "undecided"
    two = verdicts({"a": of(0.3, 0.001, seeds=2)}, True, 0.05)["a"]
    assert two.kind == "undecided" and math.isnan(two.p) and math.isnan(two.p_equivalent)


def test_the_answer_names_every_arm_once():
    estimates = {
        "a": Estimate(-0.2, 0.01, 9, (0.0,) * 5),
        "b": Estimate(0.0, 0.002, 9, (0.0,) * 5),
        "c": Estimate(0.1, 0.1, 9, (0.0,) * 5),
        "d": Estimate(0.0, 0.1, 9, (0.0,) * 5),
        "e": Estimate(0.2, 0.01, 9, (0.0,) * 5),
    }
    found = {("nll", group): verdicts(estimates, False, 0.05) for group in ("seen", "worst")}
    text = answer(found, "nll", "mean", 0.05)
    assert text.startswith("**1 of 5 arms is better than mean** in NLL")
    assert "1 is equivalent within 0.05: b (+0.000 ± 0.005)." in text
    assert "1 is worse: e (+0.200 ± 0.023)." in text
    assert "2 are undecided: d, c (gains of up to 0.126, of c, to 0.226, of d, are still" in text
    assert text.endswith("Worst language: 1 better (a), 1 equivalent, 2 undecided, 1 worse (e).")
    assert headline({"c": found["nll", "seen"]["c"]}, "mean") == (
        "c is not shown to be better than mean"
    )
    two = {("nll", "seen"): verdicts({"a": mean_interval([1.0, 2.0])}, False, None)}
    assert "With fewer than 3 seeds (here 2) nothing is tested." in answer(two, "nll", "m", None)


def test_the_figure_shows_each_verdict(tmp_path):
    estimates = {
        "near": Estimate(-0.02, 0.001, 9, (0.0,) * 5),
        "far": Estimate(5.0, 0.1, 9, (0.0,) * 5),
        "same": Estimate(0.0, 0.002, 9, (0.0,) * 5),
    }
    found = {group: verdicts(estimates, False, 0.01) for group in ("seen", "worst")}
    figure = forest(found, "nll", "mean", 0.01, tmp_path / "forest.svg")
    axes = figure.axes[0]
    # The best first, and what is far off as an arrow with its number.
    assert [label.get_text() for label in axes.get_yticklabels()] == ["near", "same", "far"]
    assert [text.get_text() for text in axes.texts] == ["+5.00"]
    assert axes.get_xlim()[1] < 1
    assert "1 of 3 arms is better than mean" in figure.get_suptitle()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["better", "equivalent", "worse"]
    narrow = forest(found, "nll", "mean", 0.01, tmp_path / "narrow.svg", narrow=True)
    upper, lower = (axes.get_position() for axes in narrow.axes)
    assert upper.y0 > lower.y1 and upper.x0 == lower.x0
    assert narrow.get_size_inches()[0] < 420 / 72


def test_pictures_are_described_in_words_with_their_numbers():
    def near(mean, error):
        return Estimate(mean, error, 9, (0.0,) * 5)

    estimates = {"a": near(-0.02, 0.001), "b": near(0.0, 0.002), "c": near(0.3, 0.01)}
    of_languages = {
        "a": {"en": near(-0.2, 0.01), "fi": near(0.1, 0.2)},
        "b": {"en": near(-0.1, 0.2), "fi": near(0.3, 0.01)},
    }
    found = {"seen": verdicts(estimates, False, 0.01)}
    shown = Shown(found, of_languages, "nll", "mean", 0.01)
    assert describe_forest(shown) == (
        "Differences to mean in NLL (lower is better) with 95 % intervals, of 3 arms. Mean of the "
        "languages trained on: -0.020 ± 0.002 (a), the best, to +0.300 ± 0.023 (c), the last; 2 of "
        "3 intervals leave out 0, 1 lies within ±0.01."
    )
    assert describe_languages(shown) == (
        "Differences to mean in NLL, of 2 arms in 2 languages. Better in 2 of 4 cells, in 1 of "
        "them with an interval that leaves out 0; worse in 2, in 1 of them so. Best: -0.20 (a in "
        "en); worst: +0.30 (b in fi)."
    )
    # Of accuracies, the same differences are the other way round.
    better = shown._replace(measure="accuracy", found={"seen": verdicts(estimates, True, None)})
    assert "+0.300 ± 0.023 (c), the best, to -0.020 ± 0.002 (a), the last" in (
        describe_forest(better)
    )
    assert "Best: +0.30 (b in fi); worst: -0.20 (a in en)." in describe_languages(better)


def test_power_is_that_of_the_t_test():
    """With seeds alone, by the noncentral t-distribution."""
    for seeds in (3, 5, 20):
        found = detectable(Noise(0.01**2, 0.0, 0.0, 0.0, 100, 8, 800), seeds, 100)
        away = found / (0.01 / math.sqrt(seeds))
        t = stats.t.ppf(0.975, seeds - 1)
        power = stats.nct.sf(t, seeds - 1, away) + stats.nct.cdf(-t, seeds - 1, away)
        assert power == pytest.approx(0.8, abs=0.06)
    pilot = Noise(0.01**2, 0.01**2, 0.02**2, 0.02**2, 100, 8, 800)
    found = [detectable(pilot, 5, examples) for examples in (50, 100, 10**9)]
    assert found == sorted(found, reverse=True)
    # However many examples there are, seeds and languages stay.
    without = Noise(0.01**2, 0.01**2, 0.0, 0.0, 100, 8, 800)
    assert found[-1] == pytest.approx(detectable(without, 5, 100), rel=0.01)


def test_the_noise_of_a_pilot_adds_up_to_the_error_of_its_differences():
    found = effects(seeds=range(8), parallel=False)
    for group, languages in (("seen", 3), ("worst", 1)):
        parts = noise(found, "nll", group)
        assert parts.number == N and parts.of_languages == languages
        assert min(parts.seeds, parts.by_run, parts.examples) > 0
        error = found.difference("new", "nll", group, other_languages=False).error
        total = (parts.seeds + parts.by_run) / 8 + parts.examples
        assert math.sqrt(total) == pytest.approx(error)
    text = as_markdown(power_section(found, "nll", "seen"))
    assert "| seeds | 40 examples | 50 examples |" in text and "between seeds" in text
    text = as_markdown(power_section(effects(examples=False), "nll", "seen"))
    assert "hold no single examples" in text
    with pytest.raises(DataError, match="Noise is known from two seeds on"):
        noise(effects(seeds=(1,)), "nll", "seen")


def test_what_is_written_does_not_depend_on_the_terminal(monkeypatch):
    monkeypatch.setattr("jaxmoo.data.table.terminal_width", lambda: 12)
    parts = [Table(["arm", "seen mean", "unseen mean"], [["mean", 1, 2]])]
    assert as_markdown(parts).startswith("| arm  | seen mean | unseen mean |")
    assert as_markdown(parts, width=None).startswith("| arm  | seen mean |\n")
