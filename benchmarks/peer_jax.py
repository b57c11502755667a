"""jaxmoo's contestants of peers.py, one per process."""

from __future__ import annotations

import argparse

import jax
import numpy as np
import peer_common
import programs
import running
from common import prepare
from programs import PLAIN, Kind

from jaxmoo.hf.names import hf_tensor
from jaxmoo.models import logical_paths, named_leaves


def main() -> None:
    parser = peer_common.parser(__doc__)
    parser.add_argument("--contestant", required=True, choices=["plain", "backward", "stacked"])
    flags = parser.parse_args()
    if flags.platform == "cpu":
        prepare(flags.threads)
    running.choose_platform(flags.platform)
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.ones(3)))
    base = peer_common.memory_now()
    kind = {
        "plain": PLAIN,
        "backward": Kind("backward", flags.method, "layer"),
        "stacked": Kind("stacked", flags.method, "whole"),
    }[flags.contestant]
    step = programs.step(settings(flags), flags.languages, flags.layers, kind)
    (program,) = running.compile_steps([step])
    weights = running.Weights(
        named_parameters(step.arguments[0].params), running.empty_optimizer(step), step.arguments[1]
    )
    vocabulary = programs.shape(settings(flags), flags.layers).vocab_size
    shape = step.arguments[2]["tokens"].shape

    def one(number: int) -> tuple[float, float, np.ndarray]:
        nonlocal weights
        batch = peer_common.tokens(flags, number, vocabulary).reshape(shape)
        weights, losses, took = program.run(weights, running.batch_of(batch))
        return took.wall, took.cpu, np.asarray(losses)

    peer_common.serve(one, base, running.device_peak)


def settings(flags: argparse.Namespace) -> argparse.Namespace:
    """The flags that `programs` reads."""
    parser = argparse.ArgumentParser()
    programs.add_flags(parser)
    defaults = vars(parser.parse_args([]))
    mine = {name: value for name, value in vars(flags).items() if name in defaults}
    rate = {"learning_rate": peer_common.LEARNING_RATE}
    return argparse.Namespace(**defaults | mine | rate)


def named_parameters(params: object) -> object:
    """The parameters that the peers have under the same names."""
    leaves = []
    for path, leaf in named_leaves(params):
        each = []
        for name in logical_paths(path, leaf.shape):
            tensor = hf_tensor(name)
            shape = leaf.shape[1:] if path[0] == "layers" else leaf.shape
            value = peer_common.weight(tensor.name, shape[::-1] if tensor.transposed else shape)
            each.append(value.T if tensor.transposed else value)
        whole = np.stack(each) if path[0] == "layers" else each[0]
        leaves.append(jax.device_put(whole, leaf.sharding))
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


if __name__ == "__main__":
    main()
