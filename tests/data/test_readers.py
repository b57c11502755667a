"""Streams divided among processes: each reads its own languages, and all have the same batches."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from data.peers import as_processes
from data.tables import settings
from data.test_streaming import pairs, same, write
from jaxmoo.data import LanguageBatches, corpus
from jaxmoo.data.batches import Counts
from jaxmoo.data.sources.source import FilesSource
from jaxmoo.errors import DataError
from jaxmoo.train.resume import batch_digest

LENGTH, ROWS = 64, 3
SEEN, UNSEEN = ["en", "fa", "it", "zh"], ["de", "fr"]
STEPS = range(12)


class Counted(FilesSource):
    """Files whose records are counted as they are read."""

    def __init__(self, data):
        super().__init__(data.source, data)
        self.read = Counter()

    def open(self, language):
        source, stream = self, super().open(language)

        class Noted:
            def __next__(self):
                record = next(stream)
                source.read[language] += 1
                return record

            def __iter__(self):
                return self

            position, seek = stream.position, stream.seek

        return Noted()


@pytest.fixture
def data(tmp_path):
    for language in (*SEEN, *UNSEEN):
        write(tmp_path / f"{language}.jsonl", pairs(language))
    with (tmp_path / "fa.jsonl").open("a") as file:
        file.write("{no json\n")
    return settings(
        tmp_path / "{language}.jsonl",
        seen=SEEN,
        unseen=UNSEEN,
        sequence_length=LENGTH,
        held_out=0.3,
        max_held_out=5,
        shuffle_buffer=16,
        max_malformed=0.1,
        streaming=True,
    )


def rows_of(number, count):
    """The rows [4, 3] of a process of several: languages divided, or rows where more of them."""
    rows = np.zeros((len(SEEN), ROWS), bool)
    groups = min(count, len(SEEN))
    here = np.array_split(np.arange(len(SEEN)), groups)[number % groups]
    share = np.array_split(np.arange(ROWS), max(count // groups, 1))[number // groups]
    rows[np.ix_(here, share)] = True
    return rows


def opened(data, make_tokenizer, peers=None, rows=None, **options):
    reads = None if rows is None else [c for c, some in zip(SEEN, rows.any(1), strict=True) if some]
    source = Counted(data)
    found = corpus.load_corpus(
        data, make_tokenizer(), source=source, peers=peers, reads=reads, say=lambda _: None
    )
    batches = LanguageBatches(
        found.train, SEEN, ROWS, LENGTH, 0, packing=True, readers=found.readers, **options
    )
    return found, batches, source


def facts(found):
    return {
        "held out": {c: [e.tokens.tolist() for e in part] for c, part in found.held_out.items()},
        "report": {code: one.to_dict() for code, one in found.report.items()},
        "complaints": found.complaints,
        "table": found.table(),
    }


@pytest.mark.parametrize("count", [2, 8])
def test_all_have_what_one_would_have_and_each_reads_its_own(count, data, make_tokenizer):
    alone, batches, everything = opened(data, make_tokenizer)
    expected, counted = [], []
    for step in STEPS:
        expected.append(batches.batch(step))
        counted.append(batches.counts(step))
    digest, state = batch_digest(batches, 12), batches.state(12)

    def process(peers):
        rows = rows_of(peers.number, count)
        found, own, source = opened(data, make_tokenizer, peers, rows)
        assert facts(found) == facts(alone)
        beginning = dict(source.read)
        counts = []
        for step in STEPS:
            batch = own.batch(step, rows)
            for name, array in expected[step].items():
                assert (batch[name][rows] == array[rows]).all()
            counts.append(own.counts(step, rows))
        assert batch_digest(own, 12) == digest
        assert own.state(12) == json.loads(json.dumps(state))
        return counts, beginning, dict(source.read), set(found.readers.mine)

    found = as_processes(count, process)
    assert not [one for one in found if isinstance(one, Exception)], found
    # What one process writes down of all of them: the largest of each number.
    for step in STEPS:
        largest = Counts(
            *(np.max(one, 0) for one in zip(*(f[0][step] for f in found), strict=True))
        )
        assert all((a == b).all() for a, b in zip(largest, counted[step], strict=True))
    # The beginning of a language is read by one, what is trained on by those that need it.
    for language in (*SEEN, *UNSEEN):
        assert sum(language in beginning for _, beginning, _, _ in found) == 1
        readers = [read[language] for _, _, read, _ in found if language in read]
        assert len(readers) == (max(count // len(SEEN), 1) if language in SEEN else 1)
        assert max(readers) == everything.read[language]
    for _, beginning, read, mine in found:
        assert set(read) == mine | set(beginning)
    if count == 2:
        total = sum(sum(read.values()) for _, _, read, _ in found)
        assert total == sum(everything.read.values()), "nothing is read twice"


def test_a_run_goes_on_with_another_number_of_processes(data, make_tokenizer):
    _, batches, _ = opened(data, make_tokenizer)
    expected = [batches.batch(step) for step in STEPS]
    states = {}

    def begin(peers):
        rows = rows_of(peers.number, 2)
        _, own, _ = opened(data, make_tokenizer, peers, rows)
        for step in range(7):
            own.batch(step, rows)
        states[2] = json.loads(json.dumps(own.state(7)))

    def go_on(peers):
        rows = rows_of(peers.number, 4)
        _, own, _ = opened(data, make_tokenizer, peers, rows)
        own.seek(states[2])
        for step in range(7, 12):
            batch = own.batch(step, rows)
            assert all((batch[n][rows] == expected[step][n][rows]).all() for n in batch)

    assert as_processes(2, begin) == [None, None]
    assert as_processes(4, go_on) == [None] * 4
    # And in one that was never divided.
    _, one, _ = opened(data, make_tokenizer)
    one.seek(states[2])
    assert all(same(one.batch(step), expected[step]) for step in range(7, 12))


@pytest.mark.parametrize("what", ["too few", "nothing"])
def test_what_one_cannot_read_all_are_told(what, data, make_tokenizer, tmp_path):
    if what == "nothing":
        (tmp_path / "zh.jsonl").unlink()
    else:
        (tmp_path / "zh.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')

    def process(peers):
        return opened(data, make_tokenizer, peers, rows_of(peers.number, 2))

    found = as_processes(2, process)
    assert all(isinstance(one, DataError) for one in found)
    assert [str(one).removeprefix("Process 1: ") for one in found] == [str(found[1])] * 2
    expected = {"too few": "Language 'zh' has no", "nothing": "has no language 'zh'"}
    assert expected[what] in str(found[1])


@pytest.mark.parametrize("what", ["whole", "state"])
def test_what_one_cannot_read_later_all_who_ask_for_it_are_told(what, data, make_tokenizer):
    data = dataclasses.replace(data, max_malformed=0.0)  # the last record of fa

    def process(peers):
        rows = rows_of(peers.number, 2)
        _, own, _ = opened(data, make_tokenizer, peers, rows)
        own.batch(0, rows)
        getattr(own, what)(40)

    found = as_processes(2, process)
    assert all("fa.jsonl:62: expected one JSON object per line" in str(one) for one in found), found


def test_processes_that_read_other_records_notice(data, make_tokenizer, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for language in (*SEEN, *UNSEEN):
        text = (tmp_path / f"{language}.jsonl").read_text()
        (other / f"{language}.jsonl").write_text(text.replace("reply 3 ", "reply x "))

    theirs = dataclasses.replace(data, source=str(other / "{language}.jsonl"))

    def process(peers):
        own = theirs if peers.number else data
        rows = np.zeros((len(SEEN), ROWS), bool)
        rows[:, peers.number] = True
        _, batches, _ = opened(own, make_tokenizer, peers, rows)
        for step in range(8):
            batches.whole(step)

    found = as_processes(2, process)
    assert all("do not read the same records of" in str(one) for one in found), found


def test_drawn_languages_are_read_by_all(data, make_tokenizer):
    drawn = dataclasses.replace(data, languages_per_step=2)

    def process(peers):
        found = corpus.load_corpus(
            drawn, make_tokenizer(), peers=peers, reads=["en"], say=lambda _: None
        )
        return found.readers

    assert as_processes(2, process) == [None, None]
