"""``jaxmoo study`` from its command line to its tables."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxmoo.commands.study import main
from jaxmoo.config.study_config import load_study
from jaxmoo.evaluate.evaluation import Evaluation, evaluate
from jaxmoo.study.examples import unpack_examples
from jaxmoo.study.figure import language_map
from jaxmoo.study.grid import make_cells
from jaxmoo.study.jobs import _received
from jaxmoo.study.statistics import mean_interval
from jaxmoo.train.run import train

ROOT = Path(__file__).parents[2]
LABELS = ("sports", "travel", "law")
FILES = ("study.md", "forest.svg", "languages.svg", "index.html")


def rows_of(file: Path) -> list[dict]:
    lines = (file.parent / "study" / "rows.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


class Text(HTMLParser):
    """What a page says, row by row of its tables and text by text, and the names of its places."""

    def __init__(self, page: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.said: list[str] = []
        self.names: set[str | None] = set()
        self.inside = False  # of a cell
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.add(dict(attrs).get("id"))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.inside = tag in ("td", "th") or (tag in ("strong", "em") and self.inside)

    def handle_data(self, data):
        self.said.append(data)
        if self.rows and self.inside and self.rows[-1]:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")


def rows_of_tables(page: str) -> list[list[str]]:
    return Text(page).rows


@pytest.fixture
def copy(finished, tmp_path):
    """The finished study elsewhere, for tests that change it; its file."""
    content = yaml.safe_load(finished.read_text())
    content["output"] = str(tmp_path / "study")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    shutil.copytree(finished.parent / "study", tmp_path / "study")
    return tmp_path / "study.yaml"


def rewrite(file: Path, rows: list[dict]) -> None:
    path = file.parent / "study" / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_every_run_leaves_a_row_and_nothing_else(finished):
    rows = rows_of(finished)
    keys = [(row["arm"], row["seed"]) for row in rows]
    # The model before training first; seeds outermost.
    assert keys == [(None, None), ("mean", 1), ("mgda", 1), ("mean", 2), ("mgda", 2)]
    kept = [path.name for path in (finished.parent / "study" / "runs").iterdir()]
    assert kept == ["mean_seed1_lr0.001"]  # as it was asked
    for row in rows[1:]:
        assert row["steps"] == 3 and row["tokens"] > 0 and row["step_seconds"] > 0
        assert 0 <= row["conflict_share"] <= 1
        assert {"jax", "python"} <= set(row["versions"])
        assert set(row["languages"]) == {"en", "fi", "tr"}
        assert row["settings"]["resolve.aggregator"] == row["arm"]
    by_key = dict(zip(keys, rows, strict=True))
    assert by_key["mgda", 1]["norm_ratio"] == pytest.approx(1, abs=1e-3)  # matched norms
    # Trained at all, and differently.
    nll = {k: row["languages"]["en"]["all"]["nll"] for k, row in by_key.items()}
    assert len(set(nll.values())) == len(nll)


@pytest.mark.slow
def test_a_seed_means_the_same_batches_in_every_arm(finished):
    _, a1, b1, a2, b2 = rows_of(finished)
    for code in ("en", "fi"):
        assert a1["first_loss"][code] == pytest.approx(b1["first_loss"][code], abs=1e-4)
        assert a2["first_loss"][code] == pytest.approx(b2["first_loss"][code], abs=1e-4)
        assert abs(a1["first_loss"][code] - a2["first_loss"][code]) > 1e-3


@pytest.mark.slow
def test_a_run_after_others_is_what_it_is_alone(finished, tmp_path):
    """Here it has a compiled step of its own, and is evaluated from what it wrote."""
    study = load_study(finished)
    cell = make_cells(study)[-1]
    config = dataclasses.replace(cell.config, output=str(tmp_path / "alone"))
    train(config, lambda line: None)
    asked = Evaluation.of_run(config.output, max_examples=None, max_length=None)
    alone = evaluate(asked, lambda line: None)["languages"]
    row = rows_of(finished)[-1]
    assert (row["arm"], row["seed"]) == (cell.key.arm, cell.key.seed)
    for code, parts in row["languages"].items():
        assert parts["all"]["nll"] == pytest.approx(alone[code]["nll"], rel=1e-5)


@pytest.mark.slow
def test_held_out_examples_are_divided_alike_in_all_languages(finished):
    for row in rows_of(finished):
        sizes = [
            tuple(parts[part]["examples"] for part in ("tune", "report", "all"))
            for parts in row["languages"].values()
        ]
        assert len(set(sizes)) == 1  # parallel sentences
        tune, report, everything = sizes[0]
        assert tune + report == everything and min(tune, report) > 0
        for parts in row["languages"].values():
            weighed = sum(parts[p]["accuracy"] * parts[p]["examples"] for p in ("tune", "report"))
            assert weighed / everything == pytest.approx(parts["all"]["accuracy"])


@pytest.mark.slow
def test_tables_come_from_the_rows_and_are_the_same_again(copy, capsys):
    study = copy.parent / "study"
    texts = []
    for _ in range(2):
        for name in FILES:
            (study / name).unlink()
        assert main(["--config", str(copy), "--report-only"]) == 0
        assert (study / "study.md").read_text() == capsys.readouterr().out.rstrip("\n") + "\n"
        texts.append([(study / name).read_bytes() for name in FILES])
    assert texts[0] == texts[1]
    table = (study / "study.md").read_text()
    rows = rows_of(copy)

    def seen(row):
        return np.mean([row["languages"][code]["all"]["nll"] for code in row["seen"]])

    mean = [seen(row) for row in rows if row["arm"] == "mean"]
    mgda = [seen(row) for row in rows if row["arm"] == "mgda"]
    half = 12.706 * np.std(mean, ddof=1) / math.sqrt(2)  # Student's t of one degree of freedom
    line = next(line for line in table.splitlines() if line.startswith("| mean "))
    assert f"{np.mean(mean):.3f} ± {half:.3f}" in line
    assert f"{np.mean(np.subtract(mgda, mean)):+.3f} ± " in table
    # The answer comes first; two seeds are too few for a test.
    assert table.startswith("**mgda is not shown to be better than mean** in NLL")
    assert "With fewer than 3 seeds (here 2) nothing is tested." in table.splitlines()[0]
    assert "4 of 4 runs" in table and "before training" in table
    # All languages are taken as given, as there are two; examples are known.
    assert "fewer than 3 languages (seen, unseen)" in table and "no single examples" not in table
    assert re.search(r"\| mgda +\| +2 \| +[+-]\d\.\d{3} ± \d+\.\d{3} \|", table)
    assert all(b"<svg" in plot for plot in texts[0][1:3])
    assert all(f"]({name})" in table for name in FILES[1:3])


@pytest.mark.slow
def test_processes_side_by_side(write_study, tmp_path, capsys):
    """Tuning seeds come first, and every arm's other seeds at the rate that they chose alone."""
    rates = [1e-3, 3e-2]
    file = write_study(
        tmp_path,
        arms={name: [f"resolve.aggregator={name}"] for name in ("mean", "unit_mean")},
        tuning_seeds=[7],
        learning_rates=rates,
        seeds=[1],
        measure={"choices": ",".join(LABELS), "skip": ["fi"]},
    )
    assert main(["--config", str(file), "--jobs", "2"]) == 0
    assert "6 of 6 runs" in capsys.readouterr().out
    rows = {(row["arm"], row["seed"], row["learning_rate"]): row for row in rows_of(file)}
    assert len(rows) == 7  # with the model before training
    assert all(set(row["languages"]) == {"en", "tr"} for row in rows.values())  # not the skipped
    for arm in ("mean", "unit_mean"):
        tuned = {rate: rows[arm, 7, rate]["languages"]["en"]["tune"]["nll"] for rate in rates}
        best = min(tuned, key=tuned.__getitem__)
        assert (arm, 1, best) in rows
    assert not any((file.parent / "study" / "runs").iterdir())


