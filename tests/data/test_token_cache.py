"""What is kept of tokenised data is what would be made of it now, or is not used."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data.peers import as_processes
from data.tables import settings
from data.test_token_table import fields
from devices import run_python
from jaxmoo.config.data_section import DataConfig, LengthsConfig, SamplingConfig
from jaxmoo.data import LanguageBatches, SequenceStream, corpus, token_cache
from jaxmoo.data.sources.records import Origin
from jaxmoo.data.tokenization import parallel
from jaxmoo.errors import DataError, InterruptedRunError
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf import load_tokenizer

LANGUAGES = ["en", "fa", "it", "de"]


@pytest.fixture
def folder(tmp_path):
    """Three languages to train on and one more; of some examples the translation is held out."""
    for number, language in enumerate(LANGUAGES):
        rows = [
            {
                "prompt": f"{language} {i % 20}?\n",
                "completion": f"reply {i % 7} " * (1 + i % 5),
                "other": f"another {i}",
                "half": f"{i // 2}",
                "group": i if i % 2 else None,
            }
            for i in range(24 + 4 * number)
        ]
        rows[3]["completion"] = "<|im_end|> is spelled"
        lines = [json.dumps(row) for row in rows]
        lines[7] = "{no json"
        (tmp_path / f"{language}.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


def options(folder, cache, **changes):
    default = {"seen": ["en", "fa", "it"], "unseen": ["de"], "sequence_length": 96}
    default |= {"held_out": 0.3, "max_held_out": 8, "max_malformed": 0.1, "cache": str(cache)}
    default |= {"columns": {"group": "group"}}
    return settings(f"{folder}/{{language}}.jsonl", **(default | changes))


def load(data, tokenizer, **more):
    return corpus.load_corpus(data, tokenizer, **more)


def whole(found):
    """All of a corpus, to be compared."""
    return {
        "train": {code: [fields(one) for one in part] for code, part in found.train.items()},
        "held_out": {code: [fields(one) for one in part] for code, part in found.held_out.items()},
        "report": {code: one.to_dict() for code, one in found.report.items()},
        "complaints": sorted(found.complaints),
    }


def uncached(data, tokenizer):
    return whole(load(dataclasses.replace(data, cache="none"), tokenizer))


def entries(cache):
    return sorted(path.name for path in cache.iterdir())


@pytest.fixture
def parts(monkeypatch):
    """The languages of the parts that are tokenised from here on."""
    found, tokenized = [], parallel.tokenized

    def noted(task, tokenizer):
        found.append(task.examples[0].language)
        return tokenized(task, tokenizer)

    monkeypatch.setattr(parallel, "tokenized", noted)
    return found


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


CHANGED_SETTINGS = {
    "sequence_length": 90,
    "held_out": 0.5,
    "max_held_out": 2,
    "disjoint_replies": True,
    "special_tokens": "tokens",
    "seen": ["en", "fa"],
    "unseen": ["it", "de"],
    "max_malformed": 0.2,
    "columns": {"prompt": "prompt", "completion": "other", "group": "half"},
}


@pytest.mark.parametrize("name", CHANGED_SETTINGS)
def test_other_settings_have_an_entry_of_their_own(name, folder, cache, tokenizer):
    load(options(folder, cache), tokenizer)
    changes = {name: CHANGED_SETTINGS[name]}
    if name in ("seen", "unseen"):
        changes = {n: CHANGED_SETTINGS[n] for n in ("seen", "unseen")}
    data = options(folder, cache, **changes)
    assert whole(load(data, tokenizer)) == uncached(data, tokenizer)
    assert len(entries(cache)) == 2


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


def test_other_names_of_languages_have_an_entry_of_their_own(folder, cache, tokenizer):
    load(options(folder, cache, unseen=[]), tokenizer)
    data = options(folder, cache, unseen=[], codes={"it": "de"})
    assert whole(load(data, tokenizer)) == uncached(data, tokenizer)
    assert len(entries(cache)) == 2


@pytest.mark.parametrize("what", ["a record", "a template", "a special token", "a vocabulary"])
def test_other_data_or_another_tokenizer_have_an_entry_of_their_own(
    what, folder, cache, make_tokenizer
):
    data, tokenizer = options(folder, cache), make_tokenizer()
    before = whole(load(data, tokenizer))
    if what == "a record":  # of the same size, and as old
        file = folder / "en.jsonl"
        about = file.stat()
        file.write_text(
            file.read_text().replace("another 23", "another 22").replace("y 1 ", "y 8 ")
        )
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
        assert file.stat().st_size == about.st_size
    elif what == "a template":
        tokenizer.chat_template = tokenizer.chat_template.replace("Be kind", "Be brief")
    elif what == "a special token":
        tokenizer.add_special_tokens({"additional_special_tokens": ["reply 2"]})
    else:
        tokenizer.add_tokens(["reply 3"])
    after = whole(load(data, tokenizer))
    assert after == uncached(data, tokenizer) != before
    assert len(entries(cache)) == 2


@pytest.mark.parametrize("what", ["code_digest", "_version"])
def test_other_code_has_an_entry_of_its_own(what, folder, cache, tokenizer, monkeypatch):
    load(options(folder, cache), tokenizer)
    monkeypatch.setattr(token_cache, what, lambda *arguments: "another")
    load(options(folder, cache), tokenizer)
    assert len(entries(cache)) == 2


def test_the_code_is_all_that_makes_tokens_of_data(tmp_path, monkeypatch):
    before = token_cache.code_digest()
    root = Path(token_cache.__file__).parent.parent
    for room in ("data", "config"):
        shutil.copytree(root / room, tmp_path / room)
    monkeypatch.setattr(token_cache, "__file__", str(tmp_path / "data" / "token_cache.py"))
    assert token_cache.code_digest() == before
    found = {before}
    for changed in ("data/tokenization/chat.py", "config/field_text.py"):
        with (tmp_path / changed).open("a") as file:
            file.write("# changed\n")
        found.add(token_cache.code_digest())
    assert len(found) == 3


CANNOT_MATTER = {
    "batch_size": 8,
    "packing": True,
    "languages_per_step": 2,
    "sampling": SamplingConfig(temperature=2.0),
    "shuffle_buffer": 7,
    "max_scan": 9,
    "date": "2026-07-26",
}


def test_hosts_may_have_other_names_for_the_same_files(folder, cache, make_tokenizer):
    homes = [folder, Path(shutil.copytree(folder, cache / "home"))]

    def key(peers):
        files = {code: homes[peers.number] / f"{code}.jsonl" for code in LANGUAGES}
        origins = {code: [Origin((file,))] for code, file in files.items()}
        data = options("~", cache)
        return token_cache.cache_key(data, make_tokenizer(), origins, peers)

    one, other = as_processes(2, key)
    assert one == other and len(one) == 32
    (homes[1] / "de.jsonl").write_text("{}")
    one, other = as_processes(2, key)
    assert one != other


def test_processes_that_differ_make_what_each_is_told_and_keep_nothing(
    folder, cache, make_tokenizer
):
    data = [options(folder, cache, max_held_out=most) for most in (4, 5)]
    found = as_processes(
        2, lambda peers: whole(load(data[peers.number], make_tokenizer(), peers=peers))
    )
    assert found == [uncached(one, make_tokenizer()) for one in data]
    assert not entries(cache)


def test_settings_that_cannot_matter_share_an_entry(folder, cache, tokenizer, parts):
    expected = whole(load(options(folder, cache), tokenizer))
    parts.clear()
    data = options(folder, cache, **CANNOT_MATTER)
    assert whole(load(data, tokenizer)) == expected and not parts
    assert uncached(data, tokenizer) == expected
    # Of a template, the digest has its text; streams are not kept.
    rest = {"cache", "chat_template", "streaming"}
    assert CANNOT_MATTER.keys() | rest == token_cache.CANNOT_MATTER


def test_all_settings_that_name_files_are_known():
    """What is in the files is part of the digest: whoever adds such a setting has to see to it."""
    naming = {field.name for field in dataclasses.fields(DataConfig) if "source" in field.name}
    known = {"source", "sources", "held_out_source"}
    assert naming == known, "extend jaxmoo.data.sources.source.origins_of"


def damage(file, how):
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[: -file.stat().st_size // 2])
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


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


@pytest.mark.parametrize("count", [2, 8])
def test_processes_divide_the_languages_and_have_all(count, folder, cache, make_tokenizer, parts):
    data = options(folder, cache)
    expected = uncached(data, make_tokenizer())
    for again in (False, True):
        parts.clear()
        found = as_processes(count, lambda peers: whole(load(data, make_tokenizer(), peers=peers)))
        assert found == [expected] * count
        # Each has one part to train on and one to evaluate, but for the last, which is not seen.
        assert len(parts) == (0 if again else 7)
        assert len(entries(cache)) == 1
    # What several have made is what one would have, on another number of hosts, too.
    assert whole(load(data, make_tokenizer())) == expected and not parts


@pytest.mark.parametrize("what", ["weights", "held-out files", "all trained on", "lengths"])
def test_whatever_is_made_of_sources_is_divided_and_kept(what, folder, cache, make_tokenizer):
    other = folder / "other"
    other.mkdir()
    rows = [{"prompt": f"{i % 13}!", "completion": f"r{i}", "group": None} for i in range(20)]
    lines = [json.dumps(row) for row in rows]
    for language in ("fa", "de"):
        (other / f"{language}.jsonl").write_text("\n".join(lines))
    changes = {
        "weights": {
            "source": None,
            "sources": [
                {
                    "source": f"{folder}/{{language}}.jsonl",
                    "weight": 1.0,
                    "columns": {"group": "group"},
                },
                {"source": f"{other}/{{language}}.jsonl", "weight": 3.0},
            ],
            "columns": settings("").columns,
        },
        "held-out files": {
            "held_out_source": f"{other}/{{language}}.jsonl",
            "seen": ["fa"],
            "columns": settings("").columns,
        },
        "all trained on": {"train_unevaluated": True},
        "lengths": {"lengths": LengthsConfig(max_tokens=70)},
    }[what]
    data = dataclasses.replace(options(folder, cache), **changes)
    expected = uncached(data, make_tokenizer())

    def run(peers):
        return whole(load(data, make_tokenizer(), peers=peers))

    assert as_processes(3, run) == [expected] * 3
    assert whole(load(data, make_tokenizer())) == expected
    assert len(entries(cache)) == 1
    if what in ("weights", "held-out files"):
        (other / "de.jsonl").write_text("\n".join(lines[:-1]))
        assert whole(load(data, make_tokenizer())) == uncached(data, make_tokenizer()) != expected
        assert len(entries(cache)) == 2


def test_processes_that_share_no_directory_make_all_for_themselves(
    folder, tmp_path_factory, make_tokenizer
):
    caches = [tmp_path_factory.mktemp("host") for _ in range(2)]
    expected = uncached(options(folder, caches[0]), make_tokenizer())

    def run(peers):
        data = options(folder, caches[peers.number])
        return whole(load(data, make_tokenizer(), peers=peers))

    assert as_processes(2, run) == [expected] * 2
    (entry,) = entries(caches[1])
    (caches[1] / entry / "complaints.json").unlink()  # one host has it, the other has to make it
    assert as_processes(2, run) == [expected] * 2
    assert entries(caches[0]) == entries(caches[1]) == [entry]


def test_damage_that_one_process_finds_is_known_to_all(folder, cache, make_tokenizer):
    data = options(folder, cache)
    expected = whole(load(data, make_tokenizer()))
    (entry,) = entries(cache)
    damage(cache / entry / "de.safetensors", "changed")
    said = []
    found = as_processes(
        3, lambda peers: whole(load(data, make_tokenizer(), peers=peers, say=said.append))
    )
    assert found == [expected] * 3 and sum("damaged" in line for line in said) == 3


def test_a_record_that_one_process_cannot_use_ends_all(folder, cache, make_tokenizer):
    data = options(folder, cache, max_malformed=0.0, seen=["en", "fa"], unseen=[])
    lines = [json.dumps({"prompt": f"{i}?", "completion": f"{i}"}) for i in range(30)]
    data = dataclasses.replace(data, columns=settings("").columns)
    (folder / "en.jsonl").write_text("\n".join(lines))
    (folder / "fa.jsonl").write_text("\n".join([*lines, '{"prompt": "a"}']))
    found = as_processes(2, lambda peers: load(data, make_tokenizer(), peers=peers))
    assert all(isinstance(one, DataError) for one in found)
    assert str(found[0]) == f"Process 1: {found[1]}" and "fa.jsonl:31: no column" in str(found[1])
    assert not entries(cache)


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


class Sums:
    """A source that may change unnoticed."""

    column = None

    def open(self, language):
        rows = [{"prompt": f"{n} + {n}", "completion": str(2 * n)} for n in range(30)]
        return SequenceStream("sums", rows)


def test_what_may_change_unnoticed_is_not_kept(folder, cache, tokenizer):
    load(options(folder, cache, columns={}), tokenizer, source=Sums())
    assert not entries(cache)


MADE = """
import sys
import jax
import numpy as np
from pathlib import Path
address, number, cache, folder, model, out = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(number))
from jaxmoo.config.data_section import DataConfig
from jaxmoo.data import LanguageBatches, load_corpus
from jaxmoo.data.sources.records import Origin
from jaxmoo.data.tokenization import parallel
from jaxmoo.hf import load_tokenizer
from jaxmoo.mesh import batch_sharding, local_rows, make_mesh
from jaxmoo.runtime.processes import place
made, tokenized = [], parallel.tokenized
def noted(task, tokenizer):
    made.append(task.examples[0].language)
    return tokenized(task, tokenizer)
