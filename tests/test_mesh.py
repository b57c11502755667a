"""Meshes: sensible defaults, clear refusals, and nothing left whole without need."""

import dataclasses
import itertools
import random
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxmoo import mesh
from jaxmoo.errors import ConfigError


@pytest.mark.parametrize(
    ("languages", "devices", "expected"),
    [
        (8, 1, (1, 1, 1, 1)),
        (8, 8, (1, 8, 1, 1)),
        (4, 8, (1, 4, 2, 1)),
        (6, 8, (1, 2, 4, 1)),
        (7, 8, (1, 1, 8, 1)),
        (64, 8, (1, 8, 1, 1)),
    ],
)
def test_languages_take_the_largest_axis_they_divide(languages, devices, expected):
    assert mesh.mesh_shape(languages, devices) == expected


def test_sizes_given_are_kept():
    assert mesh.mesh_shape(8, 8, language=2) == (1, 2, 4, 1)
    assert mesh.mesh_shape(8, 8, fsdp=4) == (1, 2, 4, 1)
    assert mesh.mesh_shape(8, 8, data=2) == (2, 4, 1, 1)
    assert mesh.mesh_shape(8, 8, data=2, tensor=2) == (2, 2, 1, 2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"language": 2, "fsdp": 2}, "x tensor (1) = 4, but there are 8 devices"),
        ({"language": 16}, "but there are 8 devices"),
        ({"fsdp": 3}, "but there are 8 devices"),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        mesh.mesh_shape(8, 8, **sizes)


def test_groups_without_a_language_are_refused():
    assert mesh.mesh_shape(6, 8, language=4) == (1, 4, 2, 1)  # the last group has places to spare
    with pytest.raises(ConfigError, match="at most the number of languages"):
        mesh.mesh_shape(6, 8, language=8)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU, as far as its place matters."""

    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0


def chips(slices, width, height):
    return [
        Chip(number, (x, y, 0))
        for number in range(slices)
        for y in range(height)
        for x in range(width)
    ]


def arranged(devices, **sizes):
    return mesh.make_mesh(4, devices=devices, **sizes).devices


@pytest.mark.parametrize(("slices", "data"), [(2, None), (2, 4), (4, 4)])
def test_only_data_goes_from_slice_to_slice(slices, data):
    grid = arranged(chips(slices, 4, 4), data=data)
    per_slice = (data or slices) // slices
    for index, replica in enumerate(grid):
        assert {chip.slice_index for chip in replica.flat} == {index // per_slice}
    assert len(set(grid.flat)) == slices * 16


def test_neighbours_in_the_mesh_are_wired():
    grid = arranged(chips(1, 4, 4), language=4, fsdp=4)[0, :, :, 0]
    for lines in (grid, grid.T):
        for line in lines:
            for one, other in itertools.pairwise(line):
                assert sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True)) == 1


def test_the_order_in_which_chips_are_listed_does_not_matter():
    listed = chips(2, 4, 4)
    mixed = random.Random(0).sample(listed, len(listed))
    assert (arranged(listed) == arranged(mixed)).all()


def test_chips_that_are_no_box_stay_in_their_order():
    some = chips(1, 4, 4)[:8] + chips(1, 4, 4)[12:]
    assert arranged(some, language=4).ravel().tolist() == some


def test_a_replica_in_several_slices_is_refused():
    for data in (1, 3):
        with pytest.raises(ConfigError, match=r"a multiple of the number of slices \(2\).*data=2"):
            arranged(chips(2, 4, 4), data=data)


def test_other_devices_stay_in_their_order():
    devices = [dataclasses.replace(chip, platform="gpu") for chip in chips(2, 2, 2)]
    assert arranged(devices, data=1, slices=None).ravel().tolist() == devices
    mixed = random.Random(0).sample(devices, len(devices))
    grid = arranged(mixed, data=2, slices=2)
    assert [{chip.slice_index for chip in replica.flat} for replica in grid] == [{0}, {1}]


def test_tables_of_vectors_are_cut_along_their_vectors():
    assert mesh.sharded_axis("embed_tokens.embedding", (64, 16), 8) == 1
    assert mesh.sharded_axis("embed_tokens.embedding", (64, 3), 8) == 0
    assert mesh.sharded_axis("norm.scale", (3,), 8) is None


def test_parameters_are_cut_along_their_first_divisible_axis():
    one = mesh.make_mesh(8, devices=jax.devices()[:1])
    tree = {
        "layers": {"0": jnp.zeros((8, 4, 16))},
        "embed": jnp.zeros((32, 4)),
        "scalar": jnp.zeros(()),
    }
    found = jax.tree.map(
        lambda s: s.spec, mesh.parameter_shardings(one, tree, stacked=r"^layers\.")
    )
    both = ("fsdp", "language")
    assert found == {
        "layers": {"0": P(None, both, None)},
        "embed": P(both, None),
        "scalar": P(),
    }
    gradients = jax.tree.map(
        lambda s: s.spec, mesh.objective_shardings(one, tree, stacked=r"^layers\.")
    )
    assert gradients["embed"] == P("language", ("fsdp",), None)
