"""Sources: the same examples from every kind of file, and errors that name file and line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys

import pytest

from data.tables import ROWS, expected, load_examples, read_examples, settings, write
from devices import ROOT
from jaxmoo.config import ColumnsConfig, Config, ModelConfig
from jaxmoo.data import LanguageBatches, SequenceStream, load_corpus, load_data
from jaxmoo.data.example import Example
from jaxmoo.data.sources import reading as readings
from jaxmoo.data.sources.source import HubSource
from jaxmoo.errors import ConfigError, DataError
from small_runs import SIZES


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("layout", ["{language}", "{language}/part-{language}", "train.{language}"])
def test_one_file_per_language(suffix, layout, tmp_path):
    pattern = str(tmp_path / (layout + suffix))
    for language, rows in ROWS.items():
        write(tmp_path / (layout.replace("{language}", language) + suffix), rows)
    loaded = load_examples(pattern, ["fa", "en"])
    assert list(loaded) == ["fa", "en"]
    assert loaded == {language: expected(language) for language in ("fa", "en")}


def test_a_directory_of_files_named_by_language(tmp_path):
    write(tmp_path / "en.jsonl", ROWS["en"])
    write(tmp_path / "fa.csv", ROWS["fa"])
    (tmp_path / "README.md").write_text("not data")
    assert load_examples(str(tmp_path), ["en", "fa"]) == {
        language: expected(language) for language in ROWS
    }


def test_two_files_of_one_language_are_ambiguous(tmp_path):
    write(tmp_path / "en.jsonl", ROWS["en"])
    write(tmp_path / "en.csv", ROWS["en"])
    with pytest.raises(DataError, match=r"several files for language 'en': en\.csv, en\.jsonl"):
        load_examples(str(tmp_path), ["en"])


def test_one_file_with_a_column_of_languages(tmp_path):
    file = tmp_path / "all.jsonl"
    write(file, [row | {"lang": language} for language, rows in ROWS.items() for row in rows])
    assert load_examples(str(file), ["fa"], language_column="lang") == {"fa": expected("fa")}
    with pytest.raises(DataError, match=r"no language 'fr'. Available: en, fa"):
        load_examples(str(file), ["fr"], language_column="lang")
    with pytest.raises(DataError, match=r"all.jsonl:1: no column 'long'.*Did you mean 'lang'"):
        load_examples(str(file), ["fa"], language_column="long")
    with pytest.raises(ConfigError, match="which column names the language"):
        load_examples(str(file), ["fa"])


def test_codes_translate_the_sources_names(tmp_path):
    write(tmp_path / "pes_Arab.jsonl", ROWS["fa"])
    assert load_examples(str(tmp_path), ["fa"], codes={"fa": "pes_Arab"}) == {"fa": expected("fa")}


def test_columns_are_mapped(tmp_path):
    rows = [{"id": 7, "question": "2+2", "answer": "4", "prompt": "no", "messages": "no"}]
    write(tmp_path / "en.jsonl", rows)
    columns = {"prompt": "question", "completion": "answer", "group": "id", "messages": None}
    loaded = load_examples(str(tmp_path), ["en"], columns=columns)
    assert loaded == {"en": [Example.from_pair("en", "2+2", "4", group="7")]}


@pytest.mark.parametrize("columns", [None, {"messages": "chat"}])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_conversations_in_messages(columns, suffix, tmp_path):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    write(tmp_path / f"en{suffix}", [{columns["messages"] if columns else "messages": messages}])
    assert load_examples(str(tmp_path), ["en"], columns=columns) == {
        "en": [Example.from_messages("en", messages)]
    }


def test_duplicates_are_dropped_when_loading_and_kept_when_reading(tmp_path):
    write(tmp_path / "en.jsonl", [*ROWS["en"], {"prompt": " a ", "completion": "b\n"}])
    assert load_examples(str(tmp_path), ["en"]) == {"en": expected("en")}
    examples, skipped, _ = read_examples(str(tmp_path), ["en"]).languages["en"]
    assert (len(examples), skipped) == (3, 0)


@pytest.mark.parametrize("columns", [None, {"text": "text"}])
def test_plain_text(columns, tmp_path):
    write(tmp_path / "en.jsonl", [{"text": " Once upon a time. ", "url": "x"}])
    loaded = load_examples(str(tmp_path), ["en"], columns=columns)
    assert loaded == {"en": [Example.from_text("en", " Once upon a time. ")]}
    # Beside a mapped column, or a prompt, text is a column like any other.
    with pytest.raises(DataError, match="no column 'prompt'"):
        load_examples(str(tmp_path), ["en"], columns={"completion": "url"})


def test_malformed_records_are_counted_up_to_a_share(tmp_path):
    lines = [json.dumps({"prompt": f"a{i}", "completion": "b"}) for i in range(8)]
    lines[3:3] = ["{broken", '{"prompt": 1}']
    (tmp_path / "en.jsonl").write_text("\n".join(lines))
    reading = read_examples(str(tmp_path), ["en"], max_malformed=0.2)
    assert len(reading.languages["en"].examples) == 8 and reading.languages["en"].skipped == 2
    assert [complaint.split(": ")[0] for complaint in reading.complaints] == [
        f"{tmp_path}/en.jsonl:{line}" for line in (4, 5)
    ]
    with pytest.raises(DataError, match=r"en\.jsonl:4: .*\n.* 2 of the 10 records of lang"):
        read_examples(str(tmp_path), ["en"], max_malformed=0.19)


def test_records_of_no_language_count_against_the_table(tmp_path):
    rows = [{"lang": "en", "prompt": f"a{i}", "completion": "b"} for i in range(8)]
    write(tmp_path / "all.jsonl", [*rows, {"prompt": "a", "completion": "b"}])
    with (tmp_path / "all.jsonl").open("a") as file:
        file.write("\n[]")
    options = {"language_column": "lang"}
    reading = read_examples(str(tmp_path / "all.jsonl"), ["en"], max_malformed=0.2, **options)
    assert reading.languages["en"].skipped == 0 and len(reading.complaints) == 2
    with pytest.raises(DataError, match=r"all\.jsonl:9: no column 'lang'.*\n.* 2 of the 10 rec"):
        read_examples(str(tmp_path / "all.jsonl"), ["en"], max_malformed=0.1, **options)


def test_a_missing_language_names_the_nearest(tmp_path):
    for language in ("eng_Latn", "jpn_Jpan"):
        write(tmp_path / f"{language}.jsonl", ROWS["en"])
    for source in (str(tmp_path), str(tmp_path / "{language}.jsonl")):
        with pytest.raises(
            DataError, match=r"no language 'eng_Latm'\. Available: eng_Latn, jpn_J.*'eng_Latn'\?"
        ):
            load_examples(source, ["eng_Latm"])
    with pytest.raises(DataError, match=r"chatterbot.*'hi_Latn'\. Avail.*Did you mean 'hi-Latn'"):
        load_examples("chatterbot", ["hi_Latn"])


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("chaterbot", "Unknown data source 'chaterbot'. Did you mean 'chatterbot'"),
        ("no/such/place/here", "No file or directory 'no/such/place/here'"),
        ("nowhere/en.jsonl", "No file or directory"),
        ("nowhere/{language}.txt", "ending in .jsonl, .json, .parquet, .csv, found '.txt'"),
        ("nowhere/{language}.parquet.gz", "ending in .jsonl, .json, .parquet, .csv, found '.gz'"),
        ("nowhere/{language}.jsonl", "no language 'en'. Available: none"),
    ],
)
def test_unknown_sources_are_refused(source, complaint):
    with pytest.raises(DataError, match=complaint):
        load_examples(source, ["en"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"languages": []}, "Expected a list of language codes"),
        ({"languages": "en"}, "Expected a list of language codes, found 'en'"),
        ({"languages": ["en", "fa", "en"]}, "named more than once: en"),
        ({"columns": {"messages": "m", "prompt": "q"}}, "not both messages and prompt"),
        ({"columns": {"text": "t", "completion": "q"}}, "not both prompt and completion and text"),
    ],
)
def test_contradictory_arguments_are_refused(arguments, complaint, tmp_path):
    with pytest.raises(ConfigError, match=complaint):
        load_examples(str(tmp_path), **({"languages": ["en"]} | arguments))


@pytest.fixture
def hub_dataset(tmp_path):
    """A dataset laid out as on the hub: a subset per language, and one of all languages."""
    folder = tmp_path / "dataset"
    everything = []
    for language, rows in ROWS.items():
        write(folder / language / "train.jsonl", rows)
        write(folder / language / "test.jsonl", rows[:1])
        everything += [row | {"lang": language} for row in rows]
    write(folder / "all" / "train.jsonl", everything)
    subsets = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train.jsonl\n"
        + (f"  - split: test\n    path: {name}/test.jsonl\n" if name != "all" else "")
        for name in ("en", "fa", "all")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{subsets}---\n")
    return str(folder)


def test_hub_datasets_with_a_subset_per_language(hub_dataset):
    def records(**options):
        source = HubSource(hub_dataset, settings(hub_dataset, **options))
        return {
            language: [
                {key: values[key] for key in ("prompt", "completion")}
                for _, values in source.open(language)
            ]
            for language in ROWS
        }

    assert records() == records(subset="{language}") == ROWS
    assert records(split="test") == {language: rows[:1] for language, rows in ROWS.items()}
    everything = [row for rows in ROWS.values() for row in rows]
    assert records(subset="all", language_column="lang") == dict.fromkeys(ROWS, everything)
    options = {"subset": "all", "language_column": "lang"}
    source = HubSource(hub_dataset, settings(hub_dataset, **options))
    reading = readings.read_examples(settings(hub_dataset, **options), ["fa", "en"], source=source)
    assert {language: found.examples for language, found in reading.languages.items()} == {
        language: expected(language) for language in ROWS
    }


def test_hub_datasets_without_the_language_say_what_there_is(hub_dataset):
    with pytest.raises(DataError, match=r"no language 'fr'. Available: all, en, fa"):
        HubSource(hub_dataset, settings(hub_dataset)).open("fr")
    data = settings(hub_dataset, subset="all", language_column="lang")
    with pytest.raises(DataError, match=r"no language 'fr'. Available: en, fa"):
        readings.read_examples(data, ["fr"], source=HubSource(hub_dataset, data))
    with pytest.raises(DataError, match=r"Cannot load.*validation"):
        HubSource(hub_dataset, settings(hub_dataset, split="validation")).open("en")


@pytest.fixture
def page(tokenizer, tmp_path, monkeypatch):
    """What the code of docs/data.md makes, run as it stands there, and prints what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_sources", raising=False)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(SIZES | {"vocab_size": 300}))
    data = settings("sums", sequence_length=64)
    found = {"config": Config(model=ModelConfig(source=str(tmp_path / "model")), data=data)}
    text = (ROOT / "docs" / "data.md").read_text()
    for code, shown in re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", text, re.S):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, found)
        assert not shown or printed.getvalue() == shown
    return found


