"""What a step does on GPUs and TPUs, interpreted on a CPU: the update stays the same."""

import contextlib
import dataclasses

import jax
import pytest

from engine import test_decoder
from engine.cases import Case
from engine.toy import assert_same
from jaxmoo.engine.layout import Topology
from jaxmoo.mesh import make_mesh


@contextlib.contextmanager
def as_on(platform: str):
    """Make engines take any mesh's devices for those of a platform."""
    of = Topology.of.__func__

    def changed(cls, *arguments):
        return dataclasses.replace(of(cls, *arguments), platform=platform)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Topology, "of", classmethod(changed))
        yield


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["interpret", "interpret-tpu"])
def test_solves_in_kernels_give_the_stacked_oracles_update(platform):
    case = Case(aggregator={"mix": "mgda", ".*": "cagrad"}, blocks="module")
    mesh = make_mesh(8, devices=jax.devices()[:1])
    with as_on(platform):
        found = case.engine(mesh)
    assert_same(found, case.oracle(pieces=1))


def decoder_on_mesh(case: str, platform: str, language: int, fsdp: int):
    """A decoder whose table and products are exchanged in the form that a platform wants."""
    devices = jax.devices()[: language * fsdp]
    mesh = make_mesh(test_decoder.LANGUAGES, language=language, fsdp=fsdp, devices=devices)
    with as_on(platform):
        return test_decoder.found(case, mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "language", "fsdp"),
    [("tied, sliced", 2, 2), ("untied, sliced, random numbers", 4, 2)],
)
def test_what_tpus_exchange_in_pieces_is_the_same(case, language, fsdp, eight_devices):
    where = ("engine.test_kernels", "decoder_on_mesh", case, "interpret-tpu", language, fsdp)
    test_decoder.assert_near(eight_devices(*where), test_decoder.wanted(case))
