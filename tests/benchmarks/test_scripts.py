"""The benchmarks run, on shapes too small to time, and their checks can fail."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_models
from closeness import relative_error
from devices import ROOT, run_python
from tiny_tokenizer import chat_tokenizer


@pytest.fixture(scope="module")
def gpu_script(tmp_path_factory):
    """What ``benchmarks/gpu.sh --smoke`` printed, and the numbers it kept."""
    out = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu.sh", "--smoke", out],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done, {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}


@pytest.mark.slow
def test_the_gpu_script_measures_every_section(gpu_script):
    done, found = gpu_script
    assert {"step-tiny", "kernels", "plan"} == set(found), done.stdout + done.stderr
    step = {row["engine"]: row for row in found["step-tiny"]["rows"]}
    assert set(step) == {"plain", "backward"}
    assert all(row["seconds"] > 0 for row in step.values())
    assert all(page["about"]["command"] and page["about"]["date"] for page in found.values())


@pytest.mark.slow
def test_its_last_lines_are_the_table(gpu_script):
    done, _ = gpu_script
    table = done.stdout[done.stdout.index("| measured |") :]
    for text in ("plain", "backward mean", "Planned"):
        assert text in table


def test_other_losses_are_reported():
    peers = module("peers")
    ours = np.array([[10.0, 11.0], [9.0, 10.0]])
    row = {"name": "theirs", "same": "ours"}
    same = row | {"difference": peers.difference(ours * (1 + 1e-4), ours)}
    other = row | {"difference": peers.difference(ours * (1 + 1e-2), ours)}
    lost = row | {"difference": peers.difference(ours * np.nan, ours)}
    assert peers.disagreements([same], 2e-3) == []
    assert len(peers.disagreements([other, lost], 2e-3)) == 2


@pytest.mark.slow
def test_input_measures_the_data_of_a_run(write_config, tmp_path):
    config = write_config(resolve={"aggregator": "mean"})
    numbers = tmp_path / "numbers.json"
    script = ROOT / "benchmarks/input.py"
    flags = ["--steps", 0, "--batches", 3, "--json", numbers]
    run_python([script, "--config", config, *flags], PYTHONPATH=str(ROOT))
    stages = json.loads(numbers.read_text())["rows"]
    assert len(stages) == 3
    assert all(row["tokens per second"] > 0 for row in stages)


@pytest.mark.slow
def test_load_save_measures_a_round_trip(tmp_path):
    numbers = tmp_path / "numbers.json"
    flags = ["--layers", 1, "--width", 64, "--directory", tmp_path, "--json", numbers]
    done = run_python(
        [ROOT / "benchmarks/load_save.py", *flags, "--only", "Orbax save"],
        PYTHONPATH=str(ROOT),
    )
    rows = json.loads(numbers.read_text())["rows"]
    assert [row["name"] for row in rows] == ["Orbax save"]
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in rows)
    assert "| Orbax save |" in done.stdout


def test_what_is_written_for_cpus_computes_what_it_is_timed_beside(monkeypatch):
    script = module("cpu_kernels")
    monkeypatch.setattr(script, "LAYER", [(6, 4), (1, 5)])
    pieces = list(script.pieces([64]))
    for piece in pieces:
        given, plain = (
            jax.tree.leaves(jax.jit(form)(*piece.arguments)) for form in (piece.given, piece.plain)
        )
        for a, b in zip(given, plain, strict=True):
            assert a.dtype == b.dtype
            assert relative_error(a, b) <= 4 * jnp.finfo(b.dtype).eps, (piece.name, piece.size)
    row = script.measure(pieces[0], seconds=0)
    assert row["run"] > 0 and row["compile"] > 0 and row["steps"] > 0
    assert "| Gram by slices | 8 x 6e+01, float32 |" in script.report([row])


def test_quantising_is_timed_and_compared(monkeypatch):
    script = module("quantized")
    row = script.seconds("nf4", "bfloat16", 128, 1)
    assert row["ns per weight"] > 0
    weights = script.random(64, 128, "float32")
    ours = script.ours(weights)
    assert np.abs(ours.values - weights).max() < 0.16 * ours.scales.max()  # half of the widest gap
    found = script.differing(ours, ours)
    assert found == {"codes": 0, "scales": 0, "values": 0, "weights": 64 * 128}
    assert not script.differs(found)
    for other in (
        ours._replace(codes=ours.codes ^ 1),
        ours._replace(scales=ours.scales * 2),
        ours._replace(values=ours.values + 1),
    ):
        assert script.differs(script.differing(ours, other))
    assert not script.differs({"codes": 2, "scales": 0, "values": 2, "weights": 4096**2})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SystemExit, match="pip install bitsandbytes"):
        script.theirs(weights)


def test_simulated_intervals_hold_or_not(monkeypatch):
    script = module("intervals")
    small = {"SIZES": (16,), "DESIGNS": ((3, 8, 20), (3, 8, 30)), "RESAMPLES": 50, "MANY": 999}
    for name, value in small.items():
        monkeypatch.setattr(script, name, value)
    shares = list(script.accuracies(3))
    assert [row["mean over languages"] for row in shares[:2]] == [1, 8]
    assert all(row["examples"] == 16 and row["jaxmoo"].endswith(" %") for row in shares)
    (first, *_) = script.likelihoods(2)
    assert {"percentile", "BCa", "Student's t", "jaxmoo"} <= set(first)
    found = list(script.studies(2, mixed=False))
    assert len(found) == 2 * len(script.STUDIES) and "mixed model" not in found[0]
    assert [row["true difference"] for row in script.equivalence(2)] == [0.05, 0.0]
    counts = script.Counts()
    for low in (-1, 1):
        counts.add("half", low, 2, 0)
    assert counts.shares() == {"half": "50.0 %"} and counts.width("half") == "2.000"


def module(name):
    """A benchmark as a module; they import each other from their own folder."""
    path = ROOT / "benchmarks"
    sys.path.insert(0, str(path))
    try:
        spec = importlib.util.spec_from_file_location(name, path / f"{name}.py")
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
    finally:
        sys.path.remove(str(path))
    return made


@pytest.fixture
def chips():
    return module("chips")


def counted(row, peak, launches):
    """A row as a GPU's compiler fills it."""
    cost = {"parts": {"forward pass": launches}, "per_round": {"while": 1}}
    found = {"fits": True, "peak": peak, "launches": cost, "cycles": None, "seconds": 9.0}
    return row._asdict() | found | {"sent": {"all-gather": 4e9}, "exposed": {"all-gather": 1e9}}


