"""What other tokens would be made of has an entry of its own."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from data.kept import entries, load, options, uncached, whole
from jaxmoo.config.data_section import DataConfig, SamplingConfig
from jaxmoo.data import SequenceStream, token_cache

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


class Sums:
    """A source that may change unnoticed."""

    column = None

    def open(self, language):
        rows = [{"prompt": f"{n} + {n}", "completion": str(2 * n)} for n in range(30)]
        return SequenceStream("sums", rows)


def test_what_may_change_unnoticed_is_not_kept(folder, cache, tokenizer):
    load(options(folder, cache, columns={}), tokenizer, source=Sums())
    assert not entries(cache)
