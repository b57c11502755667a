"""Streams: what memory would hold, read piece by piece, and found again from any step."""

from __future__ import annotations

import contextlib
import csv
import json
import threading
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data.tables import compress, load_corpus, settings
from jaxmoo.data import LanguageBatches
from jaxmoo.data.sources.source import HubSource
from jaxmoo.data.streaming import ExampleStream
from jaxmoo.errors import CheckpointError, ConfigError, DataError
from jaxmoo.train.resume import batch_digest, check_data

LENGTH = 64


def pairs(language, count=60):
    """Prompts and replies of many lengths, some with line breaks, one of them twice."""
    rows = [(f"{language} {i}?\n" * (1 + i % 2), f"reply {i} " * (1 + i % 5)) for i in range(count)]
    return [*rows, rows[-1]]


def write(path, rows):
    """Write records in the format of the path's suffix; Parquet in row groups of 7."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".gz", ".zst"):
        write(path.with_suffix(""), rows)
        compress(path.with_suffix(""), path)
        path.with_suffix("").unlink()
        return
    records = [{"prompt": p, "completion": c} for p, c in rows]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    else:
        table = pyarrow.Table.from_pylist(records)
        pyarrow.parquet.write_table(table, path, row_group_size=7)


@pytest.fixture
def folder(tmp_path):
    for language in ("en", "fa", "de"):
        write(tmp_path / f"{language}.jsonl", pairs(language))
    return tmp_path


@pytest.fixture
def stream(tokenizer):
    """Open a stream of two seen languages and one unseen, in small pieces."""

    def open_stream(source, **options):
        defaults = {"seen": ["en", "fa"], "unseen": ["de"], "sequence_length": LENGTH}
        defaults |= {"held_out": 0.3, "max_held_out": 5, "shuffle_buffer": 16}
        defaults |= {"streaming": True}
        return load_corpus(str(source), tokenizer, **(defaults | options))

    return open_stream


def batches_of(corpus, **options):
    return LanguageBatches(corpus.train, ["en", "fa"], 3, LENGTH, 0, **options)


def segments(batch, language=0):
    """The token sequences in a language's packed rows, and the tokens that are learnt."""
    found = []
    rows = zip(*(batch[n][language] for n in ("tokens", "segment_ids", "loss_mask")), strict=True)
    for tokens, ids, mask in rows:
        for segment in range(1, ids.max() + 1):
            found.append((*tokens[ids == segment], "mask", *mask[ids == segment]))
    return found


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_a_pass_over_a_stream_shows_what_memory_would_hold_once(folder, stream, tokenizer):
    corpus = stream(folder)
    options = {"seen": ["en", "fa"], "unseen": ["de"], "sequence_length": LENGTH, "held_out": 0.3}
    memory = load_corpus(str(folder), tokenizer, **options)
    batches, whole = (batches_of(c, packing=True) for c in (corpus, memory))
    # Enough steps for a pass and a half of either; a stream's rows are planned in each piece.
    shown = [s for step in range(60) for s in segments(batches.batch(step))]
    passes = [batches.epochs(step)["en"] for step in range(60)]
    count = len(memory.train["en"])
    assert passes == sorted(passes) and passes[0] == 0 and passes[-1] >= 2
    expected = Counter(s for step in range(60) for s in segments(whole.batch(step))).keys()
    first, second = shown[:count], shown[count : 2 * count]
    # The record that is there twice is found within its piece.
    assert Counter(first) == Counter(second) == Counter(expected)
    assert first != second and corpus.report["en"].duplicates <= 1

    # Every example is on its side, and of those held out the first ones are evaluated.
    for language in ("en", "fa"):
        sides = {tuple(e.tokens) for e in memory.held_out[language]}
        chosen = [tuple(e.tokens) for e in corpus.held_out[language]]
        assert len(set(chosen)) == 5 and set(chosen) <= sides
    assert len(corpus.held_out["de"]) == 5 and corpus.report["de"].train == 0
    assert "de (unseen)" in corpus.table()


