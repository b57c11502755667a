"""One table of all that ``gpu.sh`` measured.

python benchmarks/gpu_table.py DIRECTORY
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import bullets, gigabytes, markdown, ratio, seconds, step_name

import kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    flags = parser.parse_args()
    found = {file.stem: json.loads(file.read_text()) for file in flags.directory.glob("*.json")}
    others = ("kernels", "peers", "plan")
    steps = {name: page for name, page in sorted(found.items()) if name not in others}
    about = next((page["about"] for page in steps.values()), {})
    parts = [bullets({name: about[name] for name in about if name not in ("command", "step")})]
    parts.append(markdown([HEADER, *(row for page in steps.values() for row in rows_of(page))]))
    if "peers" in found:
        parts += [f"Beside PyTorch: {found['peers']['about']['step']}", peers(found["peers"])]
    if "kernels" in found:
        page = found["kernels"]
        parts += [f"Solves, {page['about']['solves']}:", kernels.report(page["rows"])]
    if "plan" in found:
        parts.append(planned(found["plan"]))
    print("\n\n".join(parts))


HEADER = ["measured", "step", "s", "of plain", "MFU", "peak GB", "of plain", "of stacked"]
HEADER += ["most on the device GB"]


def rows_of(page: dict[str, Any]) -> list[list[str]]:
    """The rows of one run of step.py."""
    rows, title = page["rows"], page["about"]["step"]
    plain = rows[0]
    share = plain.get("mfu")
    stacked = next((row["peak"] for row in rows if row["engine"] == "stacked"), None)
    table = []
    for row in rows:
        mfu = share / row["ratio"] if share and "ratio" in row else None
        table.append(
            [
                title if row is plain else "",
                "plain" if row is plain else f"{step_name(row)}, `{row['blocks']}`",
                row.get("failed") or seconds(row.get("seconds")),
                ratio(row.get("ratio"), 3),
                "" if mfu is None else f"{mfu:.1%}",
                gigabytes(row["peak"]),
                ratio(row["peak ratio"]),
                "" if stacked is None else ratio(row["peak"] / stacked),
                gigabytes(row.get("device peak")),
            ]
        )
    return table


def peers(page: dict[str, Any]) -> str:
    table = [["step", "s", "of jaxmoo backward", "peak GB", "losses differ by"]]
    differences = {row["name"]: row["difference"] for row in page["rows"] if "same" in row}
    for row in page["rows"]:
        if "same" not in row:
            found = differences.get(row["name"])
            table.append(
                [
                    row["name"],
                    row.get("failed") or seconds(row.get("seconds")),
                    ratio(row.get("ratio")),
                    gigabytes(row.get("peak")),
                    "" if found is None else f"{found:.1e}",
                ]
            )
    return markdown(table)


def planned(page: dict[str, Any]) -> str:
    """What the largest model would need, counted in programs for the CPU."""
    needs = [f"{step_name(row)} {gigabytes(row['peak'])} GB" for row in page["rows"]]
    return f"Planned, {page['about']['command']}: {', '.join(needs)}."


if __name__ == "__main__":
    main()