parallel.tokenized = noted
seen = ["it", "pt", "es", "fa"]
data = DataConfig(source=folder, seen=seen, sequence_length=96, max_held_out=4, cache=cache)
corpus = load_corpus(data, load_tokenizer(Path(model)))
batches = LanguageBatches(corpus.train, seen, 2, 96, 0, packing=True)
mesh = make_mesh(4, language=2, fsdp=2)
rows = local_rows(mesh, 4, 2)
found = {"made": np.array(sorted(set(made))), "rows": rows, "tokens": batches.tokens(5, rows)}
for name, x in place(batches.batch(5, rows), batch_sharding(mesh)).items():
    for shard in x.addressable_shards:
        found[f"{name} {shard.index}"] = np.asarray(shard.data)
np.savez(out, **found)
"""


@pytest.mark.slow
def test_two_processes_read_half_each_and_hold_the_batches_of_one(
    tmp_path, cache, conversations, tiny_model
):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"

    def run(number):
        out = tmp_path / f"{number}.npz"
        arguments = ["-c", MADE, address, number, cache, conversations, tiny_model, out]
        run_python(arguments, devices=2)
        return dict(np.load(out))

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(run, range(2)))
    seen = ["it", "pt", "es", "fa"]
    data = settings(conversations, seen=seen, sequence_length=96, max_held_out=4, cache="none")
    alone = LanguageBatches(
        load(data, load_tokenizer(tiny_model)).train, seen, 2, 96, 0, packing=True
    )
    batch = alone.batch(5)
    assert [one["made"].tolist() for one in both] == [["es", "it"], ["fa", "pt"]]
    assert (both[0]["rows"] ^ both[1]["rows"]).all()
    for one in both:
        assert (one["tokens"] == alone.tokens(5)).all()
        pieces = [name for name in one if "slice" in name]
        assert len(pieces) == 2 * len(batch)
        for name in pieces:
            array, _, index = name.partition(" ")
            assert (one[name] == batch[array][eval(index)]).all()
