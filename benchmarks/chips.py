"""What conflict resolution costs on chips that need not be here, counted by their own compilers.

    python benchmarks/chips.py --json docs/benchmarks/chips.json
    python benchmarks/chips.py --chips h100:8 --models Qwen3-8B --aggregators mgda --blocks leaf

Without names, the rows of the table in docs/benchmarks/chips.md; with names, all combinations. Each
step is compiled in a process of its own for the chip named (`pip install 'jaxmoo[plan-gpu]'` or
`[plan-tpu]`, in environments of their own) and stands beside ordinary fine-tuning of the same
tokens. Rows are kept as they are measured, and those of the file that are there already are not
measured again, so that two environments fill one file: `benchmarks/chips.sh` does that.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from common import Pages, environment, gigabytes, markdown, ratio

LANGUAGES = 8
AGGREGATORS = ("mean", "mgda", "cagrad", "pcgrad", "upgrad")
BLOCKS = ("layer", "module", "leaf")


class Row(NamedTuple):
    """One step: what it is compiled for, and how gradients become one."""

    chip: str
    model: str
    length: int  # tokens of a row
    rows: int  # per language
    method: str  # "plain" for ordinary fine-tuning
    blocks: str
    gram: str = "exact"

    @classmethod
    def of(cls, found: dict[str, Any]) -> Row:
        """The step that a record is about."""
        return cls(**{name: found[name] for name in cls._fields if name in found})

    @property
    def beside(self) -> Row:
        """The step that it is compared with."""
        return self._replace(method="plain", blocks="layer", gram="exact")


def table() -> Iterator[Row]:
    """The rows of the documentation: a few of each, since a step takes a minute or more."""
    one = Row("h100:1", "Qwen3-0.6B", 1024, 1, "plain", "layer")
    yield one
    yield from (one._replace(method=method) for method in AGGREGATORS)
    yield from (one._replace(method="cagrad", blocks=kind) for kind in BLOCKS[1:])
    for chip, model, length, rows, methods in (
        ("v5e:2x4", "Qwen3-0.6B", 1024, 1, ("plain", "mean", "cagrad")),
        ("h100:8", "Llama-3.1-8B", 4096, 1, ("plain", "cagrad")),
        ("v6e:2x4", "Llama-3.1-8B", 8192, 1, ("plain", "cagrad")),
        ("v5e:16x16", "Llama-3.1-8B", 1024, 32, ("plain", "cagrad")),
        ("v5p:4x4x8", "Llama-3.1-8B", 1024, 16, ("plain", "cagrad")),
    ):
        for method in methods:
            yield Row(chip, model, length, rows, method, "layer")


def product(flags: argparse.Namespace) -> Iterator[Row]:
    """All combinations of what the command line names."""
    for chip in flags.chips or ["h100:8"]:
        for model in flags.models or ["Qwen3-0.6B"]:
            one = Row(chip, model, flags.sequence_length, flags.batch_size, "plain", "layer")
            yield one
            for blocks in flags.blocks or BLOCKS:
                for method in flags.aggregators or AGGREGATORS:
                    for gram in flags.grams:
                        yield one._replace(method=method, blocks=blocks, gram=gram)


def measure(row: Row) -> dict[str, Any]:
    """Compile a step and count; in a process of its own."""
    import jax
    import programs

    from jaxmoo.errors import ConfigError
    from jaxmoo.train.chips import ChipFullError, slice_of

    jax.config.update("jax_platforms", "cpu")
    place = slice_of(row.chip)
    flags = _flags(row)
    plain = row.method == "plain"
    kind = programs.Kind("backward", row.method, row.blocks, row.gram)
    kind = programs.PLAIN if plain else kind
    try:
        plan = programs.count(flags, LANGUAGES, None, kind, place)
    except ChipFullError as error:
        return {"fits": False, "says": str(error), "jax": jax.__version__}
    except ConfigError as error:
        return {"missing": str(error)}
    chip = plan.chip
    assert chip is not None
    return {
        "fits": plan.total <= chip.memory,
        "memory": chip.memory,
        "peak": plan.total,
        "parts of memory": plan.memory,
        "sent": {kind: sent.bytes for kind, sent in chip.sent.items()},
        "exposed": {kind: sent.exposed for kind, sent in chip.sent.items()},
        "launches": None if chip.launches is None else chip.launches._asdict(),
        "cycles": None if chip.cycles is None else chip.cycles._asdict(),
        "flops": plan.flops,
        "blocks of the step": plan.blocks,
        "attention": plan.attention,
        "seconds": plan.compile_seconds,
        "jax": jax.__version__,
    }


def _flags(row: Row) -> argparse.Namespace:
    import programs

    parser = argparse.ArgumentParser()
    programs.add_flags(parser)
    return parser.parse_args(
        [
            *("--model", row.model, "--dtype", "bfloat16", "--remat", "full"),
            *("--sequence-length", str(row.length), "--batch-size", str(row.rows)),
        ]
    )


def fill(rows: Sequence[Row], pages: Pages) -> None:
    """Measure the rows that are missing."""
    there = {Row.of(found) for found in pages.rows}
    for row in (row for row in dict.fromkeys(rows) if row not in there):
        found = _apart(row)
        if "missing" in found:
            print(f"{' '.join(map(str, row))}: {found['missing']}", file=sys.stderr)
        else:
            pages.add(row._asdict() | found)


def _apart(row: Row) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, row).result()
        except BrokenProcessPool:
            return {"fits": None, "says": "the compiler ended its process"}


def report(found: Sequence[dict[str, Any]]) -> str:
    """The tables, each step beside the ordinary one of the same tokens: GPUs, then TPUs."""
    by_row = {Row.of(one): one for one in found}
    tables = []
    for what, kind, unit in (("kernels", "launches", 1), ("Mcycles", "cycles", 1e6)):
        header = ["chips, model, tokens per language", "method", "blocks", "peak GB", "of plain"]
        header += [what, "of plain", "sent GB", "exposed GB", "of plain", "compiled in s"]
        lines = []
        for row, one in sorted(by_row.items(), key=lambda item: _order(item[0])):
            if row.chip.startswith("v") == (kind == "cycles"):
                lines.append(_line(row, one, by_row.get(row.beside, {}), kind, unit))
        if lines:
            tables.append(markdown([header, *lines]))
    return "\n\n".join(tables)


def _line(
    row: Row, one: dict[str, Any], plain: dict[str, Any], kind: str, unit: float
) -> list[str]:
    name = f"{row.chip}, {row.model}, {row.length * row.rows:,}"
    method = row.method if row.gram == "exact" else f"{row.method}, {row.gram}"
    if one.get("peak") is None:
        says = "does not fit" if one["fits"] is False else one["says"]
        return [name, method, row.blocks, says, *[""] * 7]
    count, before = _total(one.get(kind)), _total(plain.get(kind))
    exposed = sum(one["exposed"].values())
    ordinarily = sum(plain["exposed"].values()) if plain.get("exposed") else None
    digits = ".1f" if unit > 1 else ".0f"
    return [
        *(name, method, row.blocks),
        *(gigabytes(one["peak"]), _of(one["peak"], plain.get("peak"))),
        *("" if count is None else f"{count / unit:,{digits}}", _of(count, before)),
        *(gigabytes(sum(one["sent"].values())), gigabytes(exposed), _of(exposed, ordinarily)),
        f"{one['seconds']:.0f}",
    ]


def _order(row: Row) -> tuple[Any, ...]:
    every = list(table())
    methods = ("plain", *AGGREGATORS)
    first = next((i for i, x in enumerate(every) if x[:4] == row[:4]), len(every))
    place = methods.index(row.method) if row.method in methods else len(methods)
    return first, row[:4], row.method != "plain", BLOCKS.index(row.blocks), place, row.gram


def _total(cost: dict[str, Any] | None) -> int | None:
    """Rounds of loops of unknown length are counted once."""
    if cost is None:
        return None
    return sum(cost["parts"].values()) + sum(cost["per_round"].values())


def _of(count: float | None, plain: float | None) -> str:
    return ratio(count / plain, 3) if count is not None and plain else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", nargs="*", help="such as h100:8 or v5e:2x4")
    parser.add_argument("--models", nargs="*", help="published models")
    parser.add_argument("--aggregators", nargs="*")
    parser.add_argument("--blocks", nargs="*")
    parser.add_argument("--grams", nargs="*", default=["exact"], help="exact, sketch:N (exact)")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=1, help="rows per language (1)")
    parser.add_argument("--only", help="of the table, the rows of chips that begin so")
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there")
    parser.add_argument("--json", help="file for the rows, which is also read")
    flags = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of the processes that compile
    named = flags.chips or flags.models or flags.aggregators or flags.blocks
    rows = list(product(flags) if named else table())
    rows = [row for row in rows if row.chip.startswith(flags.only or "")]
    about = environment(os.cpu_count() or 1, ["jax", "jaxlib"])
    pages = Pages(flags.json, about)
    if flags.json and Path(flags.json).exists():
        kept = json.loads(Path(flags.json).read_text())["rows"]
        if flags.again:
            kept = [one for one in kept if Row.of(one) not in rows]
        pages.rows = kept
    fill(rows, pages)
    print(pages.markdown(report))


if __name__ == "__main__":
    main()
