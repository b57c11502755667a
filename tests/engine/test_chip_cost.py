"""What is read off the programs of chips' compilers: against counts by hand.

Programs with loops are compiled for the CPU by the test; what only GPUs and TPUs print is written
out, as their compilers print it.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from jaxmoo.engine.chip_cost import REST, Sent, cycles, launches, part_of, sent
from jaxmoo.engine.hlo import Program

X = jax.ShapeDtypeStruct((16, 16), jnp.float32)


def looped(x):
    """Products: one, 3 x 5 in loops of known length, one per round of a loop of unknown length."""

    def inner(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.sin(x @ x), x)

    x = jax.lax.fori_loop(0, 3, lambda _, x: inner(x), x @ x)
    return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: jnp.cos(x @ x), x)


@pytest.fixture(scope="module")
def compiled():
    return Program(jax.jit(looped).lower(X).compile().as_text())


def test_known_loops_multiply_and_others_stand_apart(compiled):
    products = [
        visit
        for visit in compiled.walk(into=None)
        if visit.instruction.opcode in ("dot", "custom-call")
    ]
    known = sum(visit.times for visit in products if not visit.loops)
    assert known == 1 + 3 * 5
    (unknown,) = (visit for visit in products if visit.loops)
    assert unknown.times == 1
    assert unknown.loops[0].endswith("while")


def test_an_instruction_knows_its_bytes_and_operands(compiled):
    product = next(v for v in compiled.walk(into=None) if v.instruction.opcode == "dot")
    assert product.instruction.nbytes == 16 * 16 * 4
    mine = compiled.computations[product.computation]
    assert all(mine[name].nbytes == 16 * 16 * 4 for name in product.instruction.operands)


def program(text: str) -> Program:
    """Write out what the texts below leave short, as compilers do."""
    text = text.replace("PAIR", "(s32[], MAT)").replace("MAT", "bf16[1024,1024]{1,0:T(8,128)}")
    text = text.replace("PIECE", "bf16[256,1024]{1,0:T(8,128)}")
    text = text.replace("among=4", "replica_groups={{0,1,2,3}}")
    for short, written in (
        (r"from=([^\s,]+)", r'metadata={op_name="jit(step)/\1"}'),
        (r"cycles=(\d+)", r'backend_config={"window_config":{"estimated_cycles":"\1"}}'),
        (r"rounds=(\d+)", r'backend_config={"known_trip_count":{"n":"\1"}}'),
    ):
        text = re.sub(short, written, text)
    return Program(text)


GPU = """HloModule step, is_scheduled=true, num_partitions=4

