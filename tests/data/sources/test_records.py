"""Records: whatever one holds, it is an example, or named and counted."""

from __future__ import annotations

import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from data.tables import GOOD, load_examples, read_examples, write
from jaxmoo.data.sources.records import Malformed
from jaxmoo.data.tokenization.tokenize import tokenize_good
from jaxmoo.errors import DataError

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
    examples, skipped, _ = reading.languages["en"]
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
