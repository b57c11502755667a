"""The documentation: its code runs, its links lead somewhere, its navigation has every page."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from jaxmoo import aggregators

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Their code needs a model and a config: tests/train/test_from_python.py and
# tests/data/sources/test_source.py run it on small ones.
RUN_ELSEWHERE = {DOCS / "training.md", DOCS / "data.md"}
CODE_PAGES = [p for p in PAGES if "```python" in p.read_text() and p not in RUN_ELSEWHERE]
LONG_PAGES = {"aggregators", "optax"}  # a dozen programs each
LINKED = [*PAGES, *sorted(ROOT.glob("*.md")), ROOT / "benchmarks/README.md"]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] if p.stem in LONG_PAGES else []) for p in CODE_PAGES],
    ids=name,
)
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(page, monkeypatch, tmp_path):
    """A text block directly after a Python block is that block's output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as of a script in that folder
    fences = _FENCE.findall(page.read_text())
    namespace: dict = {"__name__": page.stem}
    for (kind, code), following in zip(fences, [*fences[1:], ("", "")], strict=True):
        if kind != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{page.name}: {code[:60]!r}", "exec"), namespace)
        if following[0] == "text":
            assert printed.getvalue().strip() == following[1].strip()
        else:
            assert not printed.getvalue(), "printed something that the page does not show"


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_files_of_the_code_are_where_a_page_says(page):
    """Capitals stand for any name."""
    named = re.findall(
        r"`((?:jaxmoo|tests|benchmarks|examples|scripts)/[\w/.]+)`", page.read_text()
    )
    real = [path for path in named if not re.search("NAME|ROOM", path)]
    assert [path for path in real if not (ROOT / path).exists()] == []


class _Site(yaml.SafeLoader):
    """Reads mkdocs.yml, whose extensions are configured by Python objects."""


_Site.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def leaves(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from leaves(part)


def test_the_navigation_has_every_page_once():
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), _Site)
    assert sorted(leaves(site["nav"])) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


@pytest.fixture(scope="module")
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "hooks/site.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def found(identifier: str) -> Any:
    """What a dotted name of the reference stands for."""
    parts = identifier.split(".")
    for end in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            thing: Any = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:]:
                thing = getattr(thing, part)
            return thing
    raise AssertionError(identifier)


@pytest.mark.parametrize("page", sorted((DOCS / "reference").glob("*.md")), ids=name)
def test_the_reference_names_what_there_is(page, site):
    identifiers = re.findall(r"^::: (\S+)$", site.expanded(page.read_text()), re.MULTILINE)
    assert identifiers
    for identifier in identifiers:
        assert found(identifier).__doc__, identifier


def test_the_reference_has_the_public_names(site):
    for package, one in {
        "jaxmoo": "resolve_conflicts",
        "jaxmoo.aggregators": "cagrad",
        "jaxmoo.blocks": "by",
        "jaxmoo.hf": "load_model",
    }.items():
        homes = site.public_names(package)
        assert found(homes[one]) is getattr(importlib.import_module(package), one)
    methods = set(aggregators.names())
    assert methods <= set(site.public_names("jaxmoo.aggregators"))


def test_the_table_of_promises_has_every_aggregator():
    text = (DOCS / "aggregators.md").read_text()
    rows = re.findall(r"^\| `(\w+)`", text, re.MULTILINE)
    assert sorted(set(rows)) == sorted(aggregators.names())


def test_the_readme_is_short():
    """At most 900 words, code and tables aside."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    words = [
        word for line in text.splitlines() if not line.startswith("|") for word in line.split()
    ]
    assert len(words) <= 900