%gemm (a: bf16[1024,1024]) -> bf16[1024,1024] {
  %a = MAT parameter(0)
  ROOT %dot = MAT dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%small (b: bf16[8,4096]) -> f32[8,8] {
  %b = bf16[8,4096]{1,0} parameter(0)
  ROOT %gram = f32[8,8]{1,0} dot(%b, %b), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%body (p: (s32[], bf16[1024,1024])) -> (s32[], bf16[1024,1024]) {
  %p = PAIR parameter(0)
  %x = MAT get-tuple-element(%p), index=1
  %hidden = ((MAT), bf16[4096,1024]{1,0}) all-gather-start(%x), among=4, dimensions={0}
  %product = MAT fusion(%x), calls=%gemm, from=jvp()/dot_general
  %hidden.done = bf16[4096,1024]{1,0} all-gather-done(%hidden)
  %bare = ((MAT), MAT) all-to-all-start(%product), among=4
  %gram = f32[8,8]{1,0} fusion(%x), calls=%small, from=transpose(jvp())/gram/dot_general
  %bare.done = MAT all-to-all-done(%bare)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %out = PAIR tuple(%i, %bare.done)
}

%cond (p: (s32[], bf16[1024,1024])) -> pred[] {
  %p = PAIR parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: (s32[], bf16[1024,1024])) -> f32[8,8] {
  %x = PAIR parameter(0)
  %loop = PAIR while(%x), condition=%cond, body=%body, rounds=7
  %rest = PAIR while(%loop), condition=%cond, body=%body, from=unknown
  %y = MAT get-tuple-element(%rest), index=1
  %all = MAT all-reduce(%y), among=4, to_apply=%small
  ROOT %last = f32[8,8]{1,0} fusion(%all), calls=%small, from=optimizer/add
}
"""
MATRIX = 1024 * 1024 * 2


def test_a_gpu_starts_kernels_but_no_ends_tuples_or_known_conditions():
    found = launches(program(GPU))
    # Of a round: two communications, a product and a Gram matrix.
    assert found.parts == {
        "conflicts: Gram matrices": 7,
        "forward pass": 7,
        "optimiser": 1,
        REST: 7 * 2 + 1,
    }
    assert found.total == 7 * 4 + 2 and found.conflicts == 7
    # The host has to look at the condition of the other loop, too.
    assert found.per_round == {"jit(step)/unknown": 4 + 1}


def test_what_is_sent_is_hidden_only_where_a_large_product_runs_beside_it():
    found = sent(program(GPU))
    assert found["all-gather"] == Sent((7 + 1) * 3 * MATRIX, 0)
    exchanged = (7 + 1) * 3 * MATRIX // 4
    assert found["all-to-all"] == Sent(exchanged, exchanged)
    assert found["all-reduce"] == Sent(2 * 3 * MATRIX // 4, 2 * 3 * MATRIX // 4)


ASYNC = """HloModule step, is_scheduled=true, num_partitions=4

%wrapped (g: MAT) -> MAT {
  %g = MAT parameter(0)
  ROOT %inner = MAT all-to-all(%g), among=4, dimensions={0}
}

%gemm (a: MAT) -> MAT {
  %a = MAT parameter(0)
  ROOT %dot = MAT dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: MAT) -> MAT {
  %x = MAT parameter(0)
  %first = ((MAT), MAT) async-start(%x), calls=%wrapped
  %product = MAT fusion(%x), calls=%gemm
  %first.done = MAT async-done(%first), calls=%wrapped
  %second = ((MAT), MAT) async-start(%product), calls=%wrapped
  ROOT %second.done = MAT async-done(%second), calls=%wrapped
}
"""


def test_communication_that_is_wrapped_is_found_where_it_begins_and_ends():
    one = 3 * MATRIX // 4
    assert sent(program(ASYNC)) == {"all-to-all": Sent(2 * one, one)}


TPU = """HloModule step, is_scheduled=true, num_partitions=4

%gather (g: bf16[256,1024]) -> bf16[1024,1024] {
  %g = PIECE parameter(0)
  ROOT %gathered = MAT all-gather(%g), among=4, dimensions={0}
}

%beside (g: bf16[256,1024], a: bf16[1024,1024]) -> bf16[1024,1024] {
  %g = PIECE parameter(0)
  %a = MAT parameter(1)
  %again = MAT all-gather(%g), among=4, dimensions={0}
  ROOT %product = MAT convolution(%a, %a), dim_labels=bf_io->bf
}

%body (p: (s32[], bf16[1024,1024])) -> (s32[], bf16[1024,1024]) {
  %p = PAIR parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = MAT get-tuple-element(%p), index=1
  %piece = PIECE slice(%x), slice={[0:256], [0:1024]}, from=jvp()/slice, cycles=50
  %async-collective-start = MAT fusion(%piece), calls=%gather
  %product = MAT fusion(%piece, %x), calls=%beside, from=transpose(jvp())/dot_general, cycles=1000
  %async-collective-done = MAT fusion(%product), calls=%gather
  ROOT %out = PAIR tuple(%i, %async-collective-done)
}

%known (p: (s32[], bf16[1024,1024])) -> pred[] {
  %n = s32[] constant(28)
  %p = PAIR parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%unknown (p: (s32[], bf16[1024,1024])) -> pred[] {
  %n = s32[] constant(30)
  %p = PAIR parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %lt = pred[] compare(%i, %n), direction=LT
  ROOT %go = pred[] and(%lt, %lt)
}

ENTRY %main (x: (s32[], bf16[1024,1024])) -> (s32[], bf16[1024,1024]) {
  %x = PAIR parameter(0)
  %loop = PAIR while(%x), condition=%known, body=%body
  %solve = PAIR while(%loop), condition=%unknown, body=%body, from=solve/while
  %y = MAT get-tuple-element(%solve), index=1
  %odd = MAT copy(%y), cycles=9223372036854775807
  ROOT %z = PAIR tuple(%x, %odd)
}
"""


def test_cycles_are_summed_over_loops_whose_condition_is_a_counter():
    found = cycles(program(TPU))
    assert found.parts == {"backward pass": 28 * 1000, "forward pass": 28 * 50}
    assert found.per_round == {"jit(step)/solve/while": 1050}


def test_a_gather_that_is_part_of_three_fusions_is_sent_once_and_hidden():
    assert sent(program(TPU)) == {"all-gather": Sent((28 + 1) * 3 * MATRIX // 4, 0)}


SCATTER = """HloModule step, is_scheduled=true, num_partitions=4

%all-reduce-scatter.3.clone (g: MAT, h: MAT) -> (PIECE, PIECE) {
  %g = MAT parameter(0)
  %h = MAT parameter(1)
  %all = (MAT, MAT) all-reduce(%g, %h), among=4, to_apply=%add
  %first = MAT get-tuple-element(%all), index=0
  %second = MAT get-tuple-element(%all), index=1
  %mine = PIECE dynamic-slice(%first), dynamic_slice_sizes={256,1024}
  %other = PIECE dynamic-slice(%second), dynamic_slice_sizes={256,1024}
  ROOT %both = (PIECE, PIECE) tuple(%mine, %other)
}

ENTRY %main (x: MAT) -> (PIECE, PIECE) {
  %x = MAT parameter(0)
  ROOT %fusion = (PIECE, PIECE) fusion(%x, %x), kind=kCustom, calls=%all-reduce-scatter.3.clone
}
"""


def test_a_sum_of_which_every_device_keeps_a_piece_is_a_reduce_scatter():
    one = 2 * 3 * MATRIX // 4
    assert sent(program(SCATTER)) == {"reduce-scatter": Sent(one, one)}


MESSAGES = """HloModule step, is_scheduled=true, num_partitions=4

%gemm (a: MAT) -> MAT {
  %a = MAT parameter(0)
  ROOT %dot = MAT dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: MAT) -> MAT {
  %x = MAT parameter(0)
  %after = token[] after-all()
  %within = MAT all-reduce(%x), among=4, to_apply=%add
  %recv = (MAT, u32[], token[]) recv(%after), channel_id=1, to="first"
  %send = (MAT, u32[], token[]) send(%within, %after), channel_id=2, to="first"
  %product = MAT fusion(%x), calls=%gemm
  %send-done = token[] send-done(%send), channel_id=2
  %recv-done = (MAT, token[]) recv-done(%recv), channel_id=1
  %send.1 = (MAT, u32[], token[]) send(%product, %after), channel_id=4, to="second"
  %recv.1 = (MAT, u32[], token[]) recv(%after), channel_id=3, to="second"
  %recv-done.1 = (MAT, token[]) recv-done(%recv.1), channel_id=3
  ROOT %all = MAT get-tuple-element(%recv-done.1), index=0
}
""".replace(
    "to=",
    'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}, '
    "_xla_host_transfer_rendezvous=",
)


def test_what_tpus_hand_to_their_hosts_goes_between_slices():
    one = 2 * MATRIX // 2  # both slices have the sum when each has sent its half, twice
    assert sent(program(MESSAGES), slices=2, devices=8) == {
        "all-reduce": Sent(2 * 3 * MATRIX // 4, 2 * 3 * MATRIX // 4),
        "all-reduce between slices": Sent(2 * one, one),
    }


GROUPS = """HloModule step, is_scheduled=true, num_partitions=8

ENTRY %main (x: MAT) -> MAT {
  %x = MAT parameter(0)
  ROOT %all = MAT all-reduce(%x), GROUPS, to_apply=%add
}
"""


@pytest.mark.parametrize(
    ("groups", "size", "between"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4, False),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", 2, True),
        ("replica_groups={}", 8, True),
        ("replica_groups=[2,4]<=[8]", 4, False),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2, True),
        ("replica_groups=mesh['data'=2,'fsdp'=4]{'fsdp'}", 4, False),
        ("replica_groups=mesh['data'=2,'fsdp'=4]{'data'}", 2, True),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", 4, False),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", 2, True),
        ("replica_groups=mesh['data'=4,'fsdp'=2] {'data':(1)2}", 2, True),
        ("replica_groups=mesh['data'=4,'fsdp'=2] {'data':(2)2,'fsdp'}", 4, False),
    ],
)
def test_communication_of_two_slices_is_told_by_its_groups(groups, size, between):
    count = 2 * MATRIX * (size - 1) // size
    name = "all-reduce" + " between slices" * between
    given = program(GROUPS.replace("GROUPS", groups))
    assert sent(given, slices=2) == {name: Sent(count, count)}
    assert sent(given) == {"all-reduce": Sent(count, count)}


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("jit(step)/vmap(transpose(jvp()))/jit(_resolve_call)/exchange/all_to_all", "exchange"),
        (
            "jit(step)/vmap(transpose(jvp()))/rematted_computation/gather_pieces/all_gather",
            "gather",
        ),
        ("jit(step)/vmap(transpose(jvp()))/jit(_resolve_call)/solve/vmap()/while", "conflicts: so"),
        ("jit(step)/vmap(transpose(jvp()))/checkpoint/rematted_computation/mul", "recomputed"),
        ("jit(step)/vmap(transpose(jvp()))/checkpoint/dot_general", "backward"),
        ("jit(step)/vmap(transpose(vmap(jvp(jit(resolve)))))/while/body/dot_general", "vocab"),
        ("", "everything else"),
    ],
)
def test_parts_are_told_by_the_operations_names(source, part):
    assert part_of(source).startswith(part)
