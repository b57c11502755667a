"""Conflict from Gram matrices, against gradients written down; and how runs record them."""

import numpy as np
import pytest

from jaxmoo.analysis.conflict import (
    conflict_share,
    cosines,
    layer_of,
    magnitude_ratio,
    mean_cosine,
    module_of,
    together,
)
from jaxmoo.errors import ConfigError, DataError
from jaxmoo.runs.gram_log import read_grams, write_grams

BLOCKS = ("layers.2.mlp", "layers.2.self_attn", "layers.10.mlp", "norm")


def gradients() -> list[np.ndarray]:
    """Of three languages, one array per block."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(3, n)) for n in (5, 7, 5, 2)]


def test_cosines_shares_and_ratios_are_those_of_the_gradients():
    for g in gradients():
        unit = g / np.linalg.norm(g, axis=1, keepdims=True)
        gram = g @ g.T
        np.testing.assert_allclose(cosines(gram), unit @ unit.T, atol=1e-12)
        pairs = [unit[i] @ unit[j] for i, j in ((0, 1), (0, 2), (1, 2))]
        assert conflict_share(gram) == pytest.approx(np.mean(np.array(pairs) < 0))
        assert mean_cosine(gram) == pytest.approx(np.mean(pairs))
        norms = np.linalg.norm(g, axis=1)
        assert magnitude_ratio(gram) == pytest.approx(norms.max() / norms.min())


def test_an_absent_language_is_left_out():
    g = gradients()[0]
    g[1] = 0
    gram = g @ g.T
    assert np.isnan(cosines(gram)[1]).all() and np.isfinite(cosines(gram)[0, 2])
    assert mean_cosine(gram) == pytest.approx(cosines(gram)[0, 2])
    g[2] = 0
    for measure in (conflict_share, mean_cosine, magnitude_ratio):
        assert np.isnan(measure(g @ g.T))


def test_gram_matrices_of_modules_make_up_those_of_layers():
    parts = gradients()
    grams = np.stack([[g @ g.T for g in parts], [4 * g @ g.T for g in parts]])  # two steps
    names, sums = together(grams, BLOCKS, [layer_of(block) for block in BLOCKS])
    assert names == ["layers.2", "layers.10"]
    layer = np.concatenate(parts[:2], axis=1)
    np.testing.assert_allclose(sums[0, 0], layer @ layer.T)
    np.testing.assert_allclose(sums[1, 1], 4 * parts[2] @ parts[2].T)
    assert [module_of(block) for block in BLOCKS] == ["mlp", "self_attn", "mlp", None]


def test_records_come_back_in_order(tmp_path):
    grams = np.stack([g @ g.T for g in gradients()]).astype(np.float32)
    for step in (10, 1, 200):
        write_grams(tmp_path / "grams", step, BLOCKS, ("en", "es", "fa"), step * grams)
    log = read_grams(tmp_path / "grams")
    assert log.steps == (1, 10, 200) and log.blocks == BLOCKS
    assert log.languages == ("en", "es", "fa")
    np.testing.assert_allclose(log.grams[2], 200 * grams, rtol=1e-6)


def test_missing_foreign_and_damaged_records_are_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.gram_every"):
        read_grams(tmp_path)
    gram = np.eye(2)[None]
    write_grams(tmp_path, 1, ["whole"], ["en", "es"], gram)
    write_grams(tmp_path, 2, ["whole"], ["en", "it"], gram)
    with pytest.raises(DataError, match=r"00000002\.npz does not belong"):
        read_grams(tmp_path)
    (tmp_path / "00000002.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"00000002\.npz cannot be read"):
        read_grams(tmp_path)
