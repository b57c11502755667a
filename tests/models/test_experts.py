"""A mixture of experts: no token is dropped, and its balance is that of transformers."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny_models
from closeness import relative_error
from jaxmoo.errors import ConfigError
from jaxmoo.hf import load_model
from jaxmoo.models import (
    Decoder,
    DecoderConfig,
    LoRA,
    add_adapters,
    language_loss,
    router_loss,
)
from jaxmoo.models.experts import Experts
from models.test_oracle import by_our_paths
from tiny_models import by_logical_path, tokens_and_mask

D, E, F, K = 6, 5, 4, 2


@pytest.fixture(scope="module")
def mixture():
    """A graph, a state, and ``(router [D, E], tokens [T, D]) -> (found, gradients of its sum)``."""
    sizes = {"vocab_size": 8, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
    experts = {"num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": F}
    config = DecoderConfig(**sizes, **heads, **experts, max_position_embeddings=64)
    kw = {"platform": "cpu", "dtype": jnp.float32, "param_dtype": jnp.float32}
    graph, state = nnx.split(Experts(config, rngs=nnx.Rngs(0), **kw))
    state = jax.tree.map(lambda x: 30 * x, state)

    @jax.jit
    def run(router, x):
        def total(state):
            state["gate"]["kernel"].set_value(router)
            y = nnx.merge(graph, state)(x[None])[0]
            return (y**2).sum(), y

        (_, y), gradients = jax.value_and_grad(total, has_aux=True)(state)
        return y, gradients

    return graph, state, run


def by_hand(state, router, x):
    """The definition, token by token, in float64."""
    gate, up, down = (
        np.asarray(state["experts"][f"{name}_proj"]["kernel"][...], np.float64)
        for name in ("gate", "up", "down")
    )
    found, chosen = np.zeros(x.shape), set()
    for t, token in enumerate(np.asarray(x, np.float64)):
        logits = token @ router
        probability = np.exp(logits - logits.max())
        best = np.argsort(-probability, kind="stable")[:K]
        for e in best:
            inner = token @ gate[e]
            inner = inner / (1 + np.exp(-inner)) * (token @ up[e])
            found[t] += probability[e] / probability[best].sum() * (inner @ down[e])
        chosen |= set(best.tolist())
    return found, chosen


@pytest.mark.parametrize("draw", ["random", "all the same", "two kinds"])
def test_no_token_is_dropped_whatever_the_router_chooses(draw, mixture):
    """And an expert that is chosen by none has a gradient of exactly zero."""
    _, state, run = mixture
    rng = np.random.default_rng(0)
    x, router = rng.normal(size=(13, D)), rng.normal(size=(D, E))
    if draw != "random":
        x[:, 0] = 1 if draw == "all the same" else np.where(np.arange(13) < 12, 1, -1)
        router[0] = [0, 50, 60, -50, -60]
    wanted, chosen = by_hand(state, router, x)
    found, gradients = run(jnp.asarray(router, jnp.float32), jnp.asarray(x, jnp.float32))
    assert relative_error(found, wanted) < 1e-5
    assert len(chosen) == {"random": E, "all the same": 2, "two kinds": 4}[draw]
    for kernels in jax.tree.leaves(gradients["experts"]):
        for e in range(E):
            assert (np.abs(kernels[e]).max() > 0) == (e in chosen)


def test_copies_of_kernels_are_not_kept_for_the_backward_pass(mixture):
    """A bin's copy is as large as its expert's kernel, and there are more bins than experts."""
    graph, state, _ = mixture
    x = jax.ShapeDtypeStruct((1, 20, D), jnp.float32)
    kept = jax.eval_shape(
        lambda state, x: jax.vjp(lambda s, x: nnx.merge(graph, s)(x), state, x)[1], state, x
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(kept)]
    kernels = [shape[0] for shape in shapes if shape[1:] in {(D, F), (F, D)}]
    assert kernels == [E] * 3


def test_adapters_of_experts_form_no_matrix_of_the_kernels_size():
    """A gradient of theirs takes what one of the tokens alone takes, and matrices of their rank."""
    sizes = {"hidden_size": 128, "intermediate_size": 8, "moe_intermediate_size": 128}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
    some = {"num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 64}
    config = DecoderConfig(vocab_size=8, num_hidden_layers=1, **sizes, **heads, **some)
    needed = []
    for lora in (None, LoRA(2, 4)):
        model = Decoder.abstract(config)
        if lora is not None:
            add_adapters(model, lora, [0])
        graph, adapters, frozen = nnx.split(model.layers["0"].mlp, _is_adapter, ...)
        args = [
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state)
            for state in (adapters, frozen)
        ]
        tokens = jax.ShapeDtypeStruct((1, 16, 128), jnp.float32)

        def loss(adapters, frozen, x, graph=graph):
            return (nnx.merge(graph, adapters, frozen)(x) ** 2).sum()

        compiled = jax.jit(jax.grad(loss, (0, 2))).lower(*args, tokens).compile()
        needed.append(compiled.memory_analysis().temp_size_in_bytes)
    kernels, ranks = 8 * 128 * 128 * 4, 8 * 3 * 2 * (2 * 128) * 4
    assert needed[0] > kernels and needed[1] - needed[0] < 4 * ranks < kernels / 2


def _is_adapter(path, _):
    return any("lora" in str(part) for part in path)


def test_without_experts_there_is_no_routers_loss():
    with pytest.raises(ConfigError, match="none of whose layers has experts"):
        router_loss([])


def test_the_routers_loss_is_that_of_transformers(tmp_path: Path):
    """In itself and in every gradient; of the tokens up to each row's last target."""
    import torch

    oracle = tiny_models.save("qwen3_moe", tmp_path, output_router_logits=True)
    oracle.model.embed_tokens.padding_idx = None
    coef = oracle.router_aux_loss_coef = 0.7
    tokens, mask = tokens_and_mask(oracle.config.vocab_size, (3, 20))
    mask[0, 12:] = False
    mask[0, 11] = mask[1:, 19] = True
    read = np.arange(20) < np.array([12, 20, 20])[:, None]
    ids, read = torch.tensor(tokens).long(), torch.tensor(read).long()
    labels = torch.where(torch.tensor(mask), ids, -100)
    result = oracle(ids, attention_mask=read, labels=labels)
    result.loss.backward()
    gradients = {n: p.grad for n, p in oracle.named_parameters()}
    expected = by_our_paths(
        oracle, {n: g.numpy() for n, g in tiny_models.in_files(oracle, gradients).items()}
    )

    model = load_model(tmp_path)
    assert model.config.router_aux_loss_coef == 0.001  # as transformers has it by default
    graph, state = nnx.split(model)
    batch = {"tokens": jnp.asarray(tokens), "loss_mask": jnp.asarray(mask)}
    counted = jnp.asarray(read.numpy())

    @jax.jit
    def run(state):
        def loss(state):
            return language_loss(nnx.merge(graph, state), batch, router_coef=coef)

        loads = nnx.merge(graph, state).hidden_and_loads(batch["tokens"], counted=counted)[2]
        return router_loss(loads), *jax.value_and_grad(loss)(state)

    router, loss, found = run(state)
    assert relative_error(router, result.aux_loss.item()) < 1e-5
    assert relative_error(loss, result.loss.item()) < 1e-5
    found = by_logical_path(found)
    assert max(relative_error(found[n], g) for n, g in expected.items()) < 1e-5
