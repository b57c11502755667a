"""Meshes: sensible defaults, clear refusals, and nothing left whole without need."""

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
    both = ("language", "fsdp")
    assert found == {
        "layers": {"0": P(None, both, None)},
        "embed": P(both, None),
        "scalar": P(),
    }
    gradients = jax.tree.map(
        lambda s: s.spec, mesh.objective_shardings(one, tree, stacked=r"^layers\.")
    )
    assert gradients["embed"] == P("language", ("fsdp",), None)
