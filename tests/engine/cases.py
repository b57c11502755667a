"""Ways of resolving the toy model that are run on one device and on several meshes.

Each names a toy, K and options. What it must give is defined by the stacked oracle, which needs no
mesh, so one oracle serves all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from engine.toy import Toy, batches, run_engine, run_oracle
from jaxmoo import aggregators, blocks
from jaxmoo.mesh import make_mesh

# One that keeps state and one that draws random numbers.
KINDS = ("moco", "pcgrad")
# Those that work coordinate by coordinate; the first draws random numbers for each.
COORDINATES = ("graddrop", "trimmed_mean")
# sdmgrad and modo need a second batch per step.
METHODS = tuple(name for name in aggregators.names() if name not in ("sdmgrad", "modo"))


PLAIN = Toy()


def unchanged(batch: Any) -> Any:
    """Return a batch as it is."""
    return batch


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of resolving; see :func:`jaxmoo.engine.resolved_value_and_grad`.

    Attributes:
      toy: the model.
      k: K.
      blocks: the rule; "shard" becomes as many parts as there are pieces of a parameter.
      aggregator: as the engine takes it; several names are dealt out over the blocks.
      steps: how many are taken one after another.
      options: other options that the oracle takes too.
      only_engine: options that must not change the result.
      change: what is done to a batch.
    """

    toy: Toy = PLAIN
    k: int = 8
    blocks: Any = "layer"
    aggregator: Any = KINDS
    steps: int = 2
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    only_engine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    change: Callable[[Any], Any] = unchanged

    def engine(self, mesh: Any, pieces: int | None = None) -> dict[str, np.ndarray]:
        """What the backward pass gives on a mesh; "shard" means its pieces if none are given."""
        arguments = self._arguments(pieces or mesh.shape["language"] * mesh.shape["fsdp"])
        if pieces is None:
            arguments["blocks"] = self.blocks
        return run_engine(self.toy, self._batches(), mesh=mesh, **arguments, **self.only_engine)

    def oracle(self, pieces: int) -> dict[str, np.ndarray]:
        """What it must give."""
        return run_oracle(self.toy, self._batches(), **self._arguments(pieces))

    def _batches(self) -> list[Any]:
        return [self.change(batch) for batch in batches(self.k, self.steps)]

    def _arguments(self, pieces: int) -> dict[str, Any]:
        rule = f"shard:{pieces}" if self.blocks == "shard" else self.blocks
        aggregator = self.aggregator
        if isinstance(aggregator, tuple):
            names = blocks.partition(rule, self.toy.params, stacked=self.toy.stacked).names
            aggregator = {
                f"^({'|'.join(map(re.escape, names[i :: len(aggregator)]))})$": method
                for i, method in enumerate(aggregator[: len(names)])
            }
        return {"blocks": rule, "aggregator": aggregator, **self.options}


def method(name: str, k: int) -> Any:
    """An aggregator by name, with the options it cannot do without."""
    options = {"weights": np.arange(1, k + 1)} if name == "constant" else {}
    return aggregators.get(name, **options)


def kind_of_array(path: str) -> str:
    """A block across all layers for each kind of array, and one for the rest."""
    return path.rsplit(".", 1)[-1] if "layers" in path else "rest"


def one_not_finite(batch: Any) -> Any:
    """The gradients of objective 2 are NaN."""
    return batch | {"factor": batch["factor"].at[2, 1].set(jnp.nan)}


def one_absent(batch: Any) -> Any:
    """Objective 2 has no target tokens."""
    return batch | {"mask": batch["mask"].at[2].set(False)}


def by_hand(batch: Any) -> Any:
    """Objective k sends tokens to expert k modulo 4 and the next, and never to the others."""
    own, shape = np.arange(8)[:, None, None], batch["tokens"].shape
    expert = np.random.default_rng(0).integers(0, 2, shape)
    return batch | {"expert": jnp.asarray((own + expert) % 4)}


def outside_of_blocks(params: Any) -> tuple[Any, Any]:
    """A mask, a map, penalties; "layers.mix" is read in blocks only."""
    layers, head = params["layers"], jax.tree.map(jnp.tanh, params["head"])
    mlp = jax.tree.map(lambda p: p * (jnp.arange(p.size) % 5 > 0).reshape(p.shape), layers["mlp"])
    squares = sum(jnp.vdot(p, p) for p in jax.tree.leaves(layers["mlp"]))
    penalty = 0.3 * squares + optax.tree.norm(params["embed"])
    return {**params, "layers": {**layers, "mlp": mlp}, "head": head}, penalty


MESHES = {"2x2": (1, 2, 2), "8x1": (1, 8, 1), "4x2": (1, 4, 2), "2x2x2": (2, 2, 2)}
LAYERS_OF_METHODS = {rf"^layers\.{i}$": method(name, 8) for i, name in enumerate(METHODS)}

PREFERRED = Case(
    aggregator=("moco", "pcgrad", "graddrop"),
    options={"preference": [1, 2, 3, 4, 4, 3, 2, 1], "match_norm": True},
)

