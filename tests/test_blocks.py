"""Blocks: every parameter is in exactly one block, and in the one the rule's name promises."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmoo import blocks
from jaxmoo.errors import ConfigError

STACKED = r"^layers\.(\d+)\."


def decoder_tree():
    """A decoder's parameters: layers 22 to 25 stacked, what surrounds them not."""
    layer = {
        "input_layernorm": {"scale": np.zeros((4, 8), np.float32)},
        "mlp": {"up_proj": {"kernel": np.zeros((4, 8, 16), np.float32)}},
        "self_attn": {
            "k_proj": {"kernel": np.zeros((4, 8, 4), np.float32)},
            "q_proj": {"kernel": np.zeros((4, 8, 8), np.float32)},
        },
    }
    return {
        "embed_tokens": {"embedding": np.zeros((32, 8), np.float32)},
        "layers": {"22": layer},
        "norm": {"scale": np.zeros(8, np.float32)},
    }


RULES = [
    "whole",
    "layer",
    "module",
    "leaf",
    "bytes:300",
    "bytes:1KiB",
    "random:5",
    "random:5:1",
    "shard:4",
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stacked", [None, STACKED])
def test_a_partition_covers_every_parameter_once(rule, stacked):
    tree = decoder_tree()
    part = blocks.partition(rule, tree, stacked=stacked)
    leaves = jax.tree.leaves(tree)
    assert len(set(part.names)) == len(part)
    assert sum(part.sizes) == sum(x.size for x in leaves)
    counted = np.zeros(len(part), int)
    for x, numbers in zip(leaves, part.labels, strict=True):
        assert x.size % len(numbers) == 0
        np.add.at(counted, numbers, x.size // len(numbers))
    assert tuple(counted) == part.sizes
    assert all(size > 0 for size in part.sizes)


def test_layer_blocks_carry_the_true_layer_numbers():
    part = blocks.partition("layer", decoder_tree(), stacked=STACKED)
    assert part.names == (
        "embed_tokens", "layers.22", "layers.23", "layers.24", "layers.25", "norm",
    )  # fmt: skip
    assert part.pieces == (1, 4, 4, 4, 4, 1)


def test_module_blocks_are_attention_mlp_and_each_norm():
    part = blocks.partition("module", decoder_tree(), stacked=STACKED)
    assert [n for n in part.names if n.startswith("layers.22")] == [
        "layers.22.input_layernorm", "layers.22.mlp", "layers.22.self_attn",
    ]  # fmt: skip


def test_leaf_blocks_are_single_arrays_of_single_layers():
    part = blocks.partition("leaf", decoder_tree(), stacked=STACKED)
    assert set(part.pieces) == {1}
    assert len(part) == 2 + 4 * 4


def test_unstacked_layers_are_found_by_their_number():
    tree = {"h": [{"w": np.zeros(2)} for _ in range(11)], "Dense_3": {"kernel": np.zeros(3)}}
    part = blocks.partition("layer", tree)
    assert part.names == ("Dense_3", *(f"h.{i}" for i in range(11)))
    assert blocks.partition("module", tree).names == part.names


def test_bytes_blocks_fill_up_in_backward_order_and_cut_what_is_larger():
    limit = 600
    tree = decoder_tree()
    part = blocks.partition(f"bytes:{limit}", tree, stacked=STACKED)
    assert max(part.nbytes) <= limit
    leaf_of = {"embed_tokens": 0, "norm": 5}
    assert part.names[part.labels[leaf_of["norm"]][0]] == "bucket 0"
    embedding = part.labels[leaf_of["embed_tokens"]]
    assert len(embedding) == 2  # 1,024 bytes in two parts
    assert embedding.max() == len(part) - 1


def test_bytes_blocks_hold_whole_layers_or_part_of_one():
    layers = [{"a": np.zeros(4, np.float32), "b": np.zeros(2, np.float32)} for _ in range(4)]
    labels = {}
    for limit in (60, 20):
        part = blocks.partition(f"bytes:{limit}", {"layers": layers})
        labels[limit] = [[n[0] for n in part.labels[2 * i : 2 * i + 2]] for i in range(4)]
    assert labels[60] == [[1, 1], [1, 1], [0, 0], [0, 0]]  # a third layer of 24 bytes would not fit
    assert labels[20] == [[7, 6], [5, 4], [3, 2], [1, 0]]


def test_slices_are_equal_and_must_divide():
    tree = {"embedding": np.zeros((6, 2))}
    assert blocks.partition("slices:3", tree).sizes == (4, 4, 4)
    with pytest.raises(ConfigError, match=r"slices:4 cannot cut embedding of shape \[6, 2\]"):
        blocks.partition("slices:4", tree)


def test_shard_blocks_are_what_each_device_holds():
    tree = {"layers": {"0": np.zeros((3, 8, 2))}, "embed": np.zeros((16, 2)), "odd": np.zeros(5)}
    part = blocks.partition("shard:4", tree, stacked=STACKED.replace(r"\.", r"\.?"))
    embed, layers, odd = ([part.names[i] for i in labels] for labels in part.labels)
    assert embed == [f"embed shard {i}" for i in range(4)]
    assert layers == [f"layers.{n} shard {i}" for n in range(3) for i in range(4)]
    assert odd == ["odd replicated"]


def test_rules_can_be_chosen_by_path_and_intersected():
    tree = decoder_tree()
    chosen = blocks.partition(
        blocks.choose({"embed": "bytes:512", "norm": lambda path: "norms", ".*": "layer"}),
        tree,
        stacked=STACKED,
    )
    assert chosen.names == (
        "bucket 0", "bucket 1", "layers.22", "layers.23", "layers.24", "layers.25", "norms",
    )  # fmt: skip
    both = blocks.partition(blocks.intersect("layer", "slices:2"), tree, stacked=STACKED)
    assert both.names[-2:] == ("norm & norm.scale 0", "norm & norm.scale 1")
    assert len(both) == 2 * (2 + 4 * 4)
    with pytest.raises(ConfigError, match="matches none of"):
        blocks.partition(blocks.choose({"embed": "leaf"}), tree)
    with pytest.raises(ConfigError, match="first match of no parameter"):
        blocks.partition(blocks.choose({".*": "leaf", "embed": "layer"}), tree)


def test_random_blocks_are_balanced_repeatable_and_change_with_the_seed():
    tree = decoder_tree()
    first, again, other = (
        blocks.partition(spec, tree, stacked=STACKED)
        for spec in ("random:5", "random:5", "random:5:7")
    )
    assert max(first.pieces) - min(first.pieces) <= 1
    same = [np.array_equal(a, b) for a, b in zip(first.labels, again.labels, strict=True)]
    differs = [np.array_equal(a, b) for a, b in zip(first.labels, other.labels, strict=True)]
    assert all(same) and not all(differs)


def test_blocks_by_a_function_of_the_path():
    def rule(path):
        return "norms" if "norm" in path else "rest"

    part = blocks.partition(rule, decoder_tree(), stacked=STACKED)
    assert part.names == ("norms", "rest")
    assert part.sizes[0] == 4 * 8 + 8


def test_paths_are_the_same_for_nnx_states_and_plain_dictionaries():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    plain = nnx.to_pure_dict(state)
    paths = [
        [blocks.path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
        for tree in (state, plain)
    ]
    assert paths[0] == paths[1] == ["bias", "kernel"]


def test_describe_lists_every_block_and_the_total():
    text = blocks.describe("layer", decoder_tree(), stacked=STACKED)
    lines = text.splitlines()
    assert len(lines) == 1 + 6 + 1
    assert re.search(r"^total +18 +1,192 ", lines[-1])
    shortened = blocks.describe("leaf", decoder_tree(), stacked=STACKED, max_rows=4)
    assert "... 14 more" in shortened


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("layers", "Did you mean 'layer'"),
        ("bytes", "bytes:SIZE"),
        ("bytes:25Mib", "expected a positive size"),
        ("bytes:0", "expected a positive size"),
        ("random:x", "random:N"),
        ("random:0", "at least 1 block"),
        ("random:19", "at most 18"),
    ],
)
def test_bad_rules_are_refused_with_advice(spec, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        blocks.partition(spec, decoder_tree(), stacked=STACKED)


def test_bad_trees_are_refused():
    with pytest.raises(ConfigError, match="no arrays"):
        blocks.partition("layer", {})
    with pytest.raises(ConfigError, match="matches no parameter path"):
        blocks.partition("layer", decoder_tree(), stacked="^blocks")
    with pytest.raises(ConfigError, match="scalar"):
        blocks.partition("layer", {"layers": np.zeros(())}, stacked="^layers")


def test_experts_of_a_list_are_blocks_and_are_not_cut():
    """Alone, or where the layers are stacked."""
    experts = [{"up": np.zeros((4, 8)), "down": np.zeros((8, 4))}, {"up": np.zeros((4, 8))}]
    names = ("layers.0", "layers.0.mlp.experts.0", "layers.0.mlp.experts.1")
    part = blocks.partition(
        "expert", {"layers": [{"mlp": {"gate": np.zeros(4), "experts": experts}}]}
    )
    assert (part.names, part.sizes, part.sparse) == (names, (4, 64, 32), (False, True, True))
    experts = [np.zeros((2, 8, 4)), np.zeros((2, 8, 4))]
    part = blocks.partition("expert", {"layers": {"0": {"experts": experts}}}, stacked=STACKED)
    assert part.names == tuple(f"layers.{n}.experts.{e}" for n in range(2) for e in range(2))


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"scale": np.zeros(())}, r"expected mlp\.experts\.scale to stack .*found a scalar"),
        (
            {"down": np.zeros((3, 2)), "up": np.zeros((2, 3))},
            r"mlp\.experts\.down has 3 experts .*, but mlp\.experts\.up has 2",
        ),
    ],
)
def test_what_stacks_no_experts_below_that_name_is_refused(experts, message):
    with pytest.raises(ConfigError, match=message):
        blocks.partition("expert", {"mlp": {"experts": experts}})
