"""Sources: the same examples from every kind of file, and errors that name file and line."""

from __future__ import annotations

import csv
import gzip
import json
import random
import tracemalloc

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from jaxmoo.data import stream_corpus
from jaxmoo.data.example import Example
from jaxmoo.data.files import LONGEST_LINE, read_records
from jaxmoo.data.malformed import Malformed
from jaxmoo.data.sources import hub_records, load_examples, read_examples
from jaxmoo.data.tokenize import tokenize_good
from jaxmoo.errors import ConfigError, DataError

STRICT = Malformed("all", 0.0)
ROWS = {
    "en": [
        {"prompt": "Hello,\nyou?", "completion": 'Hi "there"'},
        {"prompt": "a", "completion": "b"},
    ],
    "fa": [{"prompt": "سلام", "completion": "خوبم"}],
}


def expected(language):
    return [Example.from_pair(language, r["prompt"], r["completion"]) for r in ROWS[language]]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), "utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)


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
    examples, skipped = read_examples(str(tmp_path), ["en"]).languages["en"]
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


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("en.jsonl", GOOD + "{'prompt': 1}", r"en\.jsonl:2: expected one JSON object per line"),
        ("en.jsonl", GOOD + "\n[1]", r"en\.jsonl:3: expected a JSON object, found list"),
        ("en.jsonl", GOOD + '{"prompt": "a"}', r"en\.jsonl:2: no column 'completion'"),
        (
            "en.jsonl",
            '{"prompt": "a", "completions": "b"}',
            r"en\.jsonl:1: no column 'completion'.*Columns: prompt, completions\. Did you mean "
            "'completions'",
        ),
        (
            "en.jsonl",
            '{"prompt": "a", "completion": null}',
            r"en\.jsonl:1: message 1 \(assistant\): expected text, found NoneType",
        ),
        ("en.jsonl", '{"messages": []}', r"en\.jsonl:1: expected at least one message"),
        ("en.jsonl", GOOD.encode() + b'{"prompt": "\xff"}', r"en\.jsonl:2: not UTF-8 text"),
        ("en.jsonl", "", "language 'en' has no examples"),
        ("en.json", GOOD + GOOD, r"en\.json:2: invalid JSON \(Extra data\). Is it JSON Lines"),
        ("en.json", '{"data": []}', r"en\.json: expected a JSON list of objects, found dict"),
        ("en.json", "[1]", r"en\.json: record 1: expected a JSON object, found int"),
        (
            "en.csv",
            "prompt,completion\na,b\nc\n",
            r"en\.csv:3: expected 2 fields as in the header, found 1",
        ),
        ("en.csv", "prompt,completion\na,b,c\n", r"en\.csv:2: expected 2 fields"),
        ("en.csv", 'prompt,completion\na,"b\n', r"en\.csv:2: invalid CSV"),
        ("en.csv", "prompt,prompt\na,b\n", r"en\.csv:1: several columns are named 'prompt'"),
        ("en.csv", b"prompt,completion\na,b\nc,\xff\n", r"en\.csv:3: not UTF-8 text"),
        ("en.json", b'[{"prompt": 1},\n"\xff"]', r"en\.json:2: not UTF-8 text"),
        ("en.parquet", "PAR1 but not really", r"en\.parquet: not a readable Parquet file"),
    ],
)
def test_malformed_files_are_named_with_the_line(name, content, complaint, tmp_path):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=complaint):
        load_examples(str(tmp_path), ["en"])


