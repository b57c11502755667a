"""What docs/training.md shows for a notebook, on a small model."""

from __future__ import annotations

import re

import pytest

from devices import ROOT
from jaxmoo.train import read_metrics


@pytest.mark.slow
def test_the_example_of_the_page_plans_trains_and_evaluates(
    tiny_model, tmp_path, monkeypatch, capsys
):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.S)
    for old, new in (
        ("smollm2-135m-instruct", str(tiny_model)),
        ("2[2-9]", "[23]"),
        ("steps=8", "steps=2"),
        ("max_held_out=8", "max_held_out=2"),
        ("output=", "report=False, tensorboard=False, output="),
    ):
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code, found)
    assert "memory per device" in capsys.readouterr().out
    assert (
        sum("loss" in row for row in read_metrics("runs/python")) == found["results"]["steps"] == 2
    )
    for language, score in found["results"]["after"].items():
        again = found["scores"]["languages"][language]
        assert abs(again["nll"] - score["nll"]) < 1e-4
        assert "chrf" in again
