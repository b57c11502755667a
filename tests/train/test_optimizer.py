"""Every optimiser does what it is known for, in float32, where its parameters lie."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmoo.config import Config, OptimizerConfig, TrainConfig
from jaxmoo.config.optimizer_section import planned_from
from jaxmoo.train.optimizer import learning_rate, make_optimizer

STEPS = 4
SHAPES = {
    "embed_tokens": {"embedding": (6, 4)},
    "layers": {"0": {"q_proj": {"kernel": (2, 4, 4), "bias": (2, 4)}}},
    "norm": {"scale": (4,)},
}


def settings(name: str, **options) -> Config:
    options = {"clip_norm": None, "warmup_steps": 1, "decay": "linear"} | options
    return dataclasses.replace(
        Config(),
        optimizer=OptimizerConfig(name=name, learning_rate=0.01, **options),
        train=TrainConfig(steps=STEPS),
    )


def random_tree(seed: int, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def run(config: Config, params):
    """Parameters and state after all steps, with gradients that depend on the step."""
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    for step in range(STEPS):
        updates, state = optimizer.update(random_tree(1 + step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_weights_are_those_of_pytorch(name):
    import torch

    config = settings(name, weight_decay=0.1)
    rate = learning_rate(config.optimizer, STEPS)
    leaves, _ = jax.tree_util.tree_flatten_with_path(random_tree(0))
    tensors = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for _, x in leaves]
    groups = [
        {"params": [x], "weight_decay": 0.1 * (path[-1].key in ("kernel", "embedding"))}
        for x, (path, _) in zip(tensors, leaves, strict=True)
    ]
    if name == "adamw":
        oracle = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    else:
        # PyTorch's SGD has no decoupled decay: it is taken off by hand.
        decays = [group.pop("weight_decay") for group in groups]
        oracle = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    for step in range(STEPS):
        lr = float(rate(step))
        for group in oracle.param_groups:
            group["lr"] = lr
        for x, g in zip(tensors, jax.tree.leaves(random_tree(1 + step)), strict=True):
            x.grad = torch.tensor(np.asarray(g, np.float64))
        if name == "sgd":
            with torch.no_grad():
                for x, decay in zip(tensors, decays, strict=True):
                    x.mul_(1 - lr * decay)
        oracle.step()
    found = jax.tree.leaves(run(config, random_tree(0))[0])
    for a, b in zip(found, tensors, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=2e-6, atol=2e-6)


def test_adafactor_keeps_one_number_per_row_and_column():
    big = {"kernel": jnp.zeros((256, 384)), "scale": jnp.zeros(256)}
    state = make_optimizer(settings("adafactor")).init(big)
    assert sum(x.size for x in jax.tree.leaves(state)) < 3 * (256 + 384)


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adamw():
    config = settings("muon", warmup_steps=0, decay="constant")
    params = random_tree(0)
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(random_tree(1), optimizer.init(params), params)
    kernel = np.asarray(updates["layers"]["0"]["q_proj"]["kernel"], np.float64)
    # Five Newton-Schulz rounds bring every singular value of each layer near 1; times the learning
    # rate and 0.2 sqrt(4), the size of AdamW's updates.
    values = np.linalg.svd(kernel, compute_uv=False) / (0.01 * 0.2 * 2)
    assert values.min() > 0.5 and values.max() < 1.4
    adamw = make_optimizer(settings("adamw", warmup_steps=0, decay="constant"))
    expected, _ = adamw.update(random_tree(1), adamw.init(params), params)
    for path in (("embed_tokens", "embedding"), ("norm", "scale")):
        a, b = updates[path[0]][path[1]], expected[path[0]][path[1]]
        # Nesterov's momentum, as Muon has it.
        assert jnp.all(jnp.sign(a) == jnp.sign(b)) and jnp.abs(a).max() < 4 * jnp.abs(b).max()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "sgd"])
def test_half_precision_parameters_are_updated_in_float32(name):
    """In bfloat16 a decay of 0.999 rounds to 1 and the average square would stay as it began."""
    half, state = run(settings(name), random_tree(0, jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_the_average_gradient_can_be_kept_in_bfloat16(name):
    _, state = run(settings(name, moment_dtype="bfloat16"), random_tree(0))
    kinds = {x.dtype for x in jax.tree.leaves(state)}
    assert jnp.dtype(jnp.bfloat16) in kinds
    averages = [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
    assert len(averages) == len(jax.tree.leaves(SHAPES, is_leaf=lambda x: isinstance(x, tuple)))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "sgd"])
def test_norms_and_biases_have_no_weight_decay(name):
    config = settings(name, weight_decay=0.5)
    params = random_tree(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    q_proj = updates["layers"]["0"]["q_proj"]
    assert not jnp.any(updates["norm"]["scale"]) and not jnp.any(q_proj["bias"])
    for leaf in (q_proj["kernel"], updates["embed_tokens"]["embedding"]):
        assert jnp.all(leaf != 0)


def test_the_rate_of_wsd_stays_and_then_falls():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=2, decay="wsd", decay_steps=4)
    rates = [float(learning_rate(config, 10)(step)) for step in range(11)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    # So far, those of a longer run.
    longer = [float(learning_rate(config, 20)(step)) for step in range(11)]
    same = [a == b for a, b in zip(rates, longer, strict=True)]
    assert sum(same) == planned_from(config, 10) == 7 and all(same[:7])
