"""Models with adapters of the peft library, and ours with the same, for tests that compare them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tiny_models
from jaxmoo.hf import load_model
from jaxmoo.hf.adapter_names import peft_tensor
from jaxmoo.models import LoRA, add_adapters, language_loss, trainable_filter
from jaxmoo.models.lora import ADAPTERS
from tiny_models import by_logical_path, tokens_and_mask

TOLERANCE = 1e-5
WEIGHTS = "adapter_model.safetensors"
TOKENS, MASK = tokens_and_mask(tiny_models.SIZES["vocab_size"], (3, 23))


def with_adapters(base: Path, lora: LoRA, layers, segments=(0,)):
    """A model with adapters that are shapes only, in three parts."""
    model = load_model(base, segments=segments)
    add_adapters(model, lora, layers)
    return nnx.split(model, trainable_filter(ADAPTERS), ...)


class Case:
    """A base model, and adapters that peft made for it with random A and B.

    A, B and W are of one size, so that an adapter misplaced or misscaled shows.
    """

    def __init__(self, directory: Path, variant: str, **settings):
        import torch
        from peft import LoraConfig, get_peft_model

        self.variant = variant
        self.base, self.adapter = directory / "base", directory / "adapter"
        tiny_models.save(variant, self.base)
        model = get_peft_model(
            tiny_models.make(variant),
            LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings),
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    size = parameter if "magnitude" in name else torch.ones(())
                    parameter.copy_(0.15 * size * torch.randn_like(parameter))
        model.save_pretrained(self.adapter)
        self.model = model.eval()

    def reload(self, adapter: Path):
        """The base model with adapters from files, by peft."""
        from peft import PeftModel

        return PeftModel.from_pretrained(tiny_models.make(self.variant), adapter).eval()


def with_random_adapters(base: Path, lora: LoRA, layers=range(3), segments=(0,)):
    """A model with adapters that change something."""
    graph, abstract, frozen = with_adapters(base, lora, layers, segments)
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(abstract)
    values = [jnp.asarray(rng.normal(0, 0.15, x.shape).astype(np.float32)) for x in leaves]
    return nnx.merge(graph, jax.tree.unflatten(tree, values), frozen)


def logits_and_gradients(case: Case, parts, params):
    """Ours and PEFT's on `TOKENS`: logits, and gradients by logical path and by PEFT's names.

    Args:
      case: the model, whose gradients are made anew.
      parts: graph and frozen part of ours.
      params: its adapters.
    """
    import torch

    graph, frozen = parts
    batch = {"tokens": jnp.asarray(TOKENS), "loss_mask": jnp.asarray(MASK)}

    @jax.jit
    def compute(params):
        gradients = jax.grad(lambda p: language_loss(nnx.merge(graph, p, frozen), batch))(params)
        return nnx.merge(graph, params, frozen)(batch["tokens"]), gradients

    our_logits, gradients = compute(params)
    ids, targets = torch.tensor(TOKENS).long(), torch.tensor(MASK)[:, 1:].flatten()
    case.model.zero_grad()
    logits = case.model(ids).logits
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    nll[targets].mean().backward()
    theirs = {n: p.grad.numpy() for n, p in case.model.named_parameters() if p.grad is not None}
    return (our_logits, by_logical_path(gradients)), (logits.detach().numpy(), theirs)


def tensor_of(path: str) -> str:
    """PEFT's name of an adapter in a model that it trains."""
    return peft_tensor(path).name.removesuffix(".weight") + ".default.weight"
