"""Finding an aggregator by name."""

from __future__ import annotations

import pkgutil

import pytest

from jaxmoo import aggregators
from jaxmoo.aggregators import methods
from jaxmoo.errors import ConfigError


def test_every_name_is_a_factory_of_the_package():
    for name in aggregators.names():
        assert getattr(aggregators, name).__name__ == name
        options = {"weights": [1.0, 2.0]} if name == "constant" else {}
        assert aggregators.get(name, **options).name == name


def test_every_file_of_the_methods_has_its_line_in_the_package():
    """Without it the file would be there and its method not be found."""
    files = {module.name for module in pkgutil.iter_modules(methods.__path__)}
    found = {
        getattr(aggregators, name).__module__.rpartition(".")[2] for name in aggregators.names()
    }
    assert found == files


def test_an_aggregator_is_passed_through():
    method = aggregators.cagrad(0.3)
    assert aggregators.get(method) is method
    with pytest.raises(ConfigError, match="cannot change the ready-made"):
        aggregators.get(method, c=0.4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cagard", {}, "Did you mean 'cagrad'"),
        (3, {}, "Unknown aggregator 3"),
        (["mgda"], {}, "Unknown aggregator"),
        ("cagrad", {"C": 0.4}, "Unknown option 'C' of aggregator 'cagrad'.* It takes c, rescale"),
        ("mean", {"c": 0.4}, "It takes none"),
        ("constant", {}, "missing a required argument: 'weights'"),
        ("cagrad", {"c": -0.1}, r"expected c to be a number in \[0, inf\], found -0.1"),
        ("cagrad", {"c": "0.5"}, "expected c to be a number"),
        ("cagrad", {"c": True}, "expected c to be a number"),
        ("cagrad", {"c": float("nan")}, "expected c to be a number"),
        ("cagrad", {"rescale": "1+c2"}, "Did you mean '1\\+c"),
        ("mgda", {"normalisation": "L2"}, "one of 'none', 'l2'"),
        ("fairgrad", {"alpha": 0.0}, r"\[0.5, 5\]"),
        ("nash_mtl", {"max_norm": 0.0}, r"\(0, inf\]"),
        ("gradvac", {"beta": 1.5}, r"\[0, 1\]"),
        ("cr_mogm", {"momentum": 1.0}, r"\[0, 1\)"),
        ("cr_mogm", {"aggregator": "graddrop"}, "cannot be smoothed"),
        ("trimmed_mean", {"trim_number": 1.5}, "an integer"),
        ("krum", {"n_selected": 0}, "an integer"),
        ("constant", {"weights": [0.0, 0.0]}, "not all 0"),
        ("constant", {"weights": [1.0, -1.0]}, "weights >= 0"),
    ],
)
def test_mistakes_are_explained(name, options, message):
    with pytest.raises(ConfigError, match=message):
        aggregators.get(name, **options)
