"""A digest of weights: blind to how they lie, awake to any change."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import tiny_models
from jaxmoo.hf import load_model
from jaxmoo.runs.fingerprint import fingerprint


def test_it_is_of_the_weights_alone(tmp_path):
    tiny_models.save("llama", tmp_path)
    whole = fingerprint(load_model(tmp_path))
    assert fingerprint(load_model(tmp_path, segments=(0, 2))) == whole
    file = tmp_path / "model.safetensors"
    original = load_file(file)
    norm = "model.layers.2.input_layernorm.weight"
    last_bit = original[norm].copy()
    last_bit[5] = np.nextafter(last_bit[5], 2)
    swapped = original[norm].copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    found = {whole}
    for changed in (last_bit, swapped):
        save_file(original | {norm: changed}, file, metadata={"format": "pt"})
        found.add(fingerprint(load_model(tmp_path)))
    layers = [f"model.layers.{i}.input_layernorm.weight" for i in (1, 2)]
    exchanged = dict(zip(layers, (original[name] for name in reversed(layers)), strict=True))
    save_file(original | exchanged, file, metadata={"format": "pt"})
    found.add(fingerprint(load_model(tmp_path)))
    assert len(found) == 4


def test_half_precision_has_one_too(tmp_path):
    import torch

    tiny_models.save("llama", tmp_path, dtype=torch.bfloat16)
    model = load_model(tmp_path, param_dtype=None)
    assert model.norm.scale.get_value().dtype != jnp.float32
    assert len(fingerprint(model)) == 16
