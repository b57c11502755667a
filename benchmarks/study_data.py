"""Makes the files of the studies' data (docs/study.md) out of checkouts of where they come from.

    git clone --depth 1 https://github.com/tldr-pages/tldr
    python benchmarks/study_data.py tldr tldr data/tldr
    git clone --depth 1 https://github.com/dadelani/sib-200
    python benchmarks/study_data.py sib200 sib-200 data/sib200

Of tldr-pages (CC BY 4.0) every example of every page becomes a record: in the prompt the language
and the command, in the reply the explanation. Of SIB-200 (CC BY-SA 4.0) the sentences for training
and development are put together, and `fin_wrong` is Finnish with the topics in random order.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

LANGUAGES = {
    "en": "English", "ko": "Korean", "es": "Spanish", "zh": "Chinese", "it": "Italian",
    "pt_BR": "Portuguese", "ru": "Russian", "de": "German", "tr": "Turkish", "hi": "Hindi",
    "ja": "Japanese", "bn": "Bengali", "ta": "Tamil", "fr": "French", "id": "Indonesian",
}  # fmt: skip
_EXAMPLE = re.compile(r"^- (?P<task>.+?):?[ \t]*\n+`(?P<command>[^\n]+)`[ \t]*$", re.MULTILINE)


def tldr(checkout: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Per language its records: ``page``, ``prompt``, ``task``."""
    for code, name in LANGUAGES.items():
        pages = checkout / ("pages" if code == "en" else f"pages.{code}")
        yield (
            code.partition("_")[0],
            [
                {
                    "page": str(file.relative_to(pages).with_suffix("")),
                    "prompt": f"Explain in {name}: {example['command']}",
                    "task": example["task"],
                }
                for file in sorted(pages.glob("*/*.md"))
                for example in _EXAMPLE.finditer(file.read_text("utf-8"))
            ],
        )


def sib200(checkout: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Per language its records: ``id``, ``text``, ``category``; and Finnish with wrong topics."""
    for directory in sorted((checkout / "data" / "annotated").iterdir()):
        rows = []
        for part in ("train", "dev"):
            with (directory / f"{part}.tsv").open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                    text = {"text": row["text"], "category": row["category"]}
                    rows.append({"id": f"{part}-{row['index_id']}", **text})
        yield directory.name, rows
        if directory.name == "fin_Latn":
            topics = [row["category"] for row in rows]
            random.Random(0).shuffle(topics)
            yield (
                "fin_wrong",
                [row | {"category": topic} for row, topic in zip(rows, topics, strict=True)],
            )


def write(languages: Iterable[tuple[str, list[dict[str, str]]]], out: Path) -> None:
    """Write a file per language."""
    out.mkdir(parents=True, exist_ok=True)
    for code, rows in languages:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{code}.jsonl").write_text(text, "utf-8")
        print(f"{code}: {len(rows):,} records")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("tldr", "sib200"))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    make = {"tldr": tldr, "sib200": sib200}[options.what]
    write(make(options.checkout), options.out)


if __name__ == "__main__":
    main()
