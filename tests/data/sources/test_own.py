"""A source of the user's own, named in the settings by where it is imported from."""

from __future__ import annotations

import json
import re
import sys

import pytest

from data.peers import as_processes
from data.tables import load_corpus, load_examples, settings
from jaxmoo.commands.data import main
from jaxmoo.config.data_section import check_data
from jaxmoo.data import SequenceStream, corpus
from jaxmoo.data.example import Example
from jaxmoo.data.sources.source import open_source
from jaxmoo.data.streaming import Place
from jaxmoo.errors import ConfigError, DataError

MODULE = '''
import functools
import jaxmoo.data
from pathlib import Path

OPENED = []


class Counting:
    """Sums, each language's own."""

    column = None

    def __init__(self, count: int = 40, says: str = "is"):
        self.count, self.says = count, says

    def open(self, language):
        OPENED.append(language)
        if language == "nowhere":
            raise jaxmoo.data.MissingLanguageError(f"no sums in {language}")
        rows = [
            {"prompt": f"{language} {n} + {n}?", "completion": f"{self.says} {2 * n}"}
            for n in range(self.count)
        ]
        return jaxmoo.data.SequenceStream(f"sums of {language}", rows)


class Kept(Counting):
    def origin(self, language):
        return jaxmoo.data.Origin((Path(__file__).with_name("of.txt"),), f"{self.says}")


class Unsure(Counting):
    def origin(self, language):
        return None


def ten(**options):
    return Counting(10, **options)


made = Counting(5)
kept = functools.partial(Kept, 20)
number = 7


class NoColumn:
    def open(self, language):
        return iter(())


class OddColumn(Counting):
    column = 3


class OpensNothing:
    column = None

    def open(self):
        return iter(())


class Opens(Counting):
    """Opens what it is told to."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def open(self, language):
        pair = {"prompt": "a", "completion": "b"}
        return {
            "list": [("here", pair)],
            "records alone": iter([pair]),
            "no mappings": iter([("here", "a")]),
            "pairs": (("here", pair) for _ in range(3)),
        }[self.what]
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The module, in a folder where a command may have been started."""
    (tmp_path / "own_sums.py").write_text(MODULE)
    (tmp_path / "of.txt").write_text("first")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_sums", raising=False)
    yield tmp_path / "own_sums.py"
    sys.modules.pop("own_sums", None)


def changed(module, text):
    """Change the file, as between two commands."""
    module.write_text(module.read_text() + text)
    del sys.modules["own_sums"]


def test_a_class_a_function_or_a_source_itself(module):
    first = Example.from_pair("en", "en 0 + 0?", "is 0")
    for name, options, count in (
        ("Counting", {}, 40),
        ("Counting", {"count": 3}, 3),
        ("ten", {}, 10),
        ("made", {}, 5),
    ):
        found = load_examples(f"own_sums:{name}", ["en"], options=options)["en"]
        assert len(found) == count and found[0] == first
    [told] = load_examples("own_sums:ten", ["en"], options={"says": "gives"})["en"][:1]
    assert told == Example.from_pair("en", "en 0 + 0?", "gives 0")


@pytest.mark.parametrize(
    ("source", "options", "complaint"),
    [
        ("own_suns:Counting", {}, "data.source: Data source 'own_suns:Counting': there is no mod"),
        ("own_sums:Countin", {}, "own_sums has no 'Countin'. Did you mean 'Counting'"),
        ("own_sums:Counting", {"cuont": 1}, "Unknown option 'cuont'.* Did you mean 'count'"),
        ("own_sums:Opens", {}, "Data source 'own_sums:Opens': missing a required argument: 'what'"),
        ("own_sums:made", {"count": 1}, "data.options cannot change the ready-made data source"),
        ("data/{language}.jsonl", {"count": 1}, "data.options are those of a source of your own"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_settings(module, source, options, complaint):
    [problem] = check_data(settings(source, options=options))
    with pytest.raises(ConfigError, match=complaint):
        raise ConfigError(problem)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("number", "expected a source, or a function or class .* found int without column and op"),
        ("NoColumn", "found NoColumn without column"),
        ("OddColumn", "found OddColumn with column=3"),
        ("OpensNothing", "found OpensNothing whose open does not take a language alone"),
    ],
)
def test_what_is_no_source_is_refused(module, name, complaint):
    with pytest.raises(ConfigError, match=f"Data source 'own_sums:{name}': .*{complaint}"):
        open_source(settings(f"own_sums:{name}"))


@pytest.mark.parametrize(
    ("what", "streaming", "complaint"),
    [
        ("list", False, "an iterator of records that has __next__, found list without __next__"),
        ("pairs", True, "with data.streaming, found generator without position, seek"),
        ("records alone", False, "every record to be a pair .* found {'prompt': 'a'"),
        ("no mappings", False, "every record to be a pair .* found .'here', 'a'"),
    ],
)
def test_what_it_opens_is_looked_at(module, tokenizer, what, streaming, complaint):
    more = {"streaming": True, "max_held_out": 1} if streaming else {}
    with pytest.raises(ConfigError, match=complaint):
        load_corpus("own_sums:Opens", tokenizer, options={"what": what}, sequence_length=64, **more)


def test_it_may_be_one_of_several_and_hold_out_examples(module, tokenizer):
    lines = [json.dumps({"prompt": f"file {n}?", "completion": f"{n}"}) for n in range(20)]
    (module.parent / "en.jsonl").write_text("\n".join(lines))
    (module.parent / "nowhere.jsonl").write_text("\n".join(lines).replace("file", "there"))
    entries = [
        {"source": "own_sums:Counting", "options": {"count": 30}},
        {"source": str(module.parent / "{language}.jsonl")},
    ]
    held_out = {"source": "own_sums:Counting", "options": {"says": "makes"}}
    found = load_corpus(
        None,
        tokenizer,
        sources=entries,
        seen=["en", "nowhere"],
        sequence_length=64,
    )
    assert found.report["en"].records == 50 and found.report["nowhere"].records == 20
    found = load_corpus(
        "own_sums:Counting", tokenizer, held_out_source=held_out, sequence_length=64
    )
    assert found.report["en"].train == 40 and len(found.held_out["en"]) == 40
    for entry, complaint in (
        ({"source": "own_sums:ten", "options": 3}, "options must be a mapping, found 3."),
        (
            {"source": "en.jsonl", "options": {"count": 3}},
            "options are those of a source of your own, package.module:object; en.jsonl takes "
            "none.",
        ),
    ):
        assert check_data(settings(None, sources=[entry])) == [f"data.sources[0].{complaint}"]
    [problem] = check_data(settings("own_sums:ten", held_out_source="own_suns:ten"))
    assert problem.startswith("data.held_out_source.source: Data source 'own_suns:ten': there is")


def test_tokens_are_kept_under_all_that_it_names_and_its_code(module, tokenizer, tmp_path):
    cache = tmp_path / "kept"

    def load(name="Kept", **options):
        more = {"sequence_length": 64, "cache": str(cache)}
        found = load_corpus(f"own_sums:{name}", tokenizer, options=options, **more)
        assert len(found.train["en"]) > 0
        opened = len(sys.modules["own_sums"].OPENED)
        sys.modules["own_sums"].OPENED.clear()
        return opened, len(list(cache.iterdir())) if cache.exists() else 0

    assert load() == (1, 1)
    assert load() == (0, 1), "kept"
    assert load(says="makes") == (1, 2), "its options, and what it calls itself"
    assert load(count=30) == (1, 3), "its options alone"
    (tmp_path / "of.txt").write_text("second")
    assert load() == (1, 4), "a file that it names"
    changed(module, "\n# another\n")
    assert load() == (1, 5), "the file in which it is written"
    assert load() == (0, 5)
    module.write_text(module.read_text() + "\n# not what was imported\n")
    assert load() == load() == (1, 5)
    changed(module, "")
    assert load("kept") == (1, 6) and load("kept") == (0, 6), "a function of another module"
    changed(module.with_name("own_sums.py"), "kept = functools.partial(Kept, 30)\n")
    assert load("kept") == (1, 7), "the file in which it is named"
    # Those that do not say what decides their records are read every time.
    for name in ("Counting", "Unsure", "ten"):
        assert load(name) == load(name) == (1, 7)


def test_the_code_of_one_that_is_passed_in_python_counts_as_well(module, tokenizer, tmp_path):
    def load():
        import own_sums

        data = settings("sums", sequence_length=64, cache=str(tmp_path / "kept"))
        corpus.load_corpus(data, tokenizer, source=own_sums.Kept(), say=lambda _: None)
        return len(own_sums.OPENED)

    assert [load(), load()] == [1, 1]
    changed(module, "\n# another\n")
    assert load() == 1


@pytest.mark.parametrize("name", ["Kept", "Counting"])
def test_processes_read_it_together_or_each_by_itself(module, make_tokenizer, tmp_path, name):
    data = settings(
        f"own_sums:{name}", seen=["en", "fa"], sequence_length=64, cache=str(tmp_path / "kept")
    )
    found = as_processes(
        2,
        lambda peers: corpus.load_corpus(
            data, make_tokenizer(), peers=peers, say=lambda _: None
        ).train["fa"][3],
    )
    assert (found[0].tokens == found[1].tokens).all()
    opened = sorted(sys.modules["own_sums"].OPENED)
    assert opened == (["en", "fa"] if name == "Kept" else ["en", "en", "fa", "fa"])


def test_the_command_for_data_shows_it(module, write_config, capsys):
    config = write_config(
        data__source="own_sums:Counting", data__options={"count": 20}, data__unseen=[]
    )
    assert main(["--config", str(config), "--languages", "fa", "--examples", "1"]) == 0
    shown = capsys.readouterr().out
    assert "--- fa: " in shown and re.search(r"fa \d+ \+ \d+\?", shown)
    assert main(["--config", str(config), "data.options.cuont=3"]) == 2
    assert "Did you mean 'count'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "complaint"),
    [
        ("origin", "expected origin.'en'. to return a jaxmoo.data.Origin .* found 'a.txt'"),
        ("position", "expected position.. to return what JSON holds .* found b'here'"),
    ],
)
def test_what_it_tells_is_looked_at(module, tokenizer, tmp_path, monkeypatch, method, complaint):
    import own_sums

    if method == "origin":
        monkeypatch.setattr(own_sums.Kept, "origin", lambda self, language: "a.txt")
        more = {"cache": str(tmp_path / "kept")}
    else:
        monkeypatch.setattr(SequenceStream, "position", lambda self: b"here")
        more = {"streaming": True, "max_held_out": 1, "shuffle_buffer": 8}
    with pytest.raises(ConfigError, match=complaint):
        found = load_corpus("own_sums:Kept", tokenizer, sequence_length=64, **more)
        found.train["en"].read(Place())


def test_a_stream_is_not_made_of_what_can_be_read_once():
    with pytest.raises(ConfigError, match=r"that can be gone through again, .* found generator"):
        SequenceStream("sums", ({"prompt": str(n), "completion": ""} for n in range(3)))


def test_an_error_of_its_own_names_it(module, tokenizer):
    with pytest.raises(DataError, match="no sums in nowhere"):
        load_corpus("own_sums:Counting", tokenizer, seen=["nowhere"], sequence_length=64)
