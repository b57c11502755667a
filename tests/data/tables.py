"""Small tables of two languages, files of every kind that hold them, and how they are read."""

from __future__ import annotations

import csv
import json

import pyarrow
import pyarrow.parquet

from jaxmoo.config.data_section import ColumnsConfig, DataConfig
from jaxmoo.data import corpus
from jaxmoo.data.example import Example
from jaxmoo.data.sources import reading

ROWS = {
    "en": [
        {"prompt": "Hello,\nyou?", "completion": 'Hi "there"'},
        {"prompt": "a", "completion": "b"},
    ],
    "fa": [{"prompt": "سلام", "completion": "خوبم"}],
}
GOOD = '{"prompt": "a", "completion": "b"}\n'  # a line


def settings(source, *, columns=None, **options):
    """Settings of a source, by default of one seen language."""
    columns = ColumnsConfig(**(columns or {}))
    source = None if source is None else str(source)
    return DataConfig(**({"source": source, "seen": ["en"], "columns": columns} | options))


def load_examples(source, languages, **options):
    return reading.load_examples(settings(source, **options), languages)


def read_examples(source, languages, **options):
    return reading.read_examples(settings(source, **options), languages)


def load_corpus(source, tokenizer, say=print, **options):
    return corpus.load_corpus(settings(source, **options), tokenizer, say=say)


def expected(language):
    return [Example.from_pair(language, r["prompt"], r["completion"]) for r in ROWS[language]]


def compress(source, target):
    """Write a file again, compressed as the other's name says."""
    with pyarrow.output_stream(str(target), compression="detect") as file:
        file.write(source.read_bytes())


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
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