def test_a_chips_table_sets_every_step_beside_the_ordinary_one(chips):
    ours = chips.Row("h100:8", "Qwen3-8B", 1024, 2, "mgda", "leaf")
    other = ours._replace(chip="h100:4")
    full = other._replace(method="cagrad")._asdict() | {"fits": False, "says": "no"}
    rows = [counted(ours, 3e9, 299), counted(ours.beside, 2e9, 99), counted(other, 3e9, 5), full]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in chips.report(rows).splitlines()[2:]
    ]
    by = {(line[0].split(",")[0], line[1]): line for line in lines}
    assert by["h100:8", "mgda"][3:7] == ["3.00", "1.500", "300", "3.000"]
    assert by["h100:8", "plain"][3:7] == ["2.00", "1.000", "100", "1.000"]
    assert by["h100:4", "mgda"][4] == ""  # the same on other chips is no measure
    assert by["h100:4", "cagrad"][3] == "does not fit"
    assert by["h100:8", "mgda"][0].endswith("2,048")


def test_chips_that_were_measured_are_not_measured_again(chips, monkeypatch, tmp_path, capsys):
    done = chips.Row("h100:1", "Qwen3-0.6B", 1024, 1, "plain", "layer")
    pages = chips.Pages(str(tmp_path / "rows.json"), {})
    pages.rows = [counted(done, 1e9, 1)]
    missing = [done._replace(method="mean"), done._replace(chip="v5e:1x1")]
    asked = []

    def measure(row):
        asked.append(row)
        return {"missing": "pip install it"} if row.chip == "v5e:1x1" else {"fits": True}

    monkeypatch.setattr(chips, "_apart", measure)
    chips.fill([done, *missing], pages)
    assert asked == missing
    assert [row["method"] for row in pages.rows] == ["plain", "mean"]
    assert "pip install it" in capsys.readouterr().err


