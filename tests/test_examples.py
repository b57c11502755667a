"""The examples run, and every Python block of every page of documentation does what it says."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

from jaxmoo import aggregators

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
CODE_PAGES = [page for page in PAGES if "```python" in page.read_text()]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def load(name: str):
    """Import a script of ``examples/``."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_multitask_digits_compares_methods(capsys):
    load("multitask_digits").main(["--steps", "3", "--seeds", "2", "--methods", "pcgrad"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["method", "mean", "pcgrad"]
    assert re.search(r"[+-]\d+\.\d\d ± \d+\.\d\d", lines[2])


def test_toy_trajectories_draws_a_small_picture(tmp_path, capsys):
    target = tmp_path / "toy.png"
    load("toy_trajectories").main(["--steps", "3", "--output", str(target)])
    assert target.read_bytes().startswith(b"\x89PNG")
    assert "mgda" in capsys.readouterr().out


def test_toy_front_is_stationary():
    """On the drawn front the shortest convex combination of the gradients vanishes."""
    import jax
    import jax.numpy as jnp

    toy = load("toy_trajectories")
    for point in toy.pareto_front()[::8]:
        gradients = jax.jacrev(toy.losses)(jnp.asarray(point, jnp.float32))
        shortest = aggregators.aggregate("mgda", gradients)
        assert jnp.linalg.norm(shortest) < 2e-2 * jnp.linalg.norm(gradients, axis=1).max()


@pytest.mark.parametrize("page", CODE_PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(page, monkeypatch, tmp_path):
    """A text block directly after a Python block is that block's output."""
    monkeypatch.chdir(tmp_path)
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


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks/README.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_the_table_of_promises_has_every_aggregator():
    text = (ROOT / "docs" / "aggregators.md").read_text()
    rows = re.findall(r"^\| `(\w+)`", text, re.MULTILINE)
    assert sorted(set(rows)) == sorted(aggregators.names())
