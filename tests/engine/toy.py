"""A small model that is no language model of ours, and how to compare two ways of resolving it.

It holds what the engine has to tell apart: stacked layers that are scanned, indexed in a Python
loop or not stacked at all; a table that may be tied; a weight that may be shared by all layers;
a scalar; and arrays that eight devices divide along their first axis, their second, or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmoo
from jaxmoo.engine import block, resolved_value_and_grad
from jaxmoo.mesh import parameter_shardings

V, D, H, TOKENS, ROWS = 32, 16, 8, 5, 8  # vocabulary, widths, sequence length, examples


@dataclasses.dataclass(frozen=True)
class Toy:
    """One variant of the model.

    Attributes:
      layers: their number.
      tied: whether the table that embeds tokens also scores them.
      shared: whether all layers share one more weight.
      experts: how many experts a layer has; a batch says which of them reads a token, "expert".
      form: "scan" or "loop" over stacked layers, or a "list" of separate ones.
      before: what is done with the parameters outside of blocks: to other parameters, and a
        penalty per example.
    """

    layers: int = 3
    tied: bool = False
    shared: bool = False
    experts: int = 0
    form: str = "scan"
    before: Callable[[Any], tuple[Any, Any]] = lambda params: (params, 0)

    @property
    def stacked(self) -> str | None:
        return None if self.form == "list" else r"^layers\."

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        draw = np.random.default_rng(self.layers)

        def normal(*shape: int, scale: float = 0.3) -> jax.Array:
            return jnp.asarray(draw.normal(size=shape) * scale, jnp.float32)

        n = self.layers
        layers: Any = {
            "mix": {"kernel": normal(n, D, D, scale=0.6 / n)},
            "mlp": {"gate": normal(n, 3, H), "up": normal(n, D, 3), "bias": normal(n, 5)},
        }
        if self.experts:
            layers["experts"] = {"kernel": normal(n, self.experts, D, D, scale=0.6 / n)}
        if self.form == "list":
            layers = [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(n)]
        params = {"embed": {"embedding": normal(V, D, scale=1.0)}, "layers": layers}
        params["head"] = {"scale": jnp.float32(-2 if self.tied else 0.1)}
        if not self.tied:
            params["head"]["kernel"] = normal(D, V, scale=0.1)
        if self.shared:
            params["shared"] = {"kernel": normal(D, D, scale=0.6 / n)}
        return params

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """Sum of the target tokens' losses."""
        params, penalty = self.before(params)
        h = block(_lookup)(params["embed"], batch["tokens"])
        step = block(_layer)
        if self.form == "scan":

            def body(h: jax.Array, layer: Any) -> tuple[jax.Array, None]:
                return step((layer, params.get("shared")), h, batch.get("expert")), None

            h, _ = jax.lax.scan(body, h, params["layers"])
        else:
            for i in range(self.layers):
                layer = params["layers"]
                layer = (
                    layer[i] if self.form == "list" else jax.tree.map(lambda x, i=i: x[i], layer)
                )
                h = step((layer, params.get("shared")), h)
        table = params["embed"]["embedding"] if self.tied else params["head"]["kernel"]
        logits = block(_scores)((table, params["head"]["scale"]), h)
        chosen = jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        nll = jax.nn.logsumexp(logits, -1) - chosen
        loss = (jnp.where(batch["mask"], nll, 0) * batch["factor"][:, None]).sum()
        return loss + penalty * len(nll)

    def mean_loss(self, params: Any, batch: Any) -> jax.Array:
        """Mean loss of a target token, 0 where there is none."""
        return self.loss(params, batch) / jnp.maximum(weight(batch), 1)

    @functools.cached_property
    def gradients(self) -> Any:
        """Compiled ``(params, batch) -> (losses [K], gradients [K, ...])``, kept for all tests."""
        return jax.jit(jaxmoo.stacked_value_and_grad(self.mean_loss))

    def __hash__(self) -> int:
        return hash((self.layers, self.tied, self.shared, self.experts, self.form, self.before))


def _lookup(params: Any, tokens: jax.Array) -> jax.Array:
    return params["embedding"][tokens].astype(jnp.float32)