def test_a_process_that_is_killed_is_reported_with_its_arms():
    """And what it had said before is not lost, nor is what others say."""
    context = multiprocessing.get_context("spawn")
    workers = []
    for name, end in (("mean, mgda", os._exit), ("pcgrad", sys.exit)):
        messages, sent = context.Pipe(duplex=False)
        worker = context.Process(target=end, args=(9 if end is os._exit else 0,), name=name)
        worker.start()
        sent.send(("line", name))
        sent.close()
        workers.append((messages, worker))
    said = sorted(_received(workers))
    assert [one for one in said if one[0] == "line"] == [("line", "mean, mgda"), ("line", "pcgrad")]
    (error,) = (text for kind, text in said if kind == "error")
    assert error.startswith("mean, mgda: the process of these arms ended with exit code 9.")


def test_a_page_of_an_unfinished_study_of_one_arm(tmp_path, monkeypatch):
    """Nothing is compared: there are scores, without an answer and without pictures."""
    monkeypatch.chdir(ROOT)
    lines = (ROOT / "docs/study/chatterbot/rows.jsonl").read_text("utf-8").splitlines()
    own = [line for line in lines if json.loads(line)["arm"] in (None, "language-mean")]
    (tmp_path / "rows.jsonl").write_text("".join(line + "\n" for line in own[:-1]))
    given = ["arms={language-mean: [resolve.aggregator=mean]}", f"output={tmp_path}"]
    assert main(["--config", "study/chatterbot", *given, "--report-only"]) == 0
    page = (tmp_path / "index.html").read_text()
    assert "<h1>Scores of language-mean</h1>" in page and "<img" not in page
    assert ["language-mean (baseline)", "mean", "layer", "2 of 3", ""] in rows_of_tables(page)
    assert "Unfinished: language-mean (seed 3)." in page


