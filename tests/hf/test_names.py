"""The name map against transformers' own names."""

from __future__ import annotations

import pytest

import tiny_models
from jaxmoo.errors import CheckpointError
from jaxmoo.hf.names import hf_tensor, logical_path
from jaxmoo.models import DecoderConfig, parameter_paths


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_every_parameter_has_the_name_transformers_gives_it_and_back(variant):
    oracle = tiny_models.make(variant)
    config = DecoderConfig.from_hf(oracle.config.to_dict())
    paths = parameter_paths(config)
    tensors = [hf_tensor(path, config) for path in paths]
    theirs = tiny_models.in_files(oracle, dict(oracle.named_parameters()))
    assert {tensor.name for tensor in tensors} == set(theirs)
    if all(tensor.rows is None for tensor in tensors):
        assert [logical_path(tensor.name, config.family) for tensor in tensors] == paths
    else:  # every row once
        rows: dict[str, list[int]] = {}
        for name, _, (first, count) in (tensor for tensor in tensors if tensor.rows):
            rows.setdefault(name, []).extend(range(first, first + count))
        for name, parameter in theirs.items():
            assert name not in rows or sorted(rows[name]) == list(range(len(parameter)))


def test_a_parameter_without_a_name_is_an_error():
    with pytest.raises(
        CheckpointError, match=r"'layers\.0\.router\.kernel' has no Hugging Face name"
    ):
        hf_tensor("layers.0.router.kernel")