def test_the_documented_rows_have_their_ordinary_step(chips):
    rows = list(chips.table())
    assert len(set(rows)) == len(rows)
    assert all(row.beside in rows for row in rows)


def test_pages_and_tables_become_records(tmp_path):
    data = module("study_data")
    page = "# tar\n\n> Archivos.\n\n- Crea:\n\n`tar cf {{a.tar}} {{f}}`\n\n- Lista:\n\n`tar tf a`\n"
    (tmp_path / "pages.es" / "common").mkdir(parents=True)
    (tmp_path / "pages.es" / "common" / "tar.md").write_text(page)
    found = dict(data.tldr(tmp_path))
    assert found["es"] == [
        {"page": "common/tar", "prompt": "Explain in Spanish: tar cf {{a.tar}} {{f}}",
         "task": "Crea"},
        {"page": "common/tar", "prompt": "Explain in Spanish: tar tf a", "task": "Lista"},
    ]  # fmt: skip
    table = 'index_id\tcategory\ttext\n{0}\tsports\tA "quote\n{1}\ttravel\tB\n'
    for directory in ("eng_Latn", "fin_Latn"):
        path = tmp_path / "data" / "annotated" / directory
        path.mkdir(parents=True)
        (path / "train.tsv").write_text(table.format(1, 2))
        (path / "dev.tsv").write_text(table.format(1, 3))
    found = dict(data.sib200(tmp_path))
    assert [row["id"] for row in found["eng_Latn"]] == ["train-1", "train-2", "dev-1", "dev-3"]
    right, wrong = found["fin_Latn"], found["fin_wrong"]
    assert right[0]["text"] == 'A "quote'
    assert [row | {"category": ""} for row in right] == [row | {"category": ""} for row in wrong]
    assert sorted(row["category"] for row in wrong) == ["sports", "sports", "travel", "travel"]
    assert right != wrong


@pytest.mark.slow
def test_the_script_of_the_studies_runs_and_goes_on(tmp_path):
    """On a tiny model of bytes and a few records; the second time nothing is left to do."""
    tiny_models.save("llama", tmp_path / "model", vocab_size=262, max_position_embeddings=96)
    chat_tokenizer(
        "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}"
    ).save_pretrained(tmp_path / "model")
    for code in ("en", "es", "zh", "ru", "tr", "hi", "ja", "ta", "pt"):
        rows = [{"page": f"{i}", "prompt": f"{code} {i}", "task": f"t{i}"} for i in range(40)]
        (tmp_path / f"{code}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model.source": tmp_path / "model", "model.trainable": r"^layers\.2\.",
        "data.source": tmp_path / "{language}.jsonl", "data.sequence_length": 64,
        "data.chat_template": "null", "resolve.engine": "stacked",
    }  # fmt: skip
    environment = {
        **os.environ, "PYTHON": sys.executable, "STUDIES": "capacity", "JOBS": "1",
        "WORK": str(tmp_path / "work"),
        "EXTRA": " ".join(f"training.{name}={value}" for name, value in settings.items())
        + " learning_rates=[0.001,0.01]",
    }  # fmt: skip
    command = ["bash", ROOT / "benchmarks/gpu_study.sh", "--smoke", tmp_path / "out"]
    for _ in range(2):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=1200
        )
        log = (tmp_path / "out" / "capacity.log").read_text()
        assert done.returncode == 0, done.stdout + done.stderr + log
        rows = (tmp_path / "out" / "capacity.jsonl").read_text().splitlines()
        # The model before training; two arms at two rates with the tuning seed, and the best.
        assert len(rows) == 1 + 2 * 2 + 2
        shutil.rmtree(tmp_path / "work")  # the rows' copy is what it goes on from
    assert "Run 1" not in log
