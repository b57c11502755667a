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
from jaxmoo.hf import load_model, save_model
from jaxmoo.hf.names import hf_tensor
from jaxmoo.models import DecoderConfig, language_loss, parameter_paths
from tiny_models import VARIANTS, by_logical_path, tokens_and_mask

TOLERANCE = 1e-5
# What another variant has, too.
SLOW = {
    *("llama_tied", "llama_one_head_per_group", "llama3_rope", "mistral", "qwen3"),
    *("qwen3_window", "cohere"),
}


@pytest.fixture(autouse=True)
def full_precision():
    # Elsewhere than on CPUs the default product of two float32 matrices is less than float32.
    with jax.default_matmul_precision("highest"):
        yield


class Results(NamedTuple):
    logits: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]  # by logical path


class Text(NamedTuple):
    """Tokens of a row that are a text of their own."""

    row: int
    begin: int
    end: int


def oracle_results(model, tokens: np.ndarray, mask: np.ndarray, texts: list[Text]) -> Results:
    """Transformers' logits, mean NLL of the target tokens and its gradients.

    Each text is read by itself, and nothing predicts its first token.
    """
    import torch

    # A padding token's embedding would get no gradient from its use as an input.
    model.model.embed_tokens.padding_idx = None
    logits = torch.zeros(*tokens.shape, model.config.vocab_size, dtype=model.dtype)
    nll = []
    for row, begin, end in texts:
        ids = torch.tensor(tokens[row : row + 1, begin:end]).long()
        targets = torch.tensor(mask[row, begin + 1 : end])
        found = model(ids).logits[0]
        logits[row, begin:end] = found.detach()
        nll.append(
            torch.nn.functional.cross_entropy(found[:-1], ids[0, 1:], reduction="none")[targets]
        )
    loss = torch.cat(nll).mean()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    gradients = {n: g.numpy() for n, g in tiny_models.in_files(model, gradients).items()}
    return Results(logits.numpy(), loss.item(), by_our_paths(model, gradients))


def by_our_paths(model, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of transformers by logical path, in our layout; all of them must have one."""
    config = DecoderConfig.from_hf(model.config.to_dict())
    found, used = {}, set()
    for path in parameter_paths(config):
        name, transposed, rows = hf_tensor(path, config)
        value = tensors[name] if rows is None else tensors[name][rows[0] : sum(rows)]
        found[path] = value.T if transposed else value
        used.add(name)
    assert used == set(tensors)
    return found


def whole_rows(tokens: np.ndarray) -> list[Text]:
    return [Text(row, 0, tokens.shape[1]) for row in range(len(tokens))]


def our_results(model, tokens: np.ndarray, mask: np.ndarray, texts: list[Text]) -> Results:
    graphdef, state = nnx.split(model)
    batch = {"tokens": jnp.asarray(tokens), "loss_mask": jnp.asarray(mask)}
    if len(texts) > len(tokens):
        positions, segments = np.zeros((2, *tokens.shape), np.int32)
        for number, (row, begin, end) in enumerate(texts):
            positions[row, begin:end] = np.arange(end - begin)
            segments[row, begin:end] = number
        batch |= {"positions": jnp.asarray(positions), "segment_ids": jnp.asarray(segments)}
    where = {name: batch.get(name) for name in ("positions", "segment_ids")}

    @jax.jit
    def function(state):
        loss, gradients = jax.value_and_grad(
            lambda state: language_loss(nnx.merge(graphdef, state), batch)
        )(state)
        return nnx.merge(graphdef, state)(batch["tokens"], **where), loss, gradients

    logits, loss, gradients = function(state)
    return Results(np.asarray(logits), float(loss), by_logical_path(gradients))


def worst_gradient_error(found: Results, expected: Results) -> float:
    assert set(found.gradients) == set(expected.gradients)
    return max(relative_error(found.gradients[n], g) for n, g in expected.gradients.items())


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=pytest.mark.slow if v in SLOW else ()) for v in VARIANTS],
)
def test_logits_loss_every_gradient_and_greedy_tokens_equal_transformers(
    variant: str, tmp_path: Path
):
    """Of whole rows and of packed ones; and the model is saved as it was."""
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
    packed = tokens_and_mask(oracle.config.vocab_size, tokens.shape[1:], seed=1)[0]
    tokens = np.concatenate([tokens, packed[None]])
    texts = [*whole_rows(tokens[:3]), Text(3, 0, 17), Text(3, 17, tokens.shape[1])]
    mask = tokens_and_mask(oracle.config.vocab_size, tokens.shape)[1]
    expected = oracle_results(oracle, tokens, mask, texts)
    model = load_model(tmp_path)
    found = our_results(model, tokens, mask, texts)
    # Each of the 32 is our choice after those before it, so we would have generated the same.
    ours = found.logits[:3, 8:-1].copy()
    ours[..., oracle.config.eos_token_id] = -np.inf  # min_new_tokens
    np.testing.assert_array_equal(ours.argmax(-1), tokens[:3, 9:])
    assert relative_error(found.logits, expected.logits) < TOLERANCE
    assert relative_error(found.loss, expected.loss) < TOLERANCE
    assert worst_gradient_error(found, expected) < TOLERANCE

    save_model(model, tmp_path / "saved", source=tmp_path)
    before, after = (path / "model.safetensors" for path in (tmp_path, tmp_path / "saved"))
    assert before.read_bytes() == after.read_bytes()


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

    texts = whole_rows(tokens)
    theirs = oracle_results(oracle(torch.float32), tokens, mask, texts)
    ours = our_results(load_model(smollm2_dir), tokens, mask, texts)
    assert relative_error(ours.logits, theirs.logits) < TOLERANCE
    assert relative_error(ours.loss, theirs.loss) < TOLERANCE

    with monkeypatch.context() as patch:
        double = oracle(torch.float64)
        # Norms and softmax cast to torch.float32 by name, whatever the model's dtype.
        patch.setattr(torch, "float32", torch.float64)
        exact = oracle_results(double, tokens, mask, texts)
    accuracy = worst_gradient_error(theirs, exact)
    assert worst_gradient_error(ours, exact) < max(2 * accuracy, TOLERANCE)
    del theirs, ours, double
    with jax.enable_x64(True):
        model = load_model(smollm2_dir, dtype=jnp.float64, param_dtype=jnp.float64)
        assert worst_gradient_error(our_results(model, tokens, mask, texts), exact) < TOLERANCE


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
        *(
            pytest.param(v, marks=pytest.mark.slow)
            for v in ("llama", "mistral", "gemma2", "gemma3_text", "apertus", "cohere2", "granite")
        ),
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
