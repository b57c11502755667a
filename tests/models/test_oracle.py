"""Logits, losses and gradients against transformers on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny_models
from closeness import relative_error
from jaxmoo.hf import load_model
from jaxmoo.hf.names import logical_path
from jaxmoo.models import language_loss
from tiny_models import VARIANTS, by_logical_path, tokens_and_mask

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def full_precision():
    # Elsewhere than on CPUs the default product of two float32 matrices is less than float32.
    with jax.default_matmul_precision("highest"):
        yield


class Results(NamedTuple):
    logits: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]  # by logical path


def oracle_results(model, tokens: np.ndarray, mask: np.ndarray) -> Results:
    """Transformers' logits, mean NLL of the target tokens and its gradients."""
    import torch

    # A padding token's embedding would get no gradient from its use as an input.
    model.model.embed_tokens.padding_idx = None
    ids, targets = torch.tensor(tokens).long(), torch.tensor(mask)[:, 1:].flatten()
    logits = model(ids).logits
    # Flat, because over an inner axis PyTorch sums the vocabulary less exactly.
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    loss = nll[targets].mean()
    loss.backward()
    gradients = {logical_path(n): p.grad.numpy() for n, p in model.named_parameters()}
    gradients = {n: g.T if n.endswith("kernel") else g for n, g in gradients.items()}
    return Results(logits.detach().numpy(), loss.item(), gradients)


def our_results(model, tokens: np.ndarray, mask: np.ndarray) -> Results:
    graphdef, state = nnx.split(model)
    batch = {"tokens": jnp.asarray(tokens), "loss_mask": jnp.asarray(mask)}

    @jax.jit
    def function(state):
        loss, gradients = jax.value_and_grad(
            lambda state: language_loss(nnx.merge(graphdef, state), batch)
        )(state)
        return nnx.merge(graphdef, state)(batch["tokens"]), loss, gradients

    logits, loss, gradients = function(state)
    return Results(np.asarray(logits), float(loss), by_logical_path(gradients))


def worst_gradient_error(found: Results, expected: Results) -> float:
    assert set(found.gradients) == set(expected.gradients)
    return max(relative_error(found.gradients[n], g) for n, g in expected.gradients.items())


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=() if v in ("llama", "qwen2") else pytest.mark.slow) for v in VARIANTS],
)
def test_logits_loss_every_gradient_and_greedy_tokens_equal_transformers(
    variant: str, tmp_path: Path
):
    import torch

    oracle = tiny_models.save(variant, tmp_path)
    prompts = torch.tensor(tokens_and_mask(oracle.config.vocab_size, (3, 9))[0]).long()
    tokens = oracle.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),  # else tokens like the padding's are left out
        do_sample=False,
        min_new_tokens=32,
        max_new_tokens=32,
    ).numpy()
    mask = tokens_and_mask(oracle.config.vocab_size, tokens.shape)[1]
    expected = oracle_results(oracle, tokens, mask)
    found = our_results(load_model(tmp_path), tokens, mask)
    # Each of the 32 is our choice after those before it, so we would have generated the same.
    ours = found.logits[:, 8:-1].copy()
    ours[..., oracle.config.eos_token_id] = -np.inf  # min_new_tokens
    np.testing.assert_array_equal(ours.argmax(-1), tokens[:, 9:])
    assert relative_error(found.logits, expected.logits) < TOLERANCE
    assert relative_error(found.loss, expected.loss) < TOLERANCE
    assert worst_gradient_error(found, expected) < TOLERANCE


@pytest.mark.slow
def test_the_real_model_equals_transformers(smollm2_dir: Path, monkeypatch):
    """Logits and loss in float32; gradients in float64, and in float32 no worse than theirs.

    The real model's activations reach 1e4, so that in float32 rounding alone moves some gradients
    by more than the tolerance, in transformers as well. What is computed is compared in float64.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokens, mask = tokens_and_mask(49152, (1, 24))

    def oracle(dtype):
        return AutoModelForCausalLM.from_pretrained(
            smollm2_dir, dtype=dtype, attn_implementation="eager"
        )

    theirs = oracle_results(oracle(torch.float32), tokens, mask)
    ours = our_results(load_model(smollm2_dir), tokens, mask)
    assert relative_error(ours.logits, theirs.logits) < TOLERANCE
    assert relative_error(ours.loss, theirs.loss) < TOLERANCE

    with monkeypatch.context() as patch:
        double = oracle(torch.float64)
        # Norms and softmax cast to torch.float32 by name, whatever the model's dtype.
        patch.setattr(torch, "float32", torch.float64)
        exact = oracle_results(double, tokens, mask)
    accuracy = worst_gradient_error(theirs, exact)
    assert worst_gradient_error(ours, exact) < max(2 * accuracy, TOLERANCE)
    del theirs, ours, double
    with jax.enable_x64(True):
        model = load_model(smollm2_dir, dtype=jnp.float64, param_dtype=jnp.float64)
        assert worst_gradient_error(our_results(model, tokens, mask), exact) < TOLERANCE


def test_angles_stay_exact_beyond_the_original_context(tmp_path: Path):
    import torch

    rope = tiny_models.LLAMA3_ROPE | {"original_max_position_embeddings": 8192}
    oracle = tiny_models.save(
        "llama3_rope", tmp_path, max_position_embeddings=16384, rope_parameters=rope
    )
    model = load_model(tmp_path)
    tokens, _ = tokens_and_mask(oracle.config.vocab_size, (1, 64))
    positions = 12000 + np.arange(64)[None]
    with torch.no_grad():
        expected = oracle(
            torch.tensor(tokens).long(), position_ids=torch.tensor(positions)
        ).logits.numpy()
    found = jax.jit(model.__call__)(jnp.asarray(tokens), positions=jnp.asarray(positions))
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize(
    "variant",
    [
        *(pytest.param(v, marks=pytest.mark.slow) for v in ("llama", "mistral")),
        *("qwen2", "qwen3"),
    ],
)
def test_bfloat16_is_as_near_to_float32_as_transformers_is(variant: str, tmp_path: Path):
    import torch

    oracle = tiny_models.save(variant, tmp_path)
    tokens, _ = tokens_and_mask(oracle.config.vocab_size, (2, 41))
    with torch.no_grad():
        exact = oracle(torch.tensor(tokens).long()).logits.numpy()
        theirs = oracle.bfloat16()(torch.tensor(tokens).long()).logits.float().numpy()
    model = load_model(tmp_path, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    ours = jax.jit(model.__call__)(jnp.asarray(tokens))
    assert ours.dtype == jnp.float32

    def error(logits) -> float:
        return float(np.sqrt(np.mean((logits - exact) ** 2)))

    assert error(ours) < 1.2 * error(theirs)


def test_padding_on_the_right_changes_nothing_before_it(tmp_path: Path):
    import torch

    oracle = tiny_models.save("llama", tmp_path)
    model = load_model(tmp_path)
    tokens, _ = tokens_and_mask(oracle.config.vocab_size, (2, 20))
    padded = np.pad(tokens, ((0, 0), (0, 13)), constant_values=7)
    with torch.no_grad():
        expected = oracle(torch.tensor(tokens).long()).logits.numpy()
    found = jax.jit(model.__call__)(padded)[:, :20]
    assert relative_error(found, expected) < TOLERANCE
