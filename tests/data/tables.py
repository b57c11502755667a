"""Small tables of two languages, and files of every kind that hold them."""

from __future__ import annotations

import csv
import json

import datasets
import pyarrow

from jaxmoo.data.example import Example

ROWS = {
    "en": [
        {"prompt": "Hello,\nyou?", "completion": 'Hi "there"'},
        {"prompt": "a", "completion": "b"},
    ],
    "fa": [{"prompt": "سلام", "completion": "خوبم"}],
}
GOOD = '{"prompt": "a", "completion": "b"}\n'  # a line


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
        datasets.Dataset.from_list(rows).to_parquet(path)
