"""A solve as one kernel, interpreted on the CPU, finds what XLA's form of the same solver finds."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from aggregators.families import families
from jaxmoo import aggregators
from jaxmoo.block_solve import Group, Resolution
from jaxmoo.blocks.sections import Section
from jaxmoo.kernels.launch import solving_on
from jaxmoo.resolve import resolve_sections

FAMILIES = ("random", "imbalanced", "correlated", "imbalanced low-rank", "zero-row", "opposed")


def problems(k: int, names: Sequence[str] = FAMILIES) -> np.ndarray:
    """Gram matrices of gradients of several families."""
    drawn = families(k, 3 * k)
    return np.asarray([drawn[name] @ drawn[name].T for name in names], np.float32)


@functools.cache
def program(name: str, form: str | None):
    @jax.jit
    def solve(grams: jax.Array, active: jax.Array) -> jax.Array:
        with solving_on(form):
            return aggregators.weigh_blocks(aggregators.get(name), grams, active=active)[0]

    return solve


def weigh(name: str, grams: np.ndarray, form: str | None, absent: tuple[int, ...] = ()):
    active = np.ones(grams.shape[1], bool)
    active[list(absent)] = False
    return np.asarray(program(name, form)(grams, active), np.float64)


@pytest.mark.parametrize(
    ("name", "k"),
    [
        ("cagrad", 5),
        *(
            pytest.param(name, k, marks=pytest.mark.slow)
            for name, k in (
                ("mgda", 8),
                ("dualproj", 4),
                ("upgrad", 3),
                ("nash_mtl", 4),
                ("fairgrad", 6),
                ("aligned_mtl", 7),
                ("imtl_g", 5),
                ("config", 8),
            )
        ),
    ],
)
def test_a_kernel_finds_what_the_compilers_form_finds(name, k):
    # Fair bargaining has no solution for dependent gradients.
    grams = problems(k, FAMILIES[:3] if name in ("nash_mtl", "fairgrad") else FAMILIES)
    gap = weigh(name, grams, "interpret") - weigh(name, grams, None)
    square = np.einsum("bi,bij,bj->b", gap, grams.astype(np.float64), gap)
    largest = np.diagonal(grams, axis1=1, axis2=2).max(1)
    assert np.sqrt(np.maximum(square, 0) / largest).max() < 1e-4


def test_an_absent_objective_changes_nothing_in_a_kernel():
    grams = problems(5)
    rest = np.delete(np.delete(grams, 2, axis=1), 2, axis=2)
    found = weigh("cagrad", grams, "interpret", absent=(2,))
    assert (found[:, 2] == 0).all()
    expected = weigh("cagrad", rest, None)
    np.testing.assert_allclose(np.delete(found, 2, axis=1)[0], expected[0], atol=1e-5)


@functools.cache
def resolution(name: str, form: str | None):
    """All of a resolution, of gradients [K, n] that are one block."""
    method = aggregators.get(name)

    @jax.jit
    def run(gradients: jax.Array, active: jax.Array) -> Resolution:
        return resolve_sections(
            [Section(gradients[:, None], np.zeros(1, int), lambda *_: jnp.zeros(()))],
            [Group(method, [0])],
            np.zeros(1, int),
            state=[()],
            key=jax.random.key(1),
            active=active,
            preference=jnp.arange(1.0, 1.0 + len(gradients)),
            match_norm=True,
            partitioned=False,
            platform=form,
        )

    return run


@pytest.mark.parametrize(
    ("name", "k"),
    [("pcgrad", 5), *(pytest.param(name, 8, marks=pytest.mark.slow) for name in ("mean", "mgda"))],
)
def test_a_block_is_solved_whole_in_a_kernel(name, k):
    """Masks, preferences, draws, norms: without the absent and what is not finite, as elsewhere."""
    gradients = jax.random.normal(jax.random.key(k), (k, 6)).at[1, 0].set(jnp.nan)
    active = jnp.ones(k, bool).at[3].set(False)
    found, expected = (resolution(name, form)(gradients, active) for form in ("interpret", None))
    assert found.nonfinite.tolist() == [[i == 1 for i in range(k)]]
    for field in ("updates", "gram", "weights", "update_norm", "mean_norm"):
        for x, y in zip(
            *(jax.tree.leaves(getattr(r, field)) for r in (found, expected)), strict=True
        ):
            np.testing.assert_allclose(x, y, atol=1e-5, err_msg=field)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "unit_mean" else pytest.mark.slow)
        for name in aggregators.names()
        if name != "constant" and aggregators.get(name).elementary
    ],
)
def test_what_a_method_calls_elementary_the_kernels_compilers_take(name):
    """All of it: captured arrays, or operations that kernels lack, are errors here."""
    k = 5
    given = jax.ShapeDtypeStruct((k, 6), jnp.float32), jax.ShapeDtypeStruct((k,), bool)
    for form, target in (("gpu", "cuda"), ("tpu", "tpu")):
        lowered = resolution(name, form).trace(*given).lower(lowering_platforms=(target,))
        call = {"gpu": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}[form]
        assert call in lowered.as_text()


def test_a_kernel_is_asked_for_where_solvers_are_traced():
    """Once for all blocks, and nowhere else."""
    grams = jnp.asarray(problems(4))
    for form, kernels in (("interpret", 1), ("gpu", 1), ("tpu", 1), ("cpu", 0), (None, 0)):

        def solve(grams, form=form):
            with solving_on(form):
                return aggregators.weigh_blocks(aggregators.get("cagrad"), grams)[0]

        assert str(jax.make_jaxpr(solve)(grams)).count("pallas_call[") == kernels


def test_tpus_get_no_kernel_where_the_compiler_divides():
    """It cannot divide one."""
    grams = jnp.asarray(problems(4))

    def solve(grams):
        with solving_on("tpu"):
            return aggregators.weigh_blocks(aggregators.get("cagrad"), grams)[0]

    for size, kernels in ((2, 0), (1, 1)):
        with jax.sharding.use_abstract_mesh(AbstractMesh((size,), ("tensor",))):
            assert str(jax.make_jaxpr(lambda x: solve(x))(grams)).count("pallas_call[") == kernels


def test_float64_is_left_to_the_compiler():
    with jax.enable_x64(True):
        grams = jnp.asarray(problems(3), jnp.float64)

        def solve(grams):
            with solving_on("interpret"):
                return aggregators.weigh_blocks(aggregators.get("mgda"), grams)[0]

        jaxpr = jax.make_jaxpr(solve)(grams)
    assert "pallas_call[" not in str(jaxpr)
    assert jaxpr.out_avals[0].dtype == jnp.float64