def test_the_map_of_languages_shows_each_ones_paired_difference(tmp_path):
    of = {"en": mean_interval([-0.1, -0.2]), "tr": mean_interval([0.30, 0.32])}
    figure = language_map({"mgda": of}, ["en"], ["tr"], "nll", "mean", tmp_path / "map.svg")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["-0.15", "+0.31", "seen", "unseen"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["en", "tr"]
    # The interval of the second alone leaves out 0. Lower is better, so it is red, at the low end.
    (frame,) = axes.patches
    assert round(frame.get_x()) == 1
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.15, -0.31]])


@pytest.mark.slow
def test_power_is_told_from_the_rows_there_are(copy, capsys):
    assert main(["--config", str(copy), "--power", "measure.smallest_effect={nll: 0.01}"]) == 0
    out = capsys.readouterr().out
    assert "### Power: NLL of the seen mean" in out and "Power: NLL of the worst" in out
    assert re.search(r"\| seeds \| \d+ examples \| .*200 examples", out)
    assert main(["--config", str(copy), "--power"]) == 0
    assert "### Power: NLL of the seen mean" in capsys.readouterr().out


@pytest.mark.slow
def test_rows_keep_single_examples(finished):
    base, *rows = rows_of(finished)
    for row in rows:
        for code, result in unpack_examples(row, base, "all").items():
            scores = row["languages"][code]["all"]
            assert result.scores()["accuracy"] == scores["accuracy"]
            assert result.scores()["nll"] == pytest.approx(scores["nll"], abs=1e-3)
            assert len(set(result.units)) == scores["examples"]


