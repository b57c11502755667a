"""Files changed at random, 200 of each kind: a clear error, or a model like any other.

The changes are drawn from a seed. Some hit bytes, some replace values by others that programs
stumble over. A description that is accepted must describe a model that can be computed; weights
that are accepted, one that has all its parameters.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import tiny_models
from jaxmoo.errors import JaxmooError
from jaxmoo.hf import load_config, load_model, load_tokenizer
from jaxmoo.hf.gguf import convert_gguf
from jaxmoo.models import rope_frequencies
from tiny_gguf import write_gguf

NUMBER = 200
VALUES: list[Any] = [None, True, False, 0, -1, 1, 2, 3, 7, 10**9, 2**31, 2**63, 10**30, 1e39, 0.5]
VALUES += [float("nan"), float("inf"), "", "1", "nan", "llama3", "\0", "x" * 10_000, [], [1], {}]
VALUES += [{"rope_type": "llama3"}, {"a": [{}]}, [[]], ["sliding_attention"]]


def mutations(data: bytes, end: int) -> Iterator[bytes]:
    """Copies of a file with bytes before ``end`` flipped, overwritten, inserted, moved or cut."""
    rng = np.random.default_rng(0)
    for number in range(NUMBER):
        content = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            start, size = int(rng.integers(end)), int(rng.integers(1, 9))
            kind = number % 5
            if kind == 0:
                content[start % len(content)] ^= 1 << int(rng.integers(8))
            elif kind == 1:  # lengths, types and offsets are numbers of 4 or 8 bytes
                value = rng.choice([0, 1, 255, 2**16, 2**31, 2**32 - 1])
                content[start : start + 4] = int(value).to_bytes(4, "little")
            elif kind == 2:
                content[start : start + size] = rng.bytes(size)
            elif kind == 3:
                content[start:start] = content[start : start + size]
            else:
                del content[start : start + size]
        yield bytes(content if number % 20 else content[: rng.integers(len(content))])


def outcomes(attempt: Callable[[Any], object], changed: Iterator[Any]) -> tuple[int, int]:
    """How many changes were refused by an error of ours, and how many were accepted."""
    refused = accepted = 0
    for one in changed:
        try:
            attempt(one)
            accepted += 1
        except JaxmooError as error:
            assert str(error)
            refused += 1
    assert refused + accepted == NUMBER
    return refused, accepted


def hostile_gguf(file: Path) -> Iterator[bytes]:
    """GGUF files with bytes or, in turn, values and shapes changed at random."""
    good = write_gguf(file, pre="llama-bpe").read_bytes()
    reader = gguf.GGUFReader(file)
    rng, tensors = np.random.default_rng(0), [tensor.name for tensor in reader.tensors]
    names = [*list(reader.fields)[3:], "tokenizer.chat_template", "general.alignment"]
    names += [f"llama.{name}" for name in ("attention.head_count_kv", "attention.key_length")]
    kinds = gguf.GGUFValueType
    values = [(value, kinds.UINT32) for value in (0, 1, 2, 3, 4, 10**9)]
    values += [(value, kinds.FLOAT32) for value in (0.5, 2.0, -1.0, np.nan, np.inf)]
    values += [(value, kinds.STRING) for value in ("", "4", "a b", "{{", "x" * 10_000)]
    values += [(value, kinds.ARRAY) for value in ([0], [1] * 4, ["a"], list("abcd"))]
    values += [(True, kinds.BOOL), (-1, kinds.INT32), None]
    for content in mutations(good, reader.data_offset):
        if rng.random() < 0.4:
            yield content
            continue
        if rng.random() < 0.2:
            shape = rng.integers(1, 6, rng.integers(1, 4))
            changes = {str(rng.choice(tensors)): np.ones(shape, np.float32)}
        else:
            changes = {"fields": {str(rng.choice(names)): values[rng.integers(len(values))]}}
        yield write_gguf(file, pre="llama-bpe", **changes).read_bytes()


def test_a_hostile_gguf_file_is_refused_or_becomes_a_model_that_loads(tmp_path: Path):
    file, out = tmp_path / "a.gguf", tmp_path / "out"

    def convert(content: bytes) -> None:
        file.write_bytes(content)
        shutil.rmtree(out, ignore_errors=True)
        try:
            convert_gguf(file, out)
        except JaxmooError:
            assert not out.exists()
            raise
        load_tokenizer(out)
        state = nnx.state(load_model(out))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))

    refused, accepted = outcomes(convert, hostile_gguf(file))
    assert refused > NUMBER // 2 and accepted > NUMBER // 20


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_models.save("llama3_rope", path)
    return path


def test_a_mutated_safetensors_file_is_refused_or_holds_the_whole_model(model: Path, tmp_path):
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    good = file.read_bytes()
    expected = {name: (v.shape, v.dtype) for name, v in load_file(file).items()}

    def load(content: bytes) -> None:
        file.write_bytes(content)
        load_model(tmp_path)
        found = load_file(file)
        assert {name: value.shape for name, value in found.items()} == {
            name: shape for name, (shape, _) in expected.items()
        }

    header = 8 + int.from_bytes(good[:8], "little")
    refused, _ = outcomes(load, mutations(good, header))
    assert refused > NUMBER // 2


def hostile_configs(good: dict[str, Any]) -> Iterator[str]:
    """The description with values replaced: each field that is there by each value, drawn."""
    rng = np.random.default_rng(0)
    nested = [("rope_parameters", key) for key in good["rope_parameters"]]
    known = [*((key,) for key in good), *nested]
    others = [("sliding_window",), ("use_sliding_window",), ("layer_types",), ("rope_scaling",)]
    for _ in range(NUMBER):
        content = copy.deepcopy(good)
        if rng.random() < 0.3:
            content["model_type"] = str(rng.choice(["mistral", "qwen2", "qwen3"]))
        for _ in range(rng.integers(1, 3)):
            path = [*known, *others][rng.integers(len(known) + len(others))]
            holder = content
            for key in path[:-1]:
                holder = holder[key] if isinstance(holder.get(key), dict) else {}
            holder[path[-1]] = VALUES[rng.integers(len(VALUES))]
        yield json.dumps(content)


def test_a_hostile_config_is_refused_or_describes_a_model_that_can_be_computed(
    model: Path, tmp_path: Path
):
    def read(text: str) -> None:
        (tmp_path / "config.json").write_text(text)
        config = load_config(tmp_path)
        sizes = (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.head_dim)
        assert all(type(size) is int and size > 0 for size in sizes)
        assert type(config.tie_word_embeddings) is bool
        assert 0 <= np.float32(config.rms_norm_eps) < np.inf
        frequencies = rope_frequencies(config)
        assert (frequencies > 0).all() and (frequencies <= 1).all()

    good = json.loads((model / "config.json").read_text())
    refused, accepted = outcomes(read, hostile_configs(good))
    assert refused > NUMBER // 4 and accepted > NUMBER // 10


def test_bytes_of_a_config_changed_at_random_are_never_a_traceback(model: Path, tmp_path: Path):
    good = (model / "config.json").read_bytes()

    def read(content: bytes) -> None:
        (tmp_path / "config.json").write_bytes(content)
        load_config(tmp_path)

    outcomes(read, mutations(good, len(good)))