NESTED, NUMBER = "[" * 100_000, "9" * 5000
PAIR = '{"prompt": "a", "completion": "b", %s}\n'
HALF = '"\\ud83d"'


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (NESTED, "found lists or objects nested too deep"),
        (PAIR % f'"x": {NESTED}', "found lists or objects nested too deep"),
        (PAIR % f'"x": {NUMBER}', "found a number of thousands of digits"),
        (f'{{"prompt": "a", "completion": {HALF}}}', "text is not valid Unicode"),
        (f'{{{HALF}: "a"}}', r"no column 'prompt'.* Columns: id, \\ud83d\."),
        ('{"prompt": "a", "completion": NaN}', "expected text, found float nan"),
        ('{"prompt": "a", "completion": -Infinity}', "expected text, found float -inf"),
        ('{"prompt": "a", "completion": 4}', r"expected text, found int 4\. Write numbers in quo"),
        ('{"prompt": "a", "completion": "b", "id": NaN}', "group: expected a text or a whole"),
        (f'{{"prompt": "a", "completion": "b", "id": {HALF}}}', "group: text is not valid"),
        ('{"prompt": "a", "completion": "b", "id": [7]}', r"group: .* found list \[7\]"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', r"message 0: .* role of .*\['user'"),
        (f'{{"messages": [{{"role": {HALF}, "content": "a"}}]}}', r"message 0: expected a role of"),
        ('{"messages": [{"role": "user", "content": null}]}', r"message 0 \(user\): expected text"),
        ('{"messages": {"role": "user"}}', "expected a list of messages, found dict"),
        ('{"messages": [], "tools": 7}', r"tools: expected a list of objects, found 7"),
        ('{"messages": [], "tools": "{"}', "invalid JSON"),
    ],
    ids=lambda text: text[:48],
)
def test_whatever_a_record_holds_it_is_named_and_counted(line, complaint, tmp_path):
    line = line.rstrip("\n")
    if line.startswith("{") and '"id"' not in line:
        line = '{"id": 1, ' + line[1:]
    (tmp_path / "en.jsonl").write_text(GOOD.replace("{", '{"id": 1, ', 1) + line + "\n")
    columns = {"group": "id"}
    reading = read_examples(str(tmp_path), ["en"], columns=columns, max_malformed=0.5)
    assert len(reading.languages["en"].examples) == 1
    (said,) = reading.complaints
    assert said.startswith(f"{tmp_path}/en.jsonl:2: ") and len(said) < 700
    assert said.isprintable() and said.encode()
    with pytest.raises(DataError, match=complaint):
        read_examples(str(tmp_path), ["en"], columns=columns)


ODD = ["null", "NaN", "-1e999", "0.5", NUMBER, NESTED, HALF, "true", "[]", "{}", "[null]", '""']
ODD += ['" "', r'"\ufdd0"', r'"\u001b[2J"', '"<|im_end|>"', '[{"type": "text", "text": "a"}]']
ODD += ['[{"type": "image"}]', '[[["a"]]]', '{"role": "user"}', '"سلام"', "'a'", '"a', "\xff"]


def odd_records(seed, count):
    """Lines of JSON, most of which are no record."""
    draw = random.Random(seed)

    def value(depth=0):
        kind = draw.random()
        if kind < 0.5:
            return '"a"'
        if kind < 0.8 or depth > 3:
            return draw.choice(ODD)
        if kind < 0.9:
            return "[" + ", ".join(value(depth + 1) for _ in range(draw.randrange(4))) + "]"
        return record(*draw.sample(["role", "content", "text", "name"], 2), depth=depth + 1)

    def record(*keys, depth=0):
        return "{" + ", ".join(f'"{key}": {value(depth)}' for key in keys) + "}"

    def message(role):
        more = draw.choice(["", "", f', "tool_calls": {value()}', f', "name": {value()}'])
        return f'{{"role": {draw.choice([role, role, value()])}, "content": {value()}{more}}}'

    def conversation():
        messages = ", ".join(map(message, ['"user"', '"assistant"'] * draw.randrange(3)))
        return f'{{"messages": [{messages}], "id": {value()}}}'

    made = [lambda: record("prompt", "completion", "id"), lambda: record("text", "id")]
    return [draw.choice([*made, conversation, value])() for _ in range(count)]


def test_whatever_a_line_holds_it_is_an_example_or_a_complaint(tmp_path, tokenizer):
    lines = odd_records(seed=0, count=600)
    content = "\n".join(lines).encode().replace("\xff".encode(), b"\xff")
    (tmp_path / "en.jsonl").write_bytes(content)
    reading = read_examples(str(tmp_path), ["en"], columns={"group": "id"}, max_malformed=0.99)
    examples, skipped = reading.languages["en"]
    assert len(examples) + skipped == len(lines) and 50 < len(examples) < 200
    malformed = Malformed("all", 0.99)
    good, tokens = tokenize_good(examples, tokenizer, 64, malformed)
    assert len(good) == len(tokens) == len(examples) - len(malformed.complaints) < len(examples)
    for said in reading.complaints + malformed.complaints:
        assert said.startswith(f"{tmp_path}/en.jsonl:") and len(said) < 900
        assert said.encode() and said.isprintable()


