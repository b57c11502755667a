"""Which devices are in one slice: what they say of themselves, and what is asked for."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxmoo.errors import ConfigError
from jaxmoo.slices import by_slice, wired_axes


def devices(*slices, platform="tpu"):
    return [SimpleNamespace(platform=platform, slice_index=index) for index in slices]


def numbers(found):
    return [[device.slice_index for device in some] for some in found]


@pytest.mark.parametrize("given", [None, 2])
def test_tpus_say_which_slice_they_are_in(given):
    assert numbers(by_slice(devices(1, 0, 0, 1), given)) == [[0, 0], [1, 1]]


def test_gpus_are_divided_by_host_only_when_asked():
    hosts = devices(0, 0, 1, 1, platform="gpu")
    assert numbers(by_slice(hosts)) == numbers(by_slice(hosts, 1)) == [[0, 0, 1, 1]]
    assert numbers(by_slice(hosts, 2)) == [[0, 0], [1, 1]]


def test_devices_that_know_of_no_slice_are_in_one():
    plain = [SimpleNamespace(platform="tpu")] * 4
    assert by_slice(plain) == [plain]


def test_of_cpus_equal_runs_stand_for_slices():
    cpus = [SimpleNamespace(platform="cpu", id=i) for i in range(6)]
    assert by_slice(cpus) == [cpus]
    assert by_slice(cpus, 3) == [cpus[:2], cpus[2:4], cpus[4:]]
    with pytest.raises(ConfigError, match=r"mesh.slices \(4\) must divide .* devices \(6\)"):
        by_slice(cpus, 4)


def test_another_number_of_slices_is_refused():
    with pytest.raises(ConfigError, match=r"mesh.slices \(3\): the 4 devices are in 2 slices\."):
        by_slice(devices(0, 0, 1, 1), 3)
    with pytest.raises(ConfigError, match=r"the 2 devices are in 1 slice\."):
        by_slice(devices(0, 0, platform="gpu"), 2)


def test_slices_of_several_sizes_are_refused():
    with pytest.raises(ConfigError, match="slices of one size, found 1, 3 devices"):
        by_slice(devices(1, 0, 1, 1))


@pytest.mark.parametrize(("shape", "axes"), [((1, 1, 1), 0), ((2, 4, 1), 2), ((2, 2, 4), 3)])
def test_a_torus_has_as_many_axes_as_chips_differ_along(shape, axes):
    slices = [(number, place) for number in range(2) for place in np.ndindex(shape)]
    chips = [SimpleNamespace(platform="tpu", slice_index=n, coords=place) for n, place in slices]
    assert wired_axes(chips) == axes
    assert wired_axes(devices(0, 1)) == wired_axes(devices(0, 1, platform="gpu")) == 0
