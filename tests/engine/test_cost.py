"""What a program costs: counts of the compiled program against counts by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo.engine.cost import collective_bytes, flops, memory, traced_collective_bytes

BOTH = ("a", "b")


def total(x):
    return jax.lax.psum(x, "b")


def shift(x):
    return jax.lax.ppermute(x, "a", [(0, 1), (1, 2), (2, 3), (3, 0)])


def looped(x):
    def inner(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(total(x)), None), x, length=5)[0]

    return jax.lax.fori_loop(0, 7, lambda _, x: inner(x), shift(x))


# Every kind of communication, among all devices and among groups, in no loop, in nested loops, and
# in a loop whose length depends on the data.
PROGRAMS = {
    "gather": lambda x: jax.lax.all_gather(x, BOTH, tiled=True).sum() * x,
    "scatter": lambda x: jax.lax.psum_scatter(jnp.tile(x, 8), BOTH, tiled=True),
    "exchange": lambda x: jax.lax.all_to_all(jnp.tile(x, 4), "a", 0, 0, tiled=True)[:3],
    "total": total,
    "shift": shift,
    "looped": looped,
    "unknown": lambda x: jax.lax.while_loop(
        lambda x: x.sum() > 0, lambda x: jnp.sin(total(x)), shift(x)
    ),
}


def what_is_sent():
    """What each program sends on 4 x 2 devices: compiled, traced, and traced in bfloat16."""
    mesh = jax.make_mesh((4, 2), BOTH, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((8 * 3,), jnp.float32)  # 3 numbers, 12 bytes, on each device

    def sent(f):
        run = jax.jit(
            jax.shard_map(f, mesh=mesh, in_specs=P(BOTH), out_specs=P(BOTH), check_vma=False)
        )
        traced = traced_collective_bytes(run.trace(x).jaxpr)
        half = traced_collective_bytes(run.trace(x.update(dtype=jnp.bfloat16)).jaxpr)
        return collective_bytes(run.lower(x).compile()), traced, half

    def moved(axes):  # left to the compiler
        spread, wanted = (NamedSharding(mesh, P(a)) for a in (BOTH, axes))
        x = jax.ShapeDtypeStruct((8 * 3,), jnp.float32, sharding=spread)
        return collective_bytes(jax.jit(lambda x: x, out_shardings=wanted).lower(x).compile())

    def between(axis):
        mesh = jax.make_mesh((2, 4), ("data", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        add = jax.shard_map(
            lambda x: jax.lax.psum(x, axis),
            mesh=mesh,
            in_specs=P(("data", "b")),
            out_specs=P(),
            check_vma=False,
        )
        run = jax.jit(add)
        traced = traced_collective_bytes(run.trace(x).jaxpr, slices=2)
        return collective_bytes(run.lower(x).compile(), slices=2), traced

    counted = {name: sent(f) for name, f in PROGRAMS.items()}
    counted |= {"between slices": between(("data", "b")), "within": between("b")}
    return counted | {"moved everywhere": [moved(None)], "moved": [moved("a")]}


@pytest.fixture(scope="module")
def sent(eight_devices):
    return eight_devices("engine.test_cost", "what_is_sent")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gather", {"all-gather": 7 * 12}),  # its piece, to each of the 7 others in turn
        ("scatter", {"reduce-scatter": 7 * 12}),  # 7 of the 8 pieces of an array of 96 bytes
        ("exchange", {"all-to-all": 3 * 12}),  # 3 of the 4 pieces of an array of 48 bytes
        ("total", {"all-reduce": 12}),  # half of the array, there and back
        ("shift", {"collective-permute": 12}),
        ("moved everywhere", {"all-gather": 7 * 12}),
        ("moved", {"all-gather": 12}),
    ],
)
def test_bytes_of_each_kind(sent, name, expected):
    assert sent[name][0] == expected


def test_loops_multiply(sent):
    assert sent["looped"][0] == {"collective-permute": 12, "all-reduce": 7 * 5 * 12}


def test_a_loop_of_unknown_length_is_reported_by_itself(sent):
    assert sent["unknown"][0] == {"collective-permute": 12, "all-reduce per round": 12}


@pytest.mark.parametrize("name", ["gather", "scatter", "exchange", "total", "looped", "unknown"])
def test_the_traced_program_sends_what_the_compiled_one_does(sent, name):
    compiled, traced, half = sent[name]
    assert traced == compiled
    assert half == {kind: count // 2 for kind, count in compiled.items()}


def test_what_slices_send_to_each_other_is_reported_by_itself(sent):
    assert sent["between slices"] == ({"all-reduce between slices": 2 * 12 * 7 // 8},) * 2
    assert sent["within"] == ({"all-reduce": 2 * 12 * 3 // 4},) * 2


def test_one_device_sends_nothing():
    assert collective_bytes(jax.jit(jnp.sin).lower(1.0).compile()) == {}


def test_a_text_that_is_no_program_is_refused():
    class Other:
        def as_text(self):
            return "module @jit_sin"

    with pytest.raises(ValueError, match="expected the text of a compiled program"):
        collective_bytes(Other())


def test_memory_counts_donated_arguments_once():
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)

    def step(x, y):
        return x + y, jnp.sin(jnp.flip(x)) @ jnp.cos(jnp.flip(y))

    kept = memory(jax.jit(step).lower(x, x).compile())
    given = memory(jax.jit(step, donate_argnums=0).lower(x, x).compile())
    assert kept["arguments"] == given["arguments"] == 8000
    assert given["aliased"] == 4000
    assert kept["aliased"] == 0
    for found in (kept, given):
        assert found["outputs"] >= 4004
        assert found["peak"] == (
            found["arguments"] + found["outputs"] - found["aliased"] + found["temporaries"]
        )


X, W = jnp.ones((2, 3, 4)), jnp.ones((4, 5))
PRODUCT = 2 * (2 * 3 * 5) * 4  # of X and W


def product(x, w):
    return jnp.einsum("abc,cd->abd", x, w)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (product, PRODUCT),
        (jax.jit(product), PRODUCT),
        # Two more products for the two arguments.
        (lambda x, w: jax.vjp(product, x, w)[1](jnp.ones((2, 3, 5))), 3 * PRODUCT),
        # And one to compute again what was not kept.
        (
            lambda x, w: jax.grad(
                jax.checkpoint(lambda x, w: jnp.sin(product(x, w)).sum()), argnums=(0, 1)
            )(x, w),
            4 * PRODUCT,
        ),
        (
            lambda x, w: jax.lax.scan(
                lambda c, one: (c, product(x, one)), None, jnp.stack([w] * 6)
            ),
            6 * PRODUCT,
        ),
        (lambda x, w: jax.lax.cond(x.sum() > 0, lambda: product(x, w).sum(), lambda: 0.0), PRODUCT),
        (lambda x, w: jax.vmap(product, (0, None))(jnp.stack([x] * 3), w), 3 * PRODUCT),
    ],
    ids=["plain", "jit", "vjp", "remat", "scan", "cond", "vmap"],
)
def test_flops(function, expected):
    assert flops(jax.make_jaxpr(function)(X, W)) == {"total": expected, "per round": 0}


def test_flops_of_custom_derivatives():
    @jax.custom_vjp
    def f(x, w):
        return product(x, w)

    def backward(kept, ct):
        x, w = kept
        return ct @ w.T, jnp.einsum("abc,abd->cd", x, ct)

    f.defvjp(lambda x, w: (f(x, w), (x, w)), backward)
    program = jax.make_jaxpr(lambda x, w: jax.vjp(f, x, w)[1](jnp.ones((2, 3, 5))))
    assert flops(program(X, W))["total"] == 3 * PRODUCT


def test_flops_of_a_loop_of_unknown_length_are_reported_by_themselves():
    def program(x, w):
        rounds = jnp.int32(x.sum())
        return jax.lax.fori_loop(0, rounds, lambda _, y: y + product(x, w), product(x, w))

    assert flops(jax.make_jaxpr(program)(X, W)) == {"total": PRODUCT, "per round": PRODUCT}


def test_flops_of_a_convolution():
    image, kernel = jnp.ones((2, 3, 8, 8)), jnp.ones((5, 3, 3, 3))
    program = jax.make_jaxpr(lambda x, k: jax.lax.conv(x, k, (1, 1), "SAME"))
    assert flops(program(image, kernel))["total"] == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)


@pytest.mark.parametrize(("manual", "share"), [({"a", "b"}, 1), ({"a"}, 1 / 2)])
def test_flops_are_per_device(manual, share):
    # Inside of shard_map each device has its own product, or its share of what is left to the
    # compiler; outside, an eighth of the whole.
    mesh = jax.sharding.AbstractMesh((4, 2), ("a", "b"))
    everywhere = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        product, mesh=mesh, in_specs=everywhere, out_specs=everywhere, axis_names=manual
    )
    program = jax.make_jaxpr(lambda x, w: (product(x, w), mapped(x, w)))
    assert flops(program(X, W), devices=8)["total"] == PRODUCT / 8 + PRODUCT * share