@pytest.mark.parametrize("value", ["null", "7", "NaN", "true", '"\\ud83d"', "[1]"])
def test_only_texts_and_whole_numbers_name_a_language(value, tmp_path):
    row = '{"prompt": "a", "completion": "b", "lang": %s}\n'
    (tmp_path / "all.jsonl").write_text(row % '"en"' + row % value)
    options = {"language_column": "lang", "max_malformed": 0.5}
    reading = read_examples(str(tmp_path / "all.jsonl"), ["en"], **options)
    assert len(reading.complaints) == (value != "7")
    with pytest.raises(DataError, match=r"no language 'fr'\. Available: .*en\."):
        read_examples(str(tmp_path / "all.jsonl"), ["fr"], **options)


def test_a_group_is_the_same_in_every_kind_of_file(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "id": 7}, {"prompt": "c", "completion": "d"}]
    rows[1]["id"] = None
    write(tmp_path / "en.jsonl", rows)
    write(tmp_path / "fa.csv", rows)
    pyarrow.parquet.write_table(
        pyarrow.table([["a", "c"], ["b", "d"], [7.0, None]], ["prompt", "completion", "id"]),
        tmp_path / "de.parquet",
    )
    (tmp_path / "fr.csv").write_text("prompt,completion,id\na,b,7.0\nc,d,\n")
    loaded = load_examples(str(tmp_path), ["en", "fa", "de", "fr"], columns={"group": "id"})
    assert [[e.group for e in examples] for examples in loaded.values()] == [["7", None]] * 4


