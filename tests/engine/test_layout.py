"""How arrays come together from pieces, and gradients to them, on a mesh of virtual devices."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxmoo.engine.layout import Topology, gather, reduce_pieces, scatter
from jaxmoo.mesh import LANGUAGE, PIECES, make_mesh

LANGUAGES, GROUPS = 2, 4
WHOLE = np.arange(16.0 * 3).reshape(16, 3)


def together():
    """An array from its pieces, in one step and in two, and what is sent of its gradients."""
    mesh = make_mesh(LANGUAGES, language=LANGUAGES, fsdp=GROUPS)
    top = Topology.of(mesh, LANGUAGES)
    pieces = P(PIECES)

    def run(function, given, specs, out):
        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
        return np.asarray(jax.jit(mapped)(given))

    def gathered(top):
        return run(lambda x: gather(x, 0, top), WHOLE, pieces, P())

    # Of every language and every share of the examples, a gradient of its own.
    gradients = np.random.default_rng(0).normal(size=(LANGUAGES, GROUPS, *WHOLE.shape))
    by_device = P(LANGUAGE, "fsdp")
    return {
        "one step": gathered(top),
        "two steps": gathered(dataclasses.replace(top, wired_axes=3)),
        "gradients": gradients,
        "scattered": run(lambda x: scatter(x[:, 0], 0, top), gradients, by_device, P(None, PIECES)),
        "reduced": run(lambda x: reduce_pieces(x[0, 0], 0, top), gradients, by_device, pieces),
    }


def test_pieces_come_together_and_gradients_go_to_their_pieces(eight_devices):
    found = eight_devices("engine.test_layout", "together")
    for steps in ("one step", "two steps"):
        np.testing.assert_array_equal(found[steps], WHOLE)
    by_language = found["gradients"].sum(1)
    np.testing.assert_allclose(found["scattered"], by_language, atol=1e-5)
    np.testing.assert_allclose(found["reduced"], by_language.sum(0), atol=1e-5)