# A compiled program takes seconds: kinds of blocks, models and options share cases.
CASES = {
    # Each layer has another aggregator.
    "aggregators": Case(
        toy=Toy(layers=len(METHODS)), aggregator={**LAYERS_OF_METHODS, ".*": "mean"}
    ),
    "layer, with preference and norm": PREFERRED,
    "accumulated": dataclasses.replace(
        PREFERRED, only_engine={"microbatches": 4, "accumulation": "accumulate_first"}
    ),
    "module, one objective absent": Case(blocks="module", change=one_absent),
    "leaf, tied and shared": Case(
        toy=Toy(tied=True, shared=True), blocks="leaf", aggregator=("graddrop", "pcgrad")
    ),
    "bytes within layers, tied, five objectives": Case(
        k=5,
        toy=Toy(tied=True),
        blocks=blocks.intersect("layer", "bytes:512"),
        aggregator=COORDINATES,
    ),
    "shard": Case(blocks="shard"),
    "a rule for each part, nine objectives": Case(
        k=9,
        blocks=blocks.choose(
            {
                r"\.bias$": "module",
                r"\.mlp\.": "whole",
                r"^layers\.": "bytes:1600",
                ".*": "random:2",
            }
        ),
    ),
    "a function, stack in a loop, not finite": Case(
        toy=Toy(layers=2, form="loop"), blocks=kind_of_array, change=one_not_finite
    ),
    "tied in a loop, three objectives": Case(
        k=3,
        toy=Toy(layers=2, tied=True, form="loop"),
        blocks="module",
        aggregator=("moco", "graddrop"),
    ),
    "separate layers": Case(
        toy=Toy(layers=2, form="list", tied=True, shared=True), aggregator="moco"
    ),
    "sketched, module, one objective absent": Case(
        blocks="module",
        aggregator=("moco", "pcgrad", "cagrad"),
        change=one_absent,
        options={"gram": "sketch:64"},
    ),
    "sketched, one at a time": Case(
        blocks="module",
        aggregator=("moco", "pcgrad", "cagrad"),
        change=one_absent,
        options={"gram": "sketch:64"},
        only_engine={"keep": "one"},
    ),
    "sketched, nine objectives, not finite, with preference and norm": Case(
        only_engine={"keep": "one"},
        k=9,
        aggregator=("upgrad", "nash_mtl"),
        change=one_not_finite,
        options={
            "gram": "sketch:40",
            "preference": [1, 2, 3, 4, 5, 4, 3, 2, 1],
            "match_norm": True,
        },
    ),
    "sketched, shard": Case(blocks="shard", options={"gram": "sketch:30"}, steps=1),
    "expert, sent by hand": Case(
        toy=Toy(layers=2, experts=4),
        blocks="expert",
        aggregator=("mean", "mgda", "cagrad", "pcgrad", "upgrad"),
        change=by_hand,
        steps=1,
    ),
    "read outside of blocks": Case(toy=Toy(before=outside_of_blocks), aggregator="pcgrad", steps=1),
}

# What options of the engine alone do not change.
SAME = {
    "accumulated": "layer, with preference and norm",
    "sketched, one at a time": "sketched, module, one objective absent",
}

# Where each is run.
RUNS = {
    "one device": [
        "accumulated",
        "leaf, tied and shared",
        "shard",
        "a rule for each part, nine objectives",
        "separate layers",
    ],
    "2x2": [
        "expert, sent by hand",
        "layer, with preference and norm",
        "shard",
        "tied in a loop, three objectives",
        "read outside of blocks",
        "sketched, shard",
        "sketched, one at a time",
    ],
    "8x1": ["accumulated", "leaf, tied and shared", "a rule for each part, nine objectives"],
    "4x2": [
        "expert, sent by hand",
        "bytes within layers, tied, five objectives",
        "a function, stack in a loop, not finite",
        "sketched, nine objectives, not finite, with preference and norm",
    ],
    "2x2x2": [
        "aggregators",
        "module, one objective absent",
        "separate layers",
        "sketched, module, one objective absent",
    ],
}
# These run on the last of the meshes; what they give is defined in test_replicas.py.
REPLICAS = {
    "replicas alone": Case(
        aggregator="pcgrad", steps=1, only_engine={"replicas": "resolve_then_mean"}
    ),
    "replicas pooled": Case(aggregator="pcgrad", steps=1, only_engine={"replicas": "pooled_gram"}),
}


def on_mesh(mesh: str, name: str) -> dict[str, np.ndarray]:
    """What a case gives on a mesh of the first of this program's devices, every replica a slice.

    Where there are several, devices lie in another order than JAX's.
    """
    case, (data, language, fsdp) = (CASES | REPLICAS)[name], MESHES[mesh]
    devices = jax.devices()[: data * language * fsdp]
    if data > 1:
        devices = random.Random(0).sample(devices, len(devices))
    sizes = {"data": data, "slices": data, "language": language, "fsdp": fsdp}
    return case.engine(make_mesh(case.k, **sizes, devices=devices))


def wanted(name: str, pieces: int = 1) -> dict[str, np.ndarray]:
    """What a case must give where parameters are cut into some number of pieces."""
    name = SAME.get(name, name)
    return _wanted(name, pieces if CASES[name].blocks == "shard" else 1)


@functools.cache
def _wanted(name: str, pieces: int) -> dict[str, np.ndarray]:
    return CASES[name].oracle(pieces)
