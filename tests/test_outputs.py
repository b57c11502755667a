"""Paths that people type."""

from pathlib import Path

import pytest

from jaxmoo.errors import ConfigError
from jaxmoo.outputs import typed_path

ROOT = Path(__file__).parents[1]


def test_the_home_of_somebody_unknown_is_an_error_that_says_so():
    with pytest.raises(ConfigError, match="no such user here"):
        typed_path("~nobody-of-that-name/runs")


def test_homes_are_looked_up_in_one_place():
    """Everywhere else somebody unknown would end in a traceback."""
    places = [f for f in ROOT.glob("jaxmoo/**/*.py") if "expanduser" in f.read_text()]
    assert places == [ROOT / "jaxmoo/outputs.py"]