def _layer(params: Any, h: jax.Array, expert: jax.Array | None = None) -> jax.Array:
    layer, shared = params
    kernel, mlp = layer["mix"]["kernel"], layer["mlp"]
    h = h + jnp.tanh(h @ kernel)
    h = h + (jnp.tanh(h @ mlp["up"]) @ mlp["gate"]) @ jnp.eye(H, D)
    h = h.at[..., : mlp["bias"].shape[0]].add(mlp["bias"])
    if expert is not None:
        h = h + jnp.tanh(jnp.einsum("bsi,bsio->bso", h, layer["experts"]["kernel"][expert]))
    return h if shared is None else h + jnp.tanh(h @ shared["kernel"])


def _scores(params: Any, h: jax.Array) -> jax.Array:
    table, scale = params
    return h @ (table if table.shape[0] == D else table.T) * jnp.exp(scale)


def weight(batch: Any) -> jax.Array:
    """Number of target tokens."""
    return batch["mask"].sum().astype(jnp.float32)


def batches(k: int, steps: int = 1) -> list[dict[str, jax.Array]]:
    """Batches [K, ROWS, ...]: other examples for every objective, of unequal lengths."""
    found = []
    for step in range(steps):
        draw = np.random.default_rng((k, step))
        tokens = draw.integers(0, V, (k, ROWS, TOKENS))
        targets = (tokens + 3 * np.arange(k)[:, None, None] + 1) % V  # a rule of each one's own
        length = 1 + (np.arange(k)[:, None] + 2 * np.arange(ROWS) + step) % TOKENS
        mask = np.arange(TOKENS) < length[..., None]
        factor = np.ones((k, ROWS), np.float32)
        found.append({"tokens": tokens, "targets": targets, "mask": mask, "factor": factor})
    return [jax.tree.map(jnp.asarray, batch) for batch in found]


def engine(toy: Toy, k: int, **options: Any) -> Any:
    """The engine for a toy."""
    options = {"weight_fn": weight, "stacked": toy.stacked, "num_objectives": k} | options
    return resolved_value_and_grad(toy.loss, toy.params, **options)


def run_engine(toy: Toy, data: list[Any], **options: Any) -> dict[str, np.ndarray]:
    """Losses, updates and the last state of steps over batches in the backward pass."""
    made = engine(toy, len(data[0]["mask"]), **options)
    place = parameter_shardings(made.mesh, toy.params, stacked=toy.stacked)
    params = jax.device_put(jax.tree.map(np.asarray, toy.params), place)
    step, state, results = jax.jit(made), made.init(), []
    for batch in data:
        losses, updates, state = step(params, jax.tree.map(np.asarray, batch), state)
        results.append((losses, updates))
    if jax.process_count() > 1:  # every process reads everything
        whole = jax.jit(lambda x: x, out_shardings=NamedSharding(made.mesh, P()))
        results, state = whole((results, state))
    return flatten(results, state)


def run_oracle(toy: Toy, data: list[Any], **options: Any) -> dict[str, np.ndarray]:
    """The same by definition: all objectives' gradients first, then ``resolve_conflicts``."""
    k = len(data[0]["mask"])
    tx = jaxmoo.resolve_conflicts(num_objectives=k, stacked=toy.stacked, **options)
    update, state, results = jax.jit(tx.update), tx.init(toy.params), []
    for batch in data:
        losses, gradients = toy.gradients(toy.params, batch)
        active = batch["mask"].any((1, 2))
        updates, state = update(gradients, state, active=active)
        results.append((losses, updates))
    return flatten(results, state)


def flatten(results: Any, state: Any) -> dict[str, np.ndarray]:
    """Arrays by name, to be compared or stored."""
    tree = {"step": results, "state": state._replace(key=jax.random.key_data(state.key))}
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Every array agrees to 1e-5 of its largest entry.

    Norms are compared squared: they are roots of sums that may cancel.
    """
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        y = found[name]
        if name.endswith("_norm"):
            x, y = x**2, y**2
        largest = np.abs(x[np.isfinite(x)]).max(initial=1e-30)
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-5 * largest, err_msg=name)
