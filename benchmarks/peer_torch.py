"""PyTorch's contestants of peers.py, one per process.

``plain`` is ordinary fine-tuning on one batch. ``torchjd`` is TorchJD as documented: the Jacobian
of the languages' losses, one aggregation over the whole model; ``torchjd-rows`` the same with the
rows made by ordinary backward passes. ``buckets`` does per bucket what the engine does per block:
one backward pass per language; a hook on every parameter takes its
gradient, and when the last language's gradient of a bucket's last parameter is there, the bucket
is resolved and its gradients are dropped.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peer_common
import torch
import transformers
from torch.utils.checkpoint import checkpoint

Part = tuple[torch.nn.Parameter, slice]  # of a bucket: some rows of a parameter


def main() -> None:
    parser = peer_common.parser(__doc__)
    parser.add_argument("--contestant", required=True, choices=list(KINDS))
    parser.add_argument("--config", required=True, help="config.json of the model")
    parser.add_argument("--vocabulary-slices", type=int, default=1)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    device = "cuda" if flags.platform == "gpu" else "cpu"
    torch.ones(3, device=device) @ torch.ones(3, device=device)
    base = peer_common.memory_now()
    model = make_model(flags, device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peer_common.LEARNING_RATE, weight_decay=0.0
    )
    differentiate = KINDS[flags.contestant](model, flags)
    half = torch.autocast(device, torch.bfloat16, enabled=flags.dtype == "bfloat16")

    def losses_of(batch: torch.Tensor) -> torch.Tensor:
        """Mean loss of each row's tokens [B, S], as a vector [B]."""
        with half:
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        flat = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        )
        return flat.view(len(batch), -1).mean(1)

    def step(number: int) -> tuple[float, float, np.ndarray]:
        drawn = peer_common.tokens(flags, number, model.config.vocab_size)
        batch = torch.from_numpy(drawn).long().to(device)
        synchronize(device)
        begun, cpu = time.perf_counter(), time.process_time()
        losses = differentiate(batch, losses_of)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        took = time.perf_counter() - begun, time.process_time() - cpu
        return *took, losses.numpy(force=True)

    def device_peak() -> int | None:
        return torch.cuda.max_memory_allocated() if device == "cuda" else None

    peer_common.serve(step, base, device_peak)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def make_model(flags: argparse.Namespace, device: str) -> torch.nn.Module:
    settings = json.loads(Path(flags.config).read_text())
    config = transformers.AutoConfig.for_model(**settings)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(peer_common.weight(name, tuple(parameter.shape))))
    model.float().train()
    if flags.remat == "full":
        for layer in model.model.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return model


Losses = Callable[[torch.Tensor], torch.Tensor]
Differentiate = Callable[[torch.Tensor, Losses], torch.Tensor]


def plain(model: torch.nn.Module, flags: argparse.Namespace) -> Differentiate:
    """The mean loss over one batch of all languages."""

    def differentiate(batch: torch.Tensor, losses_of: Losses) -> torch.Tensor:
        loss = losses_of(batch.flatten(0, 1)).mean()
        loss.backward()
        return loss.detach()[None]

    return differentiate


def aggregator(flags: argparse.Namespace) -> object:
    import torchjd.aggregation as methods

    names = {"mean": "Mean", "mgda": "MGDA", "upgrad": "UPGrad", "dualproj": "DualProj"}
    return getattr(methods, names[flags.method])()


def torchjd_jacobian(model: torch.nn.Module, flags: argparse.Namespace) -> Differentiate:
    """TorchJD as it is documented: ``backward`` and ``jac_to_grad``.

    Row by row, which is cheaper here than its ``vmap``. Every row differentiates all losses, those
    of other languages with zeros.
    """
    from torchjd.autojac import backward

    aggregate = to_gradients(model, flags)

    def differentiate(batch: torch.Tensor, losses_of: Losses) -> torch.Tensor:
        losses = [losses_of(one).mean() for one in batch]
        backward(losses, parallel_chunk_size=1)
        aggregate()
        return torch.stack([loss.detach() for loss in losses])

    return differentiate


