"""Finding an aggregator by name."""

from __future__ import annotations

import pkgutil
import re
import sys

import jax.numpy as jnp
import pytest

from jaxmoo import aggregators, blocks
from jaxmoo.aggregators import aggregator, methods
from jaxmoo.config.resolve_checks import check_resolve
from jaxmoo.config.resolve_section import ResolveConfig
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


OWN = """
import jax.numpy as jnp
from jaxmoo.aggregators import Aggregator

def weigh(gram, active, preference, state, key):
    return preference, state

def shared(power: float = 1.0):
    return Aggregator(f"shared{power:g}", weigh)

ready = Aggregator("ready", weigh)
number = 3

def nothing():
    return None

def head_or_body(path):
    return "head" if "head" in path else "body"
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module in the working directory."""
    (tmp_path / "own_methods.py").write_text(OWN)
    (tmp_path / "broken_methods.py").write_text("1 / 0")
    (tmp_path / "needy_methods.py").write_text("import there_is_no_such_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_method_of_ones_own_is_found_by_where_it_lies(own_module):
    method = aggregators.get("own_methods:shared", power=2)
    assert method.name == "shared2"
    assert aggregators.get("own_methods:shared", power=2) is method
    assert aggregators.get("own_methods:ready").name == "ready"
    rule = blocks.get("own_methods:head_or_body")
    params = {"head": jnp.zeros(1), "layer": jnp.zeros(2)}
    assert set(blocks.partition(rule, params).names) == {"head", "body"}


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("no_methods:shared", {}, "there is no module 'no_methods'"),
        ("own_methods:shraed", {}, "has no 'shraed'. Did you mean 'shared'"),
        ("own_methods:number", {}, "expected an aggregator, or a function .* found int"),
        ("own_methods:nothing", {}, "it returned NoneType"),
        ("own_methods:shared", {"pwoer": 2}, "Unknown option 'pwoer' .* Did you mean 'power'"),
        ("own_methods:ready", {"power": 2}, "cannot change the ready-made"),
        ("broken_methods:x", {}, "importing broken_methods failed: ZeroDivisionError"),
        ("needy_methods:x", {}, "needy_methods needs there_is_no_such_package"),
    ],
)
def test_what_is_wrong_with_it_is_said(own_module, path, options, message):
    with pytest.raises(ConfigError, match=message):
        aggregators.get(path, **options)
    problems = check_resolve(ResolveConfig(aggregator=path, options=options), ["de"])
    assert len(problems) == 1 and re.search(message, problems[0])


def test_blocks_of_ones_own_are_a_function_of_the_path(own_module):
    with pytest.raises(ConfigError, match="expected a function from a parameter's path"):
        blocks.get("own_methods:number")
    assert check_resolve(ResolveConfig(blocks="own_methods:head_or_body"), ["de"]) == []


def test_a_registered_method_has_a_name(monkeypatch):
    monkeypatch.setattr(aggregator._registry, "_factories", {**aggregator._registry._factories})

    @aggregators.register
    def mine(share: float = 1.0):
        return aggregators.Aggregator("mine", lambda *a: None)

    assert aggregators.get("mine", share=0.5) is mine(share=0.5)
