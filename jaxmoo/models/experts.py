"""A mixture of experts: an MLP of which every token reads some parts, chosen by a router.

No token is dropped, whatever the router chooses. Rows, one for each token and expert that it reads,
are put in order by expert and laid out in *bins* of equal size, each of which holds rows of one
expert alone; one batch of products then serves all bins. An expert's last bin may be partly empty,
so more rows are multiplied than there are: of M up to 2.11 M where an expert's share M / E is 64 or
more, up to 2.9 M where it is less. Every bin needs its expert's kernel at hand, so up to twice the
experts' kernels are copied for them. No copy is a residual of the backward pass.

An expert that no token reads has a gradient of exactly zero.

Shape suffixes: B batch, S sequence, D hidden, F width of an expert; T tokens (B S), E experts, k of
them per token, M rows (T k), N bins, R rows of a bin.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoo.dtypes import at_least_float32
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.linear import Linear

__all__ = ["Experts", "Load"]


class Load(NamedTuple):
    """What a layer's tokens ask of its experts, summed over the tokens that count.

    Attributes:
      chosen_E: float32, tokens that read the expert.
      probability_E: float32, the router's probabilities.
      tokens: float32, how many tokens count.
    """

    chosen_E: jax.Array
    probability_E: jax.Array
    tokens: jax.Array


class Experts(nnx.Module):
    """A router, and E gated MLPs of which the k likeliest read a token.

    Their kernels are ``experts.gate_proj.kernel`` [E, D, F] and so on, the router's is
    ``gate.kernel`` [D, E]. Routing is computed in float32 at least, from logits in ``dtype``.

    Shazeer et al., *Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts
    Layer*, `arXiv:1701.06538 <https://arxiv.org/abs/1701.06538>`_.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        stack: tuple[int, ...] = (),
        platform: str,
        rngs: nnx.Rngs,
        **kw: Any,
    ):
        linear = partial(Linear, platform=platform, rngs=rngs, **kw)
        count, sizes = config.num_experts, (config.hidden_size, config.moe_intermediate_size)
        self.per_token = config.num_experts_per_tok
        self.normalised = config.norm_topk_prob
        self.dtype = kw["dtype"]
        self.act_fn = jax.nn.silu
        self.gate = linear(config.hidden_size, count, stack=stack)
        # Each is the maps of all experts: which rows meet which is decided here.
        stack = (*stack, count)
        self.experts = nnx.Dict(
            gate_proj=linear(*sizes, stack=stack),
            up_proj=linear(*sizes, stack=stack),
            down_proj=linear(*sizes[::-1], stack=stack),
        )

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        """Map every position by itself, ``[B, S, D] -> [B, S, D]``."""
        return self.with_load(x_BSD, jnp.ones(x_BSD.shape[:2], bool))[0]

    def with_load(self, x_BSD: jax.Array, counted_BS: jax.Array) -> tuple[jax.Array, Load]:
        """Map every position by itself; and tell what is asked of the experts.

        Args:
          x_BSD: what the MLP reads.
          counted_BS: bool, the tokens that count in what is told.

        Returns:
          What it finds, [B, S, D], and the load.
        """
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        probability_TE, weight_Tk, chosen_Tk = self._route(x_TD)
        wide = probability_TE.dtype
        if self.normalised:
            weight_Tk = weight_Tk / weight_Tk.sum(-1, keepdims=True)
        found_TkD = self._found(x_TD, chosen_Tk)
        y_TD = (found_TkD.astype(wide) * weight_Tk[..., None]).sum(1).astype(self.dtype)

        counted_T = counted_BS.reshape(-1).astype(wide)
        chosen_E = jnp.zeros_like(probability_TE[0])
        chosen_E = chosen_E.at[chosen_Tk].add(counted_T[:, None])
        load = Load(chosen_E, counted_T @ probability_TE, counted_T.sum())
        return y_TD.reshape(x_BSD.shape), load

    def count_active(self, x_BSD: jax.Array, counted_BS: jax.Array) -> jax.Array:
        """In how many counted tokens each expert's neurons' gates are above 0, int32 [B, E F].

        In a token that does not read the expert none of them is active.
        """
        rows, length, width = x_BSD.shape
        x_TD = x_BSD.reshape(-1, width)
        _, _, chosen_Tk = self._route(x_TD)
        count = self.gate.kernel.shape[-1]
        bins = _Bins.of(chosen_Tk, count)
        active_TkF = bins.take(self.experts["gate_proj"](bins.put(x_TD), bins.expert_N)) > 0
        row_T = jnp.repeat(jnp.arange(rows), length)
        found_BEF = jnp.zeros((rows, count, active_TkF.shape[-1]), jnp.int32)
        active_TkF &= counted_BS.reshape(-1, 1, 1)
        found_BEF = found_BEF.at[row_T[:, None], chosen_Tk].add(active_TkF.astype(jnp.int32))
        return found_BEF.reshape(rows, -1)

    def _route(self, x_TD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The router's probabilities, and of the k likeliest experts these and their numbers."""
        logits_TE = self.gate(x_TD)
        wide = at_least_float32(logits_TE.dtype)
        probability_TE = jax.nn.softmax(logits_TE.astype(wide))
        return probability_TE, *jax.lax.top_k(probability_TE, self.per_token)

    def _found(self, x_TD: jax.Array, chosen_Tk: jax.Array) -> jax.Array:
        """What every token's experts make of it, [T, k, D]."""
        bins = _Bins.of(chosen_Tk, self.gate.kernel.shape[-1])
        x_NRD = bins.put(x_TD)

        gate, up, down = (
            partial(self.experts[name], of=bins.expert_N)
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        return bins.take(down(self.act_fn(gate(x_NRD)) * up(x_NRD)))


class _Bins(NamedTuple):
    """Which rows lie where.

    Attributes:
      expert_N: whose rows a bin holds.
      slot_Tk: the place of every token's row among all N R.
      size: R.
    """

    expert_N: jax.Array
    slot_Tk: jax.Array
    size: int

    @classmethod
    def of(cls, chosen_Tk: jax.Array, num_experts: int) -> _Bins:
        """Put rows into bins that are as large as an expert's share of the rows."""
        rows = chosen_Tk.size
        used = min(rows, num_experts)
        size = -(-rows // num_experts)
        size = size if size < 8 else -(-size // 8) * 8
        bins = (rows + used * (size - 1)) // size  # enough, however rows are divided
        chosen_M = chosen_Tk.reshape(-1)
        order_M = jnp.argsort(chosen_M, stable=True)
        count_E = jnp.zeros(num_experts, jnp.int32).at[chosen_M].add(1)
        bins_E = -(-count_E // size)
        end_E = jnp.cumsum(bins_E)
        # From its place among the rows in order, a row moves by the room left in bins before it.
        move_E = (end_E - bins_E) * size - (jnp.cumsum(count_E) - count_E)
        slot_M = jnp.arange(rows, dtype=jnp.int32) + move_E[chosen_M[order_M]]
        slot_Tk = jnp.zeros_like(slot_M).at[order_M].set(slot_M).reshape(chosen_Tk.shape)
        expert_N = jnp.searchsorted(end_E, jnp.arange(bins), side="right")
        return cls(jnp.minimum(expert_N, num_experts - 1), slot_Tk, size)

    def put(self, x_TD: jax.Array) -> jax.Array:
        """Rows of tokens in bins, [N, R, D]; zero where there is none."""
        width, per_token = x_TD.shape[-1], self.slot_Tk.shape[-1]
        x_TkD = jnp.broadcast_to(x_TD[:, None], (len(x_TD), per_token, width))
        bins = jnp.zeros((len(self.expert_N) * self.size, width), x_TD.dtype)
        return bins.at[self.slot_Tk].set(x_TkD, unique_indices=True).reshape(-1, self.size, width)

    def take(self, x_NRD: jax.Array) -> jax.Array:
        """Rows of bins by token, [T, k, D]."""
        return x_NRD.reshape(-1, x_NRD.shape[-1]).at[self.slot_Tk].get(unique_indices=True)
