"""How the code is built, in numbers, for one checkout or for two side by side.

    python benchmarks/structure.py [CHECKOUT [CHECKOUT]] [--quick]

Prints Markdown: files and lines per room, imports against the order of rooms, circles of modules,
the files that a training run passes through from its command to the exported weights, the files to
touch for an extension, the number of tests, and the time to ``--help``. ``--quick`` leaves out what
has to run a program. Lines are lines of the files, blank ones and docstrings included.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parents[1]

# The rooms of `jaxmoo`, from the ground up: a room imports from those before it. `(top)` are the
# names of the package itself and its command.
ROOMS = (
    *("errors", "sizes", "dtypes", "platforms", "projections", "slices", "sharding"),
    *("files", "runtime", "kernels"),
    *("parameters", "registry", "aggregators", "weighting", "blocks", "stacked", "mesh"),
    *(
        "block_solve",
        "sketched",
        "resolve",
        "resolver_state",
        "transform",
        "engine",
        "models",
        "config",
        "hf",
        "data",
    ),
    *("runs", "convert", "evaluate", "report", "train", "analysis", "study", "commands", "(top)"),
)
# The same before these rooms were made (commit 2dcd765), in the order that suits that code best.
ROOMS_BEFORE = (
    *("errors", "sizes", "dtypes", "sharding", "atomic", "outputs", "digests", "memory"),
    *("terminal", "cpu_grams", "gpu_grams", "reductions", "cross_entropy", "aggregators"),
    *("weighting", "blocks", "gradients", "mesh", "resolve", "transform", "engine", "models"),
    *("hf", "data", "evaluate", "convert", "train", "analysis", "study", "(top)"),
)


class Touch(NamedTuple):
    """A file that an extension touches.

    Attributes:
      path: of the file; ``NEW`` stands for the name of one that is added.
      point: a regular expression for the place where the extension is named; empty for a new file.
    """

    path: str
    point: str = ""


# What to touch for an extension.
TOUCH: Mapping[str, Sequence[Touch]] = {
    "aggregator": [
        Touch("jaxmoo/aggregators/methods/NEW.py"),
        Touch("jaxmoo/aggregators/__init__.py", r"^from jaxmoo\.aggregators\.methods\.mgda "),
        Touch("docs/aggregators.md", r"^\| `mgda`"),
    ],
    "block rule": [
        Touch("jaxmoo/blocks/rules.py", r"^_PLAIN = "),
        Touch("jaxmoo/blocks/__init__.py", r"^__all__ = "),
        Touch("docs/blocks.md", r"`slices:"),
    ],
    "data source": [
        Touch("jaxmoo/data/sources/source.py", r"^def open_source\("),
        Touch("jaxmoo/config/data_section.py", r"Where the examples come from"),
        Touch("docs/data.md", r"^\| `chatterbot`"),
    ],
    "metric": [
        Touch("jaxmoo/train/step.py", r"^        metrics = \{"),
        Touch("jaxmoo/train/reporter.py", r"^        row = \{"),
        Touch("jaxmoo/train/metrics.py", r'"conflict_share": '),
        Touch("docs/training.md", r"conflict_share"),
    ],
    "model family": [
        Touch("jaxmoo/models/families/NEW.py"),
        Touch("jaxmoo/models/families/__init__.py", r'^        "granite": GRANITE,'),
        Touch("tests/tiny_models.py", r'^    "granite": \{'),
        Touch("docs/models.md", r"^\| `granite`"),
    ],
}
# The same before these rooms were made.
TOUCH_BEFORE: Mapping[str, Sequence[Touch]] = {
    **TOUCH,
    "aggregator": [
        Touch("jaxmoo/aggregators/NEW.py"),
        Touch("jaxmoo/aggregators/registry.py", r"^_FACTORIES\b"),
        Touch("jaxmoo/aggregators/__init__.py", r"^__all__ = "),
        TOUCH["aggregator"][-1],
    ],
    "data source": [
        Touch("jaxmoo/data/NEW.py"),
        Touch("jaxmoo/data/sources.py", r"^def read_examples\("),
        Touch("jaxmoo/data/streams.py", r"^def open_streams\("),
        Touch("jaxmoo/train/data_config.py", r"Where the examples come from"),
        TOUCH["data source"][-1],
    ],
    "model family": [
        Touch("jaxmoo/models/config.py", r"^_ARCHITECTURES\b"),
        Touch("jaxmoo/hf/gguf.py", r'^    "llama": "LlamaForCausalLM"'),
        Touch("docs/models.md", r"^\| `qwen3`"),
    ],
}


class Import(NamedTuple):
    """That one module imports another, by dotted names."""

    importer: str
    imported: str


def modules(root: Path) -> dict[str, Path]:
    """The modules of a checkout's package, by dotted name."""
    found = {}
    for path in sorted((root / "jaxmoo").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str:
    """The room of a module.

    Example:
      >>> room_of("jaxmoo.data.sources.files"), room_of("jaxmoo.mesh"), room_of("jaxmoo")
      ('data', 'mesh', '(top)')
    """
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__main__" else "(top)"


def imports(root: Path) -> list[Import]:
    """All imports within the package: at the top, within functions, and for types alone."""
    known = modules(root)
    found = set()
    for module, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: Iterable[str] = ()
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                # The version is the package's name, nothing that is built above a module.
                wanted = [alias.name for alias in node.names if alias.name != "__version__"]
                full = [f"{node.module}.{name}" for name in wanted]
                names = [name if name in known else node.module for name in full]
            found |= {Import(module, name) for name in names if name in known and name != module}
    return sorted(found)


def order_for(found: Iterable[str]) -> Sequence[str]:
    """The order of rooms that names all of them.

    Raises:
      ValueError: a room has no place.
    """
    found = set(found)
    for order in (ROOMS, ROOMS_BEFORE):
        if found <= set(order):
            return order
    raise ValueError(f"rooms without a place in ROOMS: {sorted(found - set(ROOMS))}")


def upward(found: Iterable[Import], order: Sequence[str]) -> list[Import]:
    """The imports whose target's room comes after the importer's."""
    place = {room: number for number, room in enumerate(order)}
    return [x for x in found if place[room_of(x.imported)] > place[room_of(x.importer)]]


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The groups of several nodes each of which leads to every other.

    Example:
      >>> circles([("a", "b"), ("b", "a"), ("b", "c")])
      [['a', 'b']]
    """
    follows: dict[str, set[str]] = {}
    for source, target in edges:
        follows.setdefault(source, set()).add(target)

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for node in follows.get(waiting.pop(), set()) - seen:
                seen.add(node)
                waiting.append(node)
        return seen

    reach = {node: reached(node) for node in follows}
    groups = {
        tuple(sorted(other for other in reach if node in reach[other] and other in reach[node]))
        for node in reach
        if node in reach[node]
    }
    return [list(group) for group in sorted(groups)]


def missing(root: Path, touched: Iterable[Touch]) -> list[Touch]:
    """What is said to be touched but is not there."""

    def there(touch: Touch) -> bool:
        path = root / touch.path
        if not touch.point:
            return path.parent.is_dir()
        return path.is_file() and bool(re.search(touch.point, path.read_text("utf-8"), re.M))

    return [touch for touch in touched if not there(touch)]


def lines(paths: Iterable[Path]) -> int:
    """Lines of files, together."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def measure(root: Path, *, quick: bool = False) -> dict[str, str]:
    """All numbers of a checkout, as text by what they are.

    Args:
      root: the checkout.
      quick: leave out what has to run a program.
    """
    known = modules(root)
    found = imports(root)
    order = order_for(map(room_of, known))
    sizes = {module: lines([path]) for module, path in known.items()}
    between = {(room_of(a), room_of(b)) for a, b in found if room_of(a) != room_of(b)}
    count = Counter(map(room_of, known))
    numbers = {
        "rooms; files; lines": f"{len(count)}; {len(known)}; {sum(sizes.values()):,}",
        "files of more than 400 lines": f"{sum(size > 400 for size in sizes.values())}",
        "imports that run up": f"{len(upward(found, order))} of {len(found)}",
        "circles of rooms (rooms in them)": _circles(circles(between)),
        "circles of modules (modules in them)": _circles(circles(found)),
    }
    for kind in TOUCH:
        ways = [way[kind] for way in (TOUCH, TOUCH_BEFORE) if not missing(root, way[kind])]
        numbers[f"files to touch: {kind}"] = f"{len(ways[0])}" if ways else "?"
    if not quick:
        passed = traced(root)
        numbers["files that a run passes through (lines)"] = (
            f"{len(passed)} ({lines(root / path for path in passed):,})"
        )
        numbers["tests"] = f"{tests(root):,}"
        for name, command in helps(root).items():
            wall, cpu = seconds(root, command)
            numbers[f"seconds to `{name}` (of CPU time)"] = f"{wall:.2f} ({cpu:.2f})"
    for room in order:
        if count[room]:
            total = sum(size for module, size in sizes.items() if room_of(module) == room)
            numbers[f"`{room}`: files; lines"] = f"{count[room]}; {total:,}"
    return numbers


def _circles(groups: Sequence[Sequence[str]]) -> str:
    return f"{len(groups)} ({sum(map(len, groups))})" if groups else "0"


def _run(root: Path, command: Sequence[str | Path], **more: str) -> str:
    """Run Python with the checkout's package; return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", **more}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{done.args} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def traced(root: Path) -> list[str]:
    """The files of the package that have a part in a small training run."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(__file__).with_name("structure_run.py")
        out = _run(root, [script, root, folder])
    return json.loads(out.splitlines()[-1])


def tests(root: Path) -> int:
    """The number of tests that pytest collects."""
    out = _run(root, ["-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"])
    match = re.search(r"^(\d+)(?:/\d+)? tests collected", out, re.M)
    return int(match[1]) if match else 0


def helps(root: Path) -> dict[str, list[str]]:
    """The commands whose help is timed: the script of training, and the package's where it is."""
    found = {"scripts/train.py --help": ["scripts/train.py", "--help"]}
    if (root / "jaxmoo/__main__.py").exists():
        found["jaxmoo --help"] = ["-m", "jaxmoo", "--help"]
    return found


def seconds(root: Path, command: Sequence[str], rounds: int = 3) -> tuple[float, float]:
    """The least time that a command takes in several rounds, and the CPU time of that round."""

    def once() -> tuple[float, float]:
        begun, before = time.perf_counter(), os.times()
        _run(root, command)
        after = os.times()
        cpu = sum(after[2:4]) - sum(before[2:4])
        return time.perf_counter() - begun, cpu

    return min(once() for _ in range(rounds))


def table(columns: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """The rows of a Markdown table, one column per checkout."""
    yield f"| | {' | '.join(columns)} |"
    yield "|---|" + "---:|" * len(columns)
    for name in dict.fromkeys(itertools.chain.from_iterable(columns.values())):
        yield f"| {name} | {' | '.join(column.get(name, '') for column in columns.values())} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkouts", nargs="*", type=Path, default=[HERE], metavar="CHECKOUT")
    parser.add_argument("--quick", action="store_true", help="leave out what runs a program")
    options = parser.parse_args()
    names = ["now"] if len(options.checkouts) == 1 else ["before", "after"]
    if len(options.checkouts) > len(names):
        parser.error("expected one or two checkouts")
    columns = {
        name: measure(root.resolve(), quick=options.quick)
        for name, root in zip(names, options.checkouts, strict=True)
    }
    print("\n".join(table(columns)))


if __name__ == "__main__":
    main()
