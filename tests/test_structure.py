"""The rooms of the package: which may import from which, and what an extension touches."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def structure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("structure", ROOT / "benchmarks/structure.py")
    made = importlib.util.module_from_spec(spec)
    sys.modules["structure"] = made
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def imports(structure):
    return structure.imports(ROOT)


def test_every_room_has_a_place(structure):
    rooms = {structure.room_of(module) for module in structure.modules(ROOT)}
    assert rooms <= set(structure.ROOMS)


def test_no_import_runs_up(structure, imports):
    assert structure.upward(imports, structure.ROOMS) == []


def test_no_module_leads_back_to_itself(structure, imports):
    """Imports within functions and for types alone count, too."""
    assert structure.circles(imports) == []


def test_what_an_extension_touches_is_there(structure):
    for kind, touched in structure.TOUCH.items():
        assert structure.missing(ROOT, touched) == [], kind


def test_faults_are_found(structure, tmp_path):
    """An import that runs up, one within a function, and a circle of both."""
    for name, text in {
        "errors.py": "from jaxmoo.data import files\n",
        "data/__init__.py": "",
        "data/files.py": "def read():\n    import jaxmoo.errors\n",
    }.items():
        path = tmp_path / "jaxmoo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = structure.imports(tmp_path)
    up = [("jaxmoo.errors", "jaxmoo.data.files")]
    assert structure.upward(found, structure.ROOMS) == up
    assert structure.circles(found) == [["jaxmoo.data.files", "jaxmoo.errors"]]
    numbers = structure.measure(tmp_path, quick=True)
    assert numbers["imports that run up"] == "1 of 2"
    assert numbers["circles of modules (modules in them)"] == "1 (2)"
    assert numbers["files to touch: aggregator"] == "?"


# Where `Path` is given what is a path of this machine for certain, or a mere name.
MADE_OF_LOCAL_NAMES = {
    "data/sources/source.py",
    "engine/jaxprs.py",
    "hf/directory.py",
    "hf/source.py",
    "hf/weights.py",
    "hf/wheels.py",
    "runs/checkpoint.py",
}


def test_texts_become_paths_in_one_place():
    """Elsewhere, `Path(text)` would take s3://bucket/x for a directory of this machine."""
    found = set()
    for file in (ROOT / "jaxmoo").rglob("*.py"):
        name = file.relative_to(ROOT / "jaxmoo").as_posix()
        for node in ast.walk(ast.parse(file.read_text())):
            made = isinstance(node, ast.Call) and ast.unparse(node.func) == "Path" and node.args
            own = made and ast.unparse(node.args[0]) == "__file__"
            if made and not own and not isinstance(node.args[0], ast.Constant):
                found.add(name)
    strangers = {name for name in found if not name.startswith("files/")} - MADE_OF_LOCAL_NAMES
    assert strangers == set(), "use jaxmoo.files.outputs.typed_path there"