def test_tools_of_a_conversation_are_read_as_a_list_or_as_json(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tools = [{"name": "weather"}]
    write(tmp_path / "en.jsonl", [{"messages": messages, "tools": tools}])
    write(tmp_path / "fa.jsonl", [{"messages": messages, "tools": json.dumps(tools)}])
    write(tmp_path / "de.jsonl", [{"messages": messages, "tools": None}])
    loaded = load_examples(str(tmp_path), ["en", "fa", "de"])
    assert [examples[0].tools for examples in loaded.values()] == [*[tuple(tools)] * 2, ()]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_compressed_files_are_read_as_they_are(suffix, compression, tmp_path):
    for language, rows in ROWS.items():
        plain = tmp_path / "plain" / f"{language}{suffix}"
        write(plain, rows)
        compress(plain, tmp_path / f"{language}{suffix}{compression}")
    wanted = {language: expected(language) for language in ROWS}
    assert load_examples(str(tmp_path), ["en", "fa"]) == wanted
    source = f"{tmp_path}/{{language}}{suffix}{compression}"
    assert load_examples(source, ["en", "fa"]) == wanted
    assert wanted["en"][0] == load_examples(source, ["en"])["en"][0]
    place = next(read_records(tmp_path / f"en{suffix}{compression}"))[0]
    assert place.startswith(f"{tmp_path}/en{suffix}{compression}:")


@pytest.mark.parametrize("damage", ["cut", "never compressed"])
@pytest.mark.parametrize("name", ["en.jsonl.gz", "en.json.gz", "en.csv.zst", "en.jsonl.zst"])
def test_a_damaged_compressed_file_is_named(name, damage, tmp_path):
    rows = [{"prompt": f"a{i}", "completion": str(hash(i * i))} for i in range(5000)]
    plain = tmp_path / "plain" / name.rsplit(".", 1)[0]
    write(plain, rows)
    file = tmp_path / name
    compress(plain, file)
    content = bytearray(file.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content = plain.read_bytes()
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: damaged"):
        load_examples(str(tmp_path), ["en"])


def compress(source, target):
    if target.suffix == ".gz":
        target.write_bytes(gzip.compress(source.read_bytes()))
    else:
        with pyarrow.output_stream(str(target), compression="zstd") as file:
            file.write(source.read_bytes())


def test_a_line_that_no_memory_should_hold_is_passed_over(tmp_path):
    with (tmp_path / "en.jsonl").open("wb") as file:
        file.write(GOOD.encode())
        file.truncate(3 * LONGEST_LINE)  # holes, read as zeros
        file.seek(0, 2)
        file.write(b"\n" + GOOD.encode())
    tracemalloc.start()
    reading = read_examples(str(tmp_path), ["en"], max_malformed=0.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(reading.languages["en"].examples) == 2
    assert "en.jsonl:2: a line of more than 67,108,864 bytes" in reading.complaints[0]
    assert peak < 2.5 * LONGEST_LINE


def test_bytes_that_are_no_text_spoil_their_record_only(tmp_path):
    bad = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": bad, "completion": ["b", "b", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "en.parquet")
    (tmp_path / "fa.csv").write_bytes(b"prompt,completion\na,b\n\xff,b\nc,b\n")
    reading = read_examples(str(tmp_path), ["en", "fa"], max_malformed=0.4)
    for language, place in (("en", "en.parquet: row 2"), ("fa", "fa.csv:3")):
        assert [e.prompt for e in reading.languages[language].examples] == ["a", "c"]
        assert any(f"{place}: not UTF-8 text" in complaint for complaint in reading.complaints)


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_parquet_is_named(streaming, tmp_path, tokenizer):
    file = tmp_path / "en.parquet"
    write(file, [{"prompt": f"a{i}", "completion": "b" * i} for i in range(300)])
    content = file.read_bytes()
    page = content[:60] + bytes(90) + content[150:]
    for damaged in [page] if streaming else [page, content[:-9]]:
        file.write_bytes(damaged)
        with pytest.raises(
            DataError, match=r"en\.parquet: (not a readable Parq|cannot be read on)"
        ):
            if streaming:
                stream_corpus(
                    str(tmp_path), tokenizer, seen=["en"], sequence_length=64, max_held_out=300
                )
            else:
                load_examples(str(tmp_path), ["en"])


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "en.csv").write_bytes(b"\xef\xbb\xbfprompt,completion\r\na,b\r\n")
    assert load_examples(str(tmp_path), ["en"])["en"] == expected("en")[1:]


def test_long_csv_fields_are_read(tmp_path):
    write(tmp_path / "en.csv", [{"prompt": "x " * 100_000, "completion": "y"}])
    assert len(next(read_records(tmp_path / "en.csv"))[1]["prompt"]) == 200_000


def test_a_missing_language_names_the_nearest(tmp_path):
    for language in ("en", "ja", "pt"):
        write(tmp_path / f"{language}.jsonl", ROWS["en"])
    for source in (str(tmp_path), str(tmp_path / "{language}.jsonl")):
        with pytest.raises(DataError, match=r"no language 'jp'. Available: en, ja, pt. .*'ja'"):
            load_examples(source, ["en", "jp"])
    with pytest.raises(DataError, match=r"chatterbot.*no language 'jp'.*Did you mean 'ja'"):
        load_examples("chatterbot", ["en", "jp"])


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
        ({"columns": {"promt": "q"}}, "Unknown key 'promt'.*Did you mean 'prompt'"),
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
    def texts(subset=None, split="train", column=None):
        names = {"fa": "fa", "en": "en"}
        found = hub_records(hub_dataset, names, subset, split, column, STRICT)
        return {
            language: [{key: values[key] for key in ("prompt", "completion")} for _, values in rows]
            for language, rows in found.items()
        }

    assert texts() == texts(subset="{language}") == texts("all", column="lang") == ROWS
    assert texts(split="test") == {language: rows[:1] for language, rows in ROWS.items()}


def test_hub_datasets_without_the_language_say_what_there_is(hub_dataset):
    with pytest.raises(DataError, match=r"no language 'fr'. Available: all, en, fa"):
        hub_records(hub_dataset, {"fr": "fr"}, None, "train", None, STRICT)
    with pytest.raises(DataError, match=r"no language 'fr'. Available: en, fa"):
        hub_records(hub_dataset, {"fr": "fr"}, "all", "train", "lang", STRICT)
    rows = hub_records(hub_dataset, {"en": "en"}, None, "validation", None, STRICT)["en"]
    with pytest.raises(DataError, match=r"Cannot load.*validation"):
        list(rows)
