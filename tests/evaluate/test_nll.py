"""Reply NLL: what is summed, over what, and that batching leaves no trace in it."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoo.data.tokenization.tokenize import Tokenized, tokenize_all
from jaxmoo.errors import ConfigError, DataError
from jaxmoo.evaluate import LanguageScore, evaluate_nll

VOCABULARY = 50
rng = np.random.default_rng(0)
# Log-probabilities of a token given the one before it: a model that an oracle can follow.
BIGRAM = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(VOCABULARY, VOCABULARY)), jnp.float32))


@jax.jit
def bigram_nll(batch):
    tokens = jnp.asarray(batch["tokens"])
    nll = -BIGRAM[tokens[:, :-1], tokens[:, 1:]]
    return jnp.pad(nll, ((0, 0), (1, 0))) * batch["loss_mask"]


def example(length, prompt):
    tokens = rng.integers(0, VOCABULARY, length).astype(np.int32)
    return Tokenized(tokens, np.arange(length) >= prompt, int(rng.integers(1, 99)), length)


@pytest.fixture(scope="module")
def tokenized():
    lengths = {"en": range(2, 150, 7), "fa": range(2, 40, 3), "th": [300]}
    return {
        language: [example(n, int(rng.integers(1, n))) for n in values]
        for language, values in lengths.items()
    }


def oracle(examples):
    """Float64, one token at a time."""
    table = np.asarray(BIGRAM, np.float64)
    nats = tokens = 0
    for e in examples:
        for t in range(1, len(e.tokens)):
            if e.loss_mask[t]:
                nats -= table[e.tokens[t - 1], e.tokens[t]]
                tokens += 1
    n_bytes = sum(e.reply_bytes for e in examples)
    return nats / tokens, nats / math.log(2) / n_bytes, tokens, n_bytes, len(examples)


def score(tokenized, nll_fn=bigram_nll, **options):
    return evaluate_nll(nll_fn, tokenized, **({"batch_size": 4, "progress": False} | options))


def test_scores_are_sums_over_target_tokens(tokenized):
    scores = score(tokenized)
    assert list(scores) == list(tokenized)
    for language, examples in tokenized.items():
        nll, bits_per_byte, tokens, n_bytes, n = oracle(examples)
        found = scores[language]
        assert (found.tokens, found.bytes, found.examples) == (tokens, n_bytes, n)
        np.testing.assert_allclose(found.nll, nll, rtol=1e-6)
        np.testing.assert_allclose(found.bits_per_byte, bits_per_byte, rtol=1e-6)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 64}, {"buckets": (7,)}])
def test_batching_does_not_change_them(options, tokenized):
    for language, expected in score(tokenized).items():
        found = score(tokenized, **options)[language]
        np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-6)
        np.testing.assert_allclose(found.bits_per_byte, expected.bits_per_byte, rtol=1e-6)


def test_languages_do_not_change_each_other(tokenized):
    together = score(tokenized)
    for language in tokenized:
        alone = score({language: tokenized[language]})[language]
        np.testing.assert_allclose(alone.nll, together[language].nll, rtol=1e-6)


def test_two_runs_agree_to_the_last_bit(tokenized):
    assert score(tokenized) == score(tokenized)


def test_what_the_model_says_off_the_mask_is_ignored(tokenized):
    def noisy(batch):
        return jnp.where(batch["loss_mask"], bigram_nll(batch), jnp.nan)

    assert score(tokenized, noisy) == score(tokenized)


def test_the_first_token_is_no_target():
    tokens = np.array([3, 4, 5], np.int32)
    all_targets = Tokenized(tokens, np.ones(3, bool), 6, 3)
    assert score({"en": [all_targets]})["en"].tokens == 2


def test_few_shapes_are_compiled(tokenized):
    shapes = set()

    def recording(batch):
        assert batch["tokens"].dtype == np.int32 and batch["loss_mask"].dtype == bool
        shapes.add(batch["tokens"].shape)
        return bigram_nll(batch)

    score(tokenized, recording, batch_size=8)
    assert {rows for rows, _ in shapes} == {8}
    assert {length for _, length in shapes} <= {64, 96, 128, 192, 256, 384}


def test_not_a_number_is_not_hidden(tokenized):
    def broken(batch):
        return jnp.full(batch["tokens"].shape, jnp.nan)

    assert math.isnan(score(tokenized, broken)["en"].nll)


def test_scores_survive_json(tokenized):
    for found in score(tokenized).values():
        assert LanguageScore.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_bits_per_byte_of_a_coin_per_byte():
    # 8 tokens of one byte each at one bit, and the end-of-turn token at no cost
    assert LanguageScore.of_sum(8 * math.log(2), tokens=9, bytes=8, examples=1).bits_per_byte == 1


@pytest.mark.parametrize(
    "examples",
    [
        [],
        [Tokenized(np.zeros(3, np.int32), np.zeros(3, bool), 3, 3)],
        [Tokenized(np.zeros(3, np.int32), np.array([True, False, False]), 3, 3)],
        [Tokenized(np.zeros(3, np.int32), np.ones(3, bool), 0, 3)],
    ],
    ids=["none", "no target", "only the first", "no bytes"],
)
def test_a_language_without_reply_tokens_is_named(examples, tokenized):
    with pytest.raises(DataError, match="Language 'xx' has no held-out examples, or some without"):
        score(tokenized | {"xx": examples})


def test_the_batch_size_is_positive(tokenized):
    with pytest.raises(ConfigError, match="batch_size is a positive number, found 0"):
        score(tokenized, batch_size=0)


@pytest.mark.slow
def test_the_real_model_agrees_with_transformers(smollm2_dir):
    import torch
    from flax import nnx
    from transformers import AutoModelForCausalLM

    from jaxmoo.data import Example
    from jaxmoo.hf import load_model, load_tokenizer
    from jaxmoo.models import token_nll

    tokenizer = load_tokenizer(smollm2_dir)
    texts = {
        "en": [("What is AI?", "A branch of engineering."), ("Hi", "Hello there! " * 10)],
        "fa": [("سلام", "حال شما چطور است؟")],
        "ja": [("こんにちは", "こんにちは、お元気ですか。")],
    }
    tokenized = {
        language: tokenize_all([Example.from_pair(language, *p) for p in pairs], tokenizer, 256)
        for language, pairs in texts.items()
    }
    graph, state = nnx.split(load_model(smollm2_dir))
    nll = jax.jit(lambda state, batch: token_nll(nnx.merge(graph, state), batch))
    scores = score(tokenized, lambda batch: nll(state, batch))

    oracle = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    for language, pairs in texts.items():
        nats, tokens, n_bytes = 0.0, 0, 0
        for prompt, reply in pairs:
            messages = [{"role": "user", "content": prompt}]
            before = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(before + reply + "<|im_end|>", return_tensors="pt")["input_ids"]
            start = len(tokenizer(before)["input_ids"])
            labels = torch.where(torch.arange(ids.shape[1]) >= start, ids, -100)
            with torch.no_grad():
                loss = oracle(ids, labels=labels).loss.item()
            nats += loss * (ids.shape[1] - start)
            tokens += ids.shape[1] - start
            n_bytes += len(reply.encode())
        found = scores[language]
        assert found.tokens == tokens and found.bytes == n_bytes
        np.testing.assert_allclose(found.nll, nats / tokens, atol=1e-4)
        np.testing.assert_allclose(found.bits_per_byte, nats / math.log(2) / n_bytes, atol=1e-4)
