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
    paths = parameter_paths(DecoderConfig.from_hf(oracle.config.to_dict()))
    names = [hf_tensor(path).name for path in paths]
    assert sorted(names) == sorted(name for name, _ in oracle.named_parameters())
    assert [logical_path(name) for name in names] == paths


def test_a_parameter_without_a_name_is_an_error():
    with pytest.raises(
        CheckpointError, match=r"'layers\.0\.router\.kernel' has no Hugging Face name"
    ):
        hf_tensor("layers.0.router.kernel")
