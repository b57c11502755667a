"""What is kept is what would be made now, whatever happens to an entry, or is not used."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from data.kept import damage, entries, load, options, uncached, whole
from data.peers import as_processes
from jaxmoo.data import LanguageBatches, token_cache
from jaxmoo.errors import InterruptedRunError
from jaxmoo.files.outputs import typed_path


def test_the_second_time_nothing_is_tokenised_and_all_is_the_same(folder, cache, tokenizer, parts):
    data = options(folder, cache)
    expected = uncached(data, tokenizer)
    assert expected["complaints"] and any(r["leaked"] for r in expected["report"].values())
    assert whole(load(data, tokenizer)) == expected
    parts.clear()
    again = load(data, tokenizer)
    assert whole(again) == expected and not parts
    assert list(again.train) == data.seen and list(again.report) == [*data.seen, *data.unseen]
    assert len(entries(cache)) == 1


def test_batches_are_the_same_bit_for_bit(folder, cache, tokenizer):
    data = options(folder, cache)

    def batches(found):
        made = LanguageBatches(found.train, data.seen, 3, 96, 0, packing=True)
        return [made.batch(step) for step in range(9)]

    load(data, tokenizer)
    kept, made = (
        batches(load(one, tokenizer)) for one in (data, dataclasses.replace(data, cache="none"))
    )
    for one, other in zip(kept, made, strict=True):
        assert all((one[name] == other[name]).all() for name in other)
        assert [x.dtype for x in one.values()] == [x.dtype for x in other.values()]


def test_what_lies_in_a_bucket_is_kept_here(folder, cache, tokenizer, parts):
    bucket = typed_path("memory://bucket/kept")
    for file in folder.glob("*.jsonl"):
        (bucket / file.name).write_bytes(file.read_bytes())
    data = options(bucket, cache)
    expected = uncached(data, tokenizer)
    assert whole(load(data, tokenizer)) == expected
    parts.clear()
    assert whole(load(data, tokenizer)) == expected and not parts
    text = (bucket / "en.jsonl").read_text()
    (bucket / "en.jsonl").write_text(text.replace("reply 1 ", "reply 8 "))
    assert whole(load(data, tokenizer)) == uncached(data, tokenizer) != expected


def test_machines_take_from_a_bucket_what_one_has_made(
    folder, tokenizer, parts, tmp_path, monkeypatch
):
    bucket = typed_path("memory://bucket/tokens")
    data = options(folder, bucket)
    expected = uncached(data, tokenizer)

    def on_machine(name):
        own = tmp_path / name
        own.mkdir(exist_ok=True)
        monkeypatch.setattr(token_cache, "cache_directory", lambda where, kind: own)
        parts.clear()
        assert whole(load(data, tokenizer)) == expected
        return len(parts) > 0

    assert on_machine("one") and not on_machine("other")
    # What is damaged there is made anew, and sent again.
    (entry,) = bucket.iterdir()
    good = (entry / "en.safetensors").read_bytes()
    (entry / "en.safetensors").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert on_machine("third")
    assert (entry / "en.safetensors").read_bytes() == good
    (entry / "digests.json").unlink()  # not all of it has been sent
    assert on_machine("fourth") and not on_machine("fifth")
    (entry / "digests.json").unlink()
    assert not on_machine("fifth") and not on_machine("sixth")  # sent by who has it


@pytest.mark.parametrize("name", ["fa.safetensors", "complaints.json", "digests.json"])
@pytest.mark.parametrize("how", ["missing", "cut", "changed"])
def test_what_is_damaged_is_made_anew(name, how, folder, cache, tokenizer):
    data = options(folder, cache)
    expected = whole(load(data, tokenizer))
    (entry,) = entries(cache)
    damage(cache / entry / name, how)
    said = []
    assert whole(load(data, tokenizer, say=said.append)) == expected
    told = any("is damaged, and made anew" in line for line in said)
    assert told or (how, name) == ("missing", "digests.json"), "there it was never whole"
    said.clear()
    assert whole(load(data, tokenizer, say=said.append)) == expected
    assert not said and entries(cache) == [entry]


def test_a_run_that_is_asked_to_stop_throws_nothing_away(folder, cache, tokenizer, monkeypatch):
    load(options(folder, cache), tokenizer)

    def stopped(*_):
        raise InterruptedRunError("Stopped by SIGTERM.", signal.SIGTERM)

    before = entries(cache)
    monkeypatch.setattr(token_cache, "damaged_files", stopped)
    with pytest.raises(InterruptedRunError):
        load(options(folder, cache), tokenizer)
    assert entries(cache) == before


def test_several_runs_may_keep_the_same_at_the_same_time(folder, cache, make_tokenizer):
    data = options(folder, cache)
    expected = uncached(data, make_tokenizer())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: whole(load(data, make_tokenizer())), range(4)))
    assert found == [expected] * 4
    assert len(entries(cache)) == 1


def test_a_run_that_is_slower_takes_what_another_has_kept(
    folder, cache, make_tokenizer, monkeypatch
):
    data = options(folder, cache)
    expected = uncached(data, make_tokenizer())
    name = token_cache.TokenCache._name

    def slower(self):
        monkeypatch.setattr(token_cache.TokenCache, "_name", name)
        load(data, make_tokenizer())
        name(self)

    monkeypatch.setattr(token_cache.TokenCache, "_name", slower)
    assert whole(load(data, make_tokenizer())) == expected
    assert len(entries(cache)) == 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_full_disk_costs_only_what_would_be_kept(
    count, folder, cache, make_tokenizer, monkeypatch
):
    data = options(folder, cache)
    expected = uncached(data, make_tokenizer())
    write = token_cache.write_arrays

    def full(file, *content):
        if file.name == "it.safetensors":
            file.write_bytes(b"a part")
            raise OSError(28, "No space left on device")
        write(file, *content)

    monkeypatch.setattr(token_cache, "write_arrays", full)
    said = []
    found = as_processes(
        count, lambda peers: whole(load(data, make_tokenizer(), peers=peers, say=said.append))
    )
    assert found == [expected] * count
    assert any("cannot be kept: [Errno 28] No space left" in line for line in said)
    assert not entries(cache)


def test_what_was_not_used_for_long_goes_and_so_does_the_oldest_of_too_much(
    folder, cache, tokenizer, monkeypatch
):
    def kept(length):
        before = set(entries(cache))
        load(options(folder, cache, sequence_length=length), tokenizer)
        return next(iter(set(entries(cache)) - before), None)

    def aged(entry, days):
        os.utime(cache / entry, times=(time.time() - days * 86400,) * 2)

    first, second, third = kept(80), kept(81), kept(82)
    abandoned, others = f".{first}-{'0' * 16}", {".git", ".profile", "notes.txt", "runs"}
    for entry in (abandoned, *others):
        (cache / entry).mkdir()
    (cache / "runs" / "digests.json").touch()
    for entry, days in ((first, 40), (second, 20), (third, 10), (abandoned, 2)):
        aged(entry, days)
    for entry in others:
        aged(entry, 100)
    fourth = kept(83)
    assert set(entries(cache)) == {second, third, fourth, *others}
    assert kept(81) is None  # used today
    size = sum(file.stat().st_size for file in (cache / fourth).iterdir())
    monkeypatch.setattr(token_cache, "MOST_BYTES", int(3.5 * size))
    fifth = kept(84)
    assert set(entries(cache)) == {second, fourth, fifth, *others}