def torchjd_rows(model: torch.nn.Module, flags: argparse.Namespace) -> Differentiate:
    """TorchJD's ``jac_to_grad`` of a Jacobian whose rows are ordinary backward passes."""
    aggregate = to_gradients(model, flags)

    def differentiate(batch: torch.Tensor, losses_of: Losses) -> torch.Tensor:
        parameters = list(model.parameters())
        for p in parameters:
            p.jac = p.new_empty(len(batch), *p.shape)
        losses = []
        for row, one in enumerate(batch):
            loss = losses_of(one).mean()
            for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.jac[row] = gradient
            losses.append(loss.detach())
        aggregate()
        return torch.stack(losses)

    return differentiate


def to_gradients(model: torch.nn.Module, flags: argparse.Namespace) -> Callable[[], object]:
    """Make ``jac_to_grad``, with Gram matrices summed over parameters: no copy of the Jacobian."""
    from torchjd.autojac import jac_to_grad

    method, parameters = aggregator(flags), list(model.parameters())
    by_gram = flags.method != "mean"
    return lambda: jac_to_grad(parameters, method, optimize_gramian_computation=by_gram)


def bucketed(model: torch.nn.Module, flags: argparse.Namespace) -> Differentiate:
    """Per-language backward passes; buckets resolved by hooks in the last one."""
    method, k = aggregator(flags), flags.languages
    buckets = make_buckets(model, flags.vocabulary_slices)
    of: dict[torch.nn.Parameter, list[int]] = {}
    for number, bucket in enumerate(buckets):
        for parameter, _ in bucket:
            of.setdefault(parameter, []).append(number)
    stored: dict[torch.nn.Parameter, list[torch.Tensor]] = {p: [] for p in of}
    waiting: list[int] = []

    def arrived(parameter: torch.nn.Parameter) -> None:
        stored[parameter].append(parameter.grad)
        parameter.grad = None
        if len(stored[parameter]) < k:
            return
        parameter.grad = torch.empty_like(parameter)
        for number in of[parameter]:
            waiting[number] -= 1
            if waiting[number] == 0:
                resolve(buckets[number])
        for p in {p for number in of[parameter] for p, _ in buckets[number]}:
            if all(waiting[number] == 0 for number in of[p]):
                stored[p].clear()

    def resolve(bucket: list[Part]) -> None:
        matrix = torch.stack(
            [torch.cat([stored[p][i][rows].flatten() for p, rows in bucket]) for i in range(k)]
        )
        update, start = method(matrix), 0
        for p, rows in bucket:
            piece = p.grad[rows]
            piece.copy_(update[start : start + piece.numel()].view_as(piece))
            start += piece.numel()

    for parameter in of:
        parameter.register_post_accumulate_grad_hook(arrived)

    def differentiate(batch: torch.Tensor, losses_of: Losses) -> torch.Tensor:
        waiting[:] = map(len, buckets)
        losses = []
        for one in batch:
            loss = losses_of(one).mean()
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses)

    return differentiate


def make_buckets(model: torch.nn.Module, slices: int) -> list[list[Part]]:
    """The engine's blocks: every layer, the final norm, slices of the vocabulary's tables."""
    every = slice(None)
    buckets = [[(p, every) for p in layer.parameters()] for layer in model.model.layers]
    buckets.append([(model.model.norm.weight, every)])
    tables = {model.model.embed_tokens.weight, model.lm_head.weight}  # one where they are tied
    for table in tables:
        height = len(table) // slices
        buckets += [[(table, slice(i * height, (i + 1) * height))] for i in range(slices)]
    return buckets


KINDS = {
    "plain": plain,
    "torchjd": torchjd_jacobian,
    "torchjd-rows": torchjd_rows,
    "buckets": bucketed,
}

if __name__ == "__main__":
    main()
