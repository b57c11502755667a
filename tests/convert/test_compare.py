"""Comparing: every kind of difference is found, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tiny_models
from jaxmoo.commands.convert import main
from jaxmoo.convert.compare import Comparison, compare
from jaxmoo.errors import CheckpointError

NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model that no test changes."""
    directory = tmp_path_factory.mktemp("model")
    tiny_models.save("llama", directory)
    return directory


@pytest.fixture
def pair(model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The same model twice."""
    return tuple(shutil.copytree(model, tmp_path / name) for name in "ab")


def edited(directory: Path, edit) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def changed(found: Comparison) -> dict[str, tuple[str, float | None, float | None]]:
    return {d.name: (d.what, d.max_abs, d.max_rel) for d in found.tensors if not d.identical}


def test_equal_models_are_equal(pair):
    found = compare(*pair)
    assert len(found.tensors) == 30
    assert found.within(0)
    assert found.logits.max_abs == 0
    assert found.logits.same_top == found.logits.tokens == 16


def test_one_element_is_found_and_measured(pair):
    for directory, value in zip(pair, (2.0, 1.5), strict=True):
        edited(directory, lambda t, v=value: t[HEAD].__setitem__((130, 47), v))
    found = compare(*pair)
    assert changed(found) == {HEAD: ("float32", 0.5, 0.25)}
    assert not found.within(0)
    assert not found.within(0.24)
    assert found.within(0.25)
    assert 0 < found.logits.max_abs < 10
    assert "29 of 30 tensors are equal to the byte" in found.table()


def test_zeros_of_either_sign_differ_in_bytes_only(pair):
    for directory, value in zip(pair, (0.0, -0.0), strict=True):
        edited(directory, lambda t, v=value: t[NORM].__setitem__(0, v))
    assert changed(compare(*pair)) == {NORM: ("float32", 0.0, 0.0)}


def test_what_is_not_a_number_is_infinitely_far_from_one(pair):
    cases = {
        NORM: (np.nan, np.nan, 0.0),
        "model.layers.0.input_layernorm.weight": (np.inf, np.inf, 0.0),
        "model.layers.1.input_layernorm.weight": (np.nan, 1.0, np.inf),
        "model.layers.2.input_layernorm.weight": (-np.inf, np.inf, np.inf),
    }
    for i, directory in enumerate(pair):

        def edit(tensors, i=i):
            for name, case in cases.items():
                tensors[name][0] = case[i]

        edited(directory, edit)
    found = {d.name: d.max_abs for d in compare(*pair).tensors}
    assert {name: found[name] for name in cases} == {n: case[2] for n, case in cases.items()}


def test_another_dtype_is_shown_though_the_values_are_equal(pair):
    for directory in pair:
        edited(directory, lambda t: t.update({NORM: np.ones(48, np.float32)}))
    edited(pair[1], lambda t: t.update({NORM: t[NORM].astype(np.float16)}))
    found = compare(*pair)
    assert changed(found) == {NORM: ("float32 / float16", 0.0, 0.0)}
    assert not found.within(0)
    assert found.within(1e-9)


def test_missing_and_misshapen_tensors_are_listed(pair):
    a, b = pair
    edited(a, lambda t: t.pop(HEAD))
    edited(b, lambda t: t.update({NORM: np.ones(7, np.float32)}))
    found = compare(a, b)
    assert changed(found) == {
        HEAD: (f"only in {b}", None, None),
        NORM: ("shape [48] / [7]", None, None),
    }
    assert found.logits is None
    assert not found.within(1e9)
    assert "Logits cannot be compared" in found.table()


def test_the_exit_code_tells_whether_models_agree(pair, capsys):
    edited(pair[1], lambda t: t.update({NORM: t[NORM] * np.float32(1.001)}))
    names = list(map(str, pair))
    assert main(["verify", *names]) == 1
    assert main(["verify", *names, "--tolerance", "0.01"]) == 0
    assert NORM in capsys.readouterr().out


def test_what_is_not_a_model_is_refused(pair, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is not a model"):
        compare(pair[0], tmp_path / "empty")
