"""What a step does on a GPU, interpreted on the CPU: the update is that of the compiler's form."""

import dataclasses

import jax
import pytest

from engine.cases import Case
from engine.toy import assert_same
from jaxmoo.engine.layout import Topology
from jaxmoo.mesh import make_mesh


@pytest.mark.slow
def test_solves_in_kernels_give_the_stacked_oracles_update(monkeypatch):
    of = Topology.of.__func__
    monkeypatch.setattr(
        Topology,
        "of",
        classmethod(lambda cls, *args: dataclasses.replace(of(cls, *args), platform="interpret")),
    )
    case = Case(aggregator={"mix": "mgda", ".*": "cagrad"}, blocks="module")
    mesh = make_mesh(8, devices=jax.devices()[:1])
    assert_same(case.engine(mesh), case.oracle(pieces=1))