def test_a_source_of_ones_own_is_read_like_any_other(page, tokenizer):
    sums = page["Sums"]()
    assert page["data"].batches.batch(0)["tokens"].shape == (1, 4, 64)

    data = settings("sums", seen=["en", "fa"], sequence_length=64, held_out=0.3)
    wrong = dataclasses.replace(data, columns=ColumnsConfig(prompt="q", completion="a"))
    with pytest.raises(DataError, match="sums of en: row 1: no column 'q'"):
        load_corpus(wrong, tokenizer, source=sums)
    corpus = load_corpus(data, tokenizer, source=sums)
    assert corpus.report["fa"].records == 100 and len(corpus.train) == 2
    found = readings.load_examples(data, ["fa"], source=sums)["fa"]
    assert found[2] == Example.from_pair("fa", "fa: 2 + 2 = ?", "4")


def test_a_source_of_ones_own_is_named_by_its_class(tokenizer):
    class Sums:
        def __init__(self, column):
            self.column = column

        def open(self, language):
            return SequenceStream("sums", [] if self.column is None else [{"lang": "it"}])

    data = settings("chatterbot", sequence_length=64)
    with pytest.raises(DataError, match=r"^Sums: language 'en' has no examples"):
        load_corpus(data, tokenizer, source=Sums(None))
    with pytest.raises(DataError, match=r"^Sums has no language 'en'\. Available: it"):
        load_corpus(data, tokenizer, source=Sums("lang"))


def test_a_stream_of_ones_own_is_resumed_like_any_other(page, tokenizer):
    class EndlessSums:
        column = None

        def open(self, language):
            return page["SumStream"](language)

    data = settings("sums", seen=["en", "fa"], sequence_length=64, held_out=0.3)
    data = dataclasses.replace(data, streaming=True, max_held_out=2, shuffle_buffer=8)

    def batches():
        corpus = load_corpus(data, tokenizer, source=EndlessSums())
        return LanguageBatches(corpus.train, ["en", "fa"], 2, 64, 0)

    first, second = batches(), batches()
    second.seek(json.loads(json.dumps(first.state(30))))
    assert (second.batch(30)["tokens"] == first.batch(30)["tokens"]).all()


def test_load_data_takes_a_source_of_ones_own(page, tmp_path):
    said = []
    loaded = load_data(page["config"], tmp_path / "model", said.append, source=page["Sums"]())
    assert loaded.batches.batch(0)["tokens"].shape == (1, 4, 64)
    assert "| en " in said[0] and loaded.date is None