def test_only_what_is_needed_is_read(folder, stream):
    """A fault is met when it is read, and not before."""
    with (folder / "en.jsonl").open("a") as file:
        file.write('{"prompt": "no reply"}\n')
    corpus = stream(folder)
    batches = batches_of(corpus)
    batches.batch(2)
    with pytest.raises(DataError, match=r"en\.jsonl:62: no column 'completion'"):
        for step in range(3, 100):
            batches.batch(step)
    assert step > 8

    said = []
    corpus = stream(folder, max_malformed=0.05, say=said.append)
    batches = batches_of(corpus)
    assert batches.batch(0) and batches.malformed() == {"en": 0, "fa": 0}
    while batches.epochs(step)["en"] < 2:
        batches.batch(step := step + 1)
    assert batches.malformed()["en"] >= 2 and "en.jsonl:62" in said[0]
    with pytest.raises(DataError, match=r"malformed are 1 of the 62 .* allows a share of 0.01"):
        stream(folder, max_malformed=0.01, shuffle_buffer=100)


def test_what_a_template_cannot_render_is_malformed_in_a_stream_too(folder, make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.content.startswith('en 40?') %}{{ 1 / 0 }}{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    options = {"seen": ["en", "fa"], "sequence_length": LENGTH, "held_out": 0.3}
    options |= {"max_held_out": 2, "shuffle_buffer": 16, "streaming": True}
    said = []
    corpus = load_corpus(str(folder), tokenizer, max_malformed=0.1, say=said.append, **options)
    batches = batches_of(corpus)
    step = 0
    while batches.epochs(step)["en"] < 1:
        batches.batch(step := step + 1)
    assert batches.malformed()["en"] >= 1 and "en.jsonl:41: the chat template" in said[0]
    batches = batches_of(load_corpus(str(folder), tokenizer, **options))
    with pytest.raises(DataError, match=r"en\.jsonl:41: .*ZeroDivisionError"):
        for step in range(100):
            batches.batch(step)


@pytest.mark.parametrize("kind", ["jsonl.gz", "csv", "csv.zst", "parquet", "one table"])
def test_from_any_step_a_run_goes_on_with_the_same_batches(kind, stream, tmp_path):
    options = {}
    if kind == "one table":
        source = tmp_path / "all.jsonl"
        lines = [
            json.dumps({"prompt": p, "completion": c, "lang": p[:2]})
            for rows in zip(*map(pairs, ("en", "fa", "de")), strict=True)
            for p, c in rows
        ]
        source.write_text("\n".join(lines))
        options = {"language_column": "lang"}
    else:
        source = tmp_path / f"{{language}}.{kind}"
        for language in ("en", "fa", "de"):
            write(tmp_path / f"{language}.{kind}", pairs(language))

    def fresh():
        mixed = {"packing": True, "per_step": 1, "shares": {"en": 2, "fa": 1}}
        return batches_of(stream(source, **options), **mixed)

    batches = fresh()
    steps = range(0, 48)
    shown, states = [], []
    for step in steps:
        shown.append(batches.batch(step))
        states.append(json.dumps(batches.state(step)))
    assert batches.epochs(48)["en"] >= 1
    for step in (0, 1, 17, 33, 47):
        resumed = fresh()
        resumed.batch(0)
        resumed.seek(json.loads(states[step]))
        for later in steps[step : step + 4]:
            assert same(resumed.batch(later), shown[later])
            assert json.dumps(resumed.state(later)) == states[later]
            assert resumed.epochs(later) == batches.epochs(later)
    # Without a state it is found by reading on, and an earlier one by reading anew.
    assert same(fresh().batch(33), shown[33]) and same(batches.batch(5), shown[5])


def test_a_resumed_run_does_not_read_again_what_lies_behind_it(folder, stream):
    class Run:
        def __init__(self):
            self.batches = batches_of(stream(folder, max_held_out=2))

    first, second = Run(), Run()
    described = {
        "step": 8,
        "stream": json.loads(json.dumps(first.batches.state(8))),
        "next_batch": batch_digest(first.batches, 8),
    }
    # Where nothing was read yet but the held-out examples: the first record is overwritten.
    whole = (folder / "en.jsonl").read_bytes()
    (folder / "en.jsonl").write_bytes(b"#" + whole[1:])
    check_data(described, second)
    assert same(second.batches.batch(8), first.batches.batch(8))
    with pytest.raises(DataError, match=r"en\.jsonl:1: expected one JSON object"):
        second.batches.batch(0)
    # Had the records there changed, it would be known.
    (folder / "en.jsonl").write_bytes(whole.replace(b"reply", b"Reply"))
    with pytest.raises(CheckpointError, match="batch of step 9 would be another"):
        check_data(described, second)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_hub_data_set_is_found_again_at_any_record(suffix, tmp_path):
    """A subset per language, in two files each, laid out as on the hub."""
    front = ["---", "configs:"]
    for language in ("en", "fa"):
        rows = pairs(language)
        for part, piece in enumerate((rows[:20], rows[20:])):
            write(tmp_path / language / f"train-{part}.{suffix}", piece)
        front += [f"- config_name: {language}", f"  data_files: {language}/*.{suffix}"]
    (tmp_path / "README.md").write_text("\n".join([*front, "---", ""]))

    def opened():
        return HubSource(str(tmp_path), settings(tmp_path, streaming=True)).open("fa")

    stream, positions, records = opened(), [], []
    positions.append(json.dumps(stream.position()))
    for record in stream:
        records.append(record)
        positions.append(json.dumps(stream.position()))
    assert [values["prompt"] for _, values in records] == [p for p, _ in pairs("fa")]
    assert records[20][0] == f"{tmp_path} (fa, train): row 21"
    other = opened()
    for number in (0, 5, 19, 20, 21, 48, 61):
        other.seek(json.loads(positions[number]))
        assert [next(other, None) for _ in range(3)] == [*records, None, None, None][
            number : number + 3
        ]
    other.seek(None)
    assert list(other) == records


def test_what_cannot_be_streamed_is_refused(folder, stream):
    with pytest.raises(ConfigError, match=r"chatterbot.*streaming=false"):
        stream("chatterbot")
    (folder / "lists").mkdir()
    for language in ("en", "fa", "de"):
        (folder / "lists" / f"{language}.json").write_text("[]")
    with pytest.raises(ConfigError, match="cannot be streamed"):
        stream(folder / "lists")
    with pytest.raises(DataError, match=r"'en': the first 20 records.*fewer than.*Lower it, or ra"):
        stream(folder, max_held_out=50, max_scan=20)
    # None cannot be asked for, nor can the built-in corpus be streamed.
    with pytest.raises(DataError, match=r"have 0 examples .*=1\. Raise data\.held_out"):
        stream(folder, max_held_out=1, held_out=1e-9, max_scan=20)
    with pytest.raises(DataError, match=r"Unknown data source 'chaterbot'\. Expected a path"):
        stream("chaterbot")
    with pytest.raises(DataError, match=r"ending in \.jsonl, \.parquet, \.csv, found '\.txt'"):
        stream(folder / "{language}.txt")
    # All that there are are enough when there are no more.
    assert len(stream(folder, max_held_out=50).held_out["en"]) < 30
    with pytest.raises(DataError, match="a whole pass over its records gave no example"):
        corpus = stream(folder)
        write(folder / "en.jsonl", [("long " * LENGTH, "x")])
        batches_of(corpus).batch(0)


@pytest.mark.parametrize("packing", [False, True])
def test_reading_ahead_changes_nothing_but_when_it_is_done(folder, stream, packing, monkeypatch):
    read, threads = ExampleStream.read, []

    def noted(self, *arguments):
        threads.append(threading.current_thread() is threading.main_thread())
        return read(self, *arguments)

    monkeypatch.setattr(ExampleStream, "read", noted)
    path = folder / "en.jsonl"
    lines = path.read_text().splitlines()
    lines[40] = "{no json"
    path.write_text("\n".join(lines))

    def seen(ahead):
        said = []
        corpus = stream(folder, max_malformed=0.1, say=said.append)
        batches, found = batches_of(corpus, packing=packing), []
        threads.clear()
        with batches.reading_ahead() if ahead else contextlib.nullcontext():
            # Forward, back to what was read before, and on from a place that was noted.
            for step in (*range(12), 11, 3, 4, 30):
                found.append((batches.batch(step), batches.state(step)))
                found[-1] += (batches.epochs(step), batches.malformed(), list(said))
            batches.seek(found[9][1])
            found.append((batches.batch(9), batches.state(9)))
        assert set(threads) == {not ahead}
        found.append((batches.batch(31), batches.state(31)))
        return found

    for one, other in zip(seen(True), seen(False), strict=True):
        assert same(one[0], other[0]) and one[1:] == other[1:]


def test_what_was_read_ahead_in_vain_may_be_wrong(folder, stream):
    path = folder / "fa.jsonl"
    with path.open("a") as file:
        file.write("{no json\n")
    batches = batches_of(stream(folder))
    with batches.reading_ahead():
        for step in range(8):
            batches.batch(step)
        with pytest.raises(DataError, match=r"fa.jsonl:62: expected one JSON object"):
            batches.batch(20)