@pytest.mark.slow
def test_only_what_is_missing_is_run_again(copy, capsys):
    """Here of a run that had been stopped between its end and its row."""
    base, first, *others = rows_of(copy)
    rewrite(copy, [base, *others])
    assert main(["--config", str(copy), "--dry-run"]) == 0
    assert "4 runs, 3 done, 1 to do;" in capsys.readouterr().out
    assert main(["--config", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "Run 1 of 1: mean, seed 1" in out
    again = rows_of(copy)
    assert again[:-1] == [base, *others]
    for name in ("languages", "settings", "first_loss", "tokens"):
        assert again[-1][name] == first[name]


@pytest.mark.slow
def test_a_study_goes_on_with_the_date_it_began_with(copy):
    base, _, *others = rows_of(copy)
    assert len({row["date"] for row in (base, *others)}) == 1
    rewrite(copy, [row | {"date": "2020-02-03"} for row in (base, *others)])
    shutil.rmtree(copy.parent / "study" / "runs")
    assert main(["--config", str(copy)]) == 0
    assert rows_of(copy)[-1]["date"] == "2020-02-03"


@pytest.mark.slow
def test_other_settings_are_refused_by_name(copy, capsys):
    before = (copy.parent / "study" / "rows.jsonl").read_bytes()
    assert main(["--config", str(copy), "training.train.steps=5"]) == 2
    error = capsys.readouterr().err
    assert "mean, seed 1, learning rate 0.001 with other settings" in error
    assert "train.steps: 3 -> 5" in error
    assert main(["--config", str(copy), "arms.mgda=[resolve.aggregator=mgda]"]) == 2
    assert "resolve.match_norm: true -> false" in capsys.readouterr().err
    assert main(["--config", str(copy), "measure.choices=law,travel", "--report-only"]) == 2
    assert "measure.choices:" in capsys.readouterr().err
    assert main(["--config", str(copy), "tune=0.3", "--report-only"]) == 2
    assert "tune: null -> 0.3" in capsys.readouterr().err
    assert (copy.parent / "study" / "rows.jsonl").read_bytes() == before


@pytest.mark.slow
def test_rows_outlive_settings_that_are_added_later(copy):
    rows = rows_of(copy)
    for row in rows[1:]:
        del row["settings"]["resolve.token_mean"]
    rewrite(copy, rows)
    assert main(["--config", str(copy), "--report-only"]) == 0


@pytest.mark.slow
def test_rows_that_do_not_belong_together_are_refused(copy, capsys):
    rows = rows_of(copy)
    rows[2]["data"]["fi"] = "0" * 16
    rewrite(copy, rows)
    assert main(["--config", str(copy), "--report-only"]) == 2
    assert "other held-out examples than the first, in fi" in capsys.readouterr().err
    rows = rows_of(copy)
    rows[2]["data"] = rows[1]["data"]
    rows[2]["first_loss"]["en"] += 1
    rewrite(copy, rows)
    assert main(["--config", str(copy), "--report-only"]) == 2
    assert "different losses before their first update (en:" in capsys.readouterr().err
    rewrite(copy, [*rows[:2], rows[1]])
    assert main(["--config", str(copy), "--report-only"]) == 2
    assert "there already is a row of mean, seed 1" in capsys.readouterr().err
    (copy.parent / "study" / "rows.jsonl").write_text('{"arm": "mean"}\n')
    assert main(["--config", str(copy), "--report-only"]) == 2
    assert "line 1 is not a row of a study: it lacks" in capsys.readouterr().err


@pytest.mark.slow
def test_an_unfinished_study_says_what_is_missing(copy, capsys):
    rewrite(copy, rows_of(copy)[:-1])
    assert main(["--config", str(copy), "--report-only"]) == 0
    out = capsys.readouterr().out
    assert "3 of 4 runs" in out and "Unfinished: mgda (seed 2)." in out
    # One common seed: a difference without an interval.
    assert re.search(r"\| mgda +\| +1 \| +[+-]\d\.\d{3} \| +\| +– \| +\? \| +undecided", out)
    assert main(["--config", str(copy), "--power"]) == 2
    assert "Noise is known from two seeds on" in capsys.readouterr().err
    rewrite(copy, [])
    for asked in ("--report-only", "--power"):
        assert main(["--config", str(copy), asked]) == 2
        assert "no row to report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "maen"}, "baseline names 'maen', which is not in arms. Did you mean 'mean'?"),
        ({"seeds": [1, 1]}, "seeds names 1 more than once"),
        ({"learning_rates": []}, "learning_rates is empty"),
        ({"tuning_seeds": [2]}, "2 in both seeds and tuning_seeds"),
        ({"tuning_seeds": [7]}, "tuning_seeds have nothing to choose from"),
        ({"learning_rates": [-1.0]}, "learning_rates: -1.0 is not above 0"),
        ({"arms": {"mean": ["seed=3"]}}, "arms.mean sets seed, which the grid sets"),
        ({"training": {"output": "x"}}, "training sets output, which the grid sets"),
        ({"arms": {"mean": ["resolve.agregator=mean"]}}, "arm 'mean': .*Did you mean 'aggregator'"),
        ({"arms": {"mean": [], "same": []}}, "arms 'mean' and 'same' are the same run"),
        ({"arms": {"mean": [], "b": ["data.unseen=[]"]}}, "arms differ in data.seen"),
        ({"base": "nowhere.yaml"}, "There is no config file nowhere.yaml"),
        ({"arms": ["mean"]}, "arms must be a mapping to lists"),
        ({"measure": {"skip": ["fin"]}}, "skip names 'fin', which is not in .*Did you mean 'fi'"),
        ({"measure": {"skip": ["tr"]}}, "skip names 'tr', .* is left out of data.unseen"),
        ({"measure": {"skip": ["en", "fi"]}}, "skip names all of data.seen"),
        ({"measure": {"smallest_effect": {"nlll": 0.1}}}, "names 'nlll', .*Did you mean 'nll'"),
        ({"measure": {"smallest_effect": {"accuracy": 0.1}}}, "It takes measure.choices"),
        ({"measure": {"smallest_effect": {"nll": 0}}}, "smallest_effect.nll: 0.* is not above 0"),
    ],
)  # fmt: skip
def test_bad_settings_are_found_before_anything_is_run(
    write_study, tmp_path, capsys, change, message
):
    assert main(["--config", str(write_study(tmp_path, **change))]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "study").exists()


