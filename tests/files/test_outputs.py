"""Paths that people type, and whether anything can be written there."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxmoo.errors import ConfigError
from jaxmoo.files.outputs import check_writable, typed_path

ROOT = Path(__file__).parents[2]


def test_the_home_of_somebody_unknown_is_an_error_that_says_so():
    with pytest.raises(ConfigError, match="no such user here"):
        typed_path("~nobody-of-that-name/runs")


def test_homes_are_looked_up_in_one_place():
    """Everywhere else somebody unknown would end in a traceback."""
    places = [f for f in ROOT.glob("jaxmoo/**/*.py") if "expanduser" in f.read_text()]
    assert places == [ROOT / "jaxmoo/files/outputs.py"]


def test_several_that_look_whether_a_place_can_be_written_do_not_disturb_each_other(tmp_path):
    """As the processes of a run do, all at once."""
    place = tmp_path / "runs" / "one"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: check_writable(place, "output"), range(400)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 300, "link", "link/run"])
def test_a_place_that_cannot_be_made_is_refused_and_nothing_is_left(tmp_path, name):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"^output: "):
        check_writable(tmp_path / name, "output")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_place_that_goes_up_is_looked_at_without_leaving_anything(tmp_path):
    check_writable(tmp_path / "gone" / ".." / ".." / tmp_path.name / "run", "output")
    assert not list(tmp_path.iterdir())
