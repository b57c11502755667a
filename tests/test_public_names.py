"""The names of ``jaxmoo`` itself, which are imported when they are first asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import jaxmoo
from devices import ROOT


def test_every_public_name_is_there_and_no_other():
    for name in jaxmoo.__all__:
        assert getattr(jaxmoo, name) is not None and name in dir(jaxmoo)
    assert jaxmoo.aggregate is jaxmoo.aggregators.aggregate
    assert jaxmoo.errors.ConfigError.__module__ == "jaxmoo.errors"
    with pytest.raises(AttributeError, match="module 'jaxmoo' has no attribute 'agregate'"):
        _ = jaxmoo.agregate  # pyright: ignore[reportAttributeAccessIssue]


def test_a_public_name_can_be_imported_first():
    program = "from jaxmoo import block, resolve_conflicts; from jaxmoo.aggregators import mgda"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
