"""Processes divide the work of making an entry, and all have what one would make."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data.kept import LANGUAGES, damage, entries, load, options, uncached, whole
from data.peers import as_processes
from data.tables import settings
from devices import run_python
from jaxmoo.config.data_section import LengthsConfig
from jaxmoo.data import LanguageBatches, token_cache
from jaxmoo.data.sources.records import Origin
from jaxmoo.errors import DataError
from jaxmoo.hf import load_tokenizer


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