def test_arms_given_twice_and_unknown_ones(write_study, tmp_path, capsys):
    file = write_study(tmp_path)
    assert main(["--config", str(file), "--arms", "mgad"]) == 2
    assert "--arms names 'mgad', which is not in arms. Did you mean 'mgda'?" in (
        capsys.readouterr().err
    )
    file.write_text(file.read_text().replace("  mgda:", "  mean:"))
    assert main(["--config", str(file)]) == 2
    assert "'mean' is given twice" in capsys.readouterr().err


def test_the_configs_of_the_project_are_sound(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for file in sorted((ROOT / "configs" / "study").glob("*.yaml")):
        assert main(["--config", str(file), "--print-config"]) == 0
        assert main(["--config", str(file), "output=nowhere", "seeds=[1]", "--dry-run"]) == 0
        assert re.search(r"\d+ runs, 0 done", capsys.readouterr().out)


@pytest.mark.parametrize(
    "rows",
    sorted((ROOT / "docs" / "study").glob("*/rows.jsonl")),
    ids=lambda rows: rows.parent.name,
)
def test_published_tables_come_from_their_rows(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    shutil.copy(rows, tmp_path)
    config = f"configs/study/{rows.parent.name}.yaml"
    assert main(["--config", config, f"output={tmp_path}", "--report-only"]) == 0
    text = (tmp_path / "study.md").read_text()
    assert text == (rows.parent / "study.md").read_text()
    page = (tmp_path / "index.html").read_text()
    # One file: pictures are inside of it, each with a description.
    links = re.findall(r'(?:src|srcset|href)="(.+?)"', page)
    assert all(one.startswith(("data:", "#")) for one in links)
    pictures = re.findall(r'<img alt="(.+?)" src="data:image/svg', page)
    assert [re.search(r"of 12 arms", one) is not None for one in pictures] == [True, True]
    # All tables and paragraphs of the report, none of them twice.
    found = Counter(tuple(row) for row in rows_of_tables(page))
    for line in text.splitlines():
        if line.startswith("| "):
            found[tuple(cell.strip() for cell in line.strip("|").split("|"))] -= 1
    left = {row for row, count in found.items() if count}
    assert min(found.values()) == 0
    assert ("language-mean (baseline)", "mean", "layer", "3 of 3", "") in left
    assert ("steps", "16" if rows.parent.name == "chatterbot" else "32") in left
    told = "".join(Text(page).said)
    for line in text.splitlines():
        if line and line[0] not in "|!#":
            assert line.replace("*", "") in told
    assert Text(page).names >= set(re.findall(r'href="#(.+?)"', page))
