"""Files: whatever is wrong with one is named by its line, and as little as can be is lost."""

from __future__ import annotations

import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from data.tables import (
    GOOD,
    ROWS,
    compress,
    expected,
    load_corpus,
    load_examples,
    read_examples,
    write,
)
from jaxmoo.data.sources.files import LONGEST_LINE, open_file
from jaxmoo.errors import DataError


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
    place = next(open_file(tmp_path / f"en{suffix}{compression}"))[0]
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
                load_corpus(tmp_path, tokenizer, streaming=True, max_held_out=300)
            else:
                load_examples(str(tmp_path), ["en"])


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "en.csv").write_bytes(b"\xef\xbb\xbfprompt,completion\r\na,b\r\n")
    assert load_examples(str(tmp_path), ["en"])["en"] == expected("en")[1:]


def test_long_csv_fields_are_read(tmp_path):
    write(tmp_path / "en.csv", [{"prompt": "x " * 100_000, "completion": "y"}])
    assert len(next(open_file(tmp_path / "en.csv"))[1]["prompt"]) == 200_000
