"""Loading: every tensor checked, only the wanted slices read, every fault named."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import tiny_models
from jaxmoo.errors import CheckpointError, ConfigError
from jaxmoo.hf import load_config, load_model, save_model
from jaxmoo.hf.weights import Weights
from tiny_models import by_logical_path


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model that no test changes."""
    directory = tmp_path_factory.mktemp("model")
    tiny_models.save("llama", directory)
    return directory


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A model of the test's own."""
    return shutil.copytree(saved, tmp_path / "checkpoint")


def edit_config(directory: Path, **changes) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(directory: Path, edit) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_tensors_are_transposed_stacked_and_otherwise_untouched(checkpoint: Path):
    tensors = load_file(checkpoint / "model.safetensors")
    model = load_model(checkpoint, segments=(0, 1))
    stack = np.stack([tensors[f"model.layers.{i}.mlp.up_proj.weight"].T for i in (1, 2)])
    np.testing.assert_array_equal(model.layers["1"].mlp.up_proj.kernel[...], stack)
    np.testing.assert_array_equal(
        model.embed_tokens.embedding[...], tensors["model.embed_tokens.weight"]
    )
    np.testing.assert_array_equal(model.lm_head.embedding[...], tensors["lm_head.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_are_widened_exactly(tmp_path: Path, dtype):
    import torch

    oracle = tiny_models.save("llama", tmp_path, dtype=getattr(torch, dtype))
    up = oracle.model.layers[2].mlp.up_proj.weight.detach().float().numpy().T
    wide = load_model(tmp_path).layers["0"].mlp.up_proj.kernel[...]
    np.testing.assert_array_equal(wide[2], up)
    narrow = load_model(tmp_path, param_dtype=jnp.bfloat16).layers["0"].mlp.up_proj.kernel[...]
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow[2], up.astype(ml_dtypes.bfloat16))


def test_several_files_with_an_index_load_like_one(checkpoint: Path, tmp_path_factory):
    sharded = tmp_path_factory.mktemp("sharded")
    oracle = tiny_models.make("llama")
    oracle.save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected = by_logical_path(nnx.state(load_model(checkpoint)))
    for name, array in by_logical_path(nnx.state(load_model(sharded))).items():
        np.testing.assert_array_equal(array, expected[name])


def on_four_devices(directory: Path) -> dict[str, list[int]]:
    """Load parameters laid out by a function of the abstract state; how much was read of each."""
    grid = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    sizes: dict[str, list[int]] = {}
    read = Weights.read

    def counted(self, name, index=()):
        value = read(self, name, index)
        sizes.setdefault(name, []).append(value.size)
        return value

    def last_axis(x):
        divides = x.shape[-1] % 4 == 0
        return NamedSharding(grid, P(*[None] * (x.ndim - 1), "x") if divides else P())

    whole = load_model(directory, segments=(0, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weights, "read", counted)
        sharded = load_model(
            directory, segments=(0, 2), shardings=lambda s: jax.tree.map(last_axis, s)
        )
    assert sharded.layers["0"].mlp.up_proj.kernel.sharding.spec == P(None, None, "x")
    states = (jax.tree.leaves(nnx.state(model)) for model in (sharded, whole))
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)
    return sizes


def test_each_device_reads_its_own_slices(saved: Path, eight_devices):
    sizes = eight_devices("hf.test_load", "on_four_devices", saved)
    assert sizes["model.layers.1.mlp.up_proj.weight"] == [48 * 80 // 4] * 4
    assert sizes["model.embed_tokens.weight"] == [131 * 48 // 4] * 4


def test_rotary_buffers_of_old_checkpoints_are_ignored(checkpoint: Path):
    edit_weights(
        checkpoint,
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, "f4")}),
    )
    load_model(checkpoint)


def test_a_tied_model_may_ship_a_copy_of_its_embedding_but_nothing_else(tmp_path: Path):
    tiny_models.save("llama_tied", tmp_path)
    edit_weights(
        tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
    )
    assert load_model(tmp_path).lm_head is None
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        load_model(tmp_path)


def test_missing_extra_and_misshapen_tensors_are_all_reported_at_once(checkpoint: Path):
    def edit(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        del tensors["lm_head.weight"]
        tensors["model.layers.3.mlp.up_proj.weight"] = np.ones((80, 48), "f4")
        tensors["model.norm.weight"] = np.ones(49, "f4")

    edit_weights(checkpoint, edit)
    with pytest.raises(CheckpointError) as error:
        load_model(checkpoint)
    message = str(error.value)
    assert "missing: model.layers.1.mlp.up_proj.weight" in message
    assert "missing: lm_head.weight" in message
    assert "not part of this architecture: model.layers.3.mlp.up_proj.weight" in message
    assert "model.norm.weight: expected shape [48], found [49]" in message


def test_a_truncated_file_is_refused(checkpoint: Path):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: it is damaged"):
        load_model(checkpoint)


@pytest.mark.parametrize("header", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{}", b"PK\x03\x04 zip"])
def test_a_file_that_is_not_safetensors_is_refused(checkpoint: Path, header):
    (checkpoint / "model.safetensors").write_bytes(header)
    with pytest.raises(CheckpointError):
        load_model(checkpoint)


def test_quantised_tensors_are_refused(checkpoint: Path):
    edit_weights(checkpoint, lambda t: t.update({"model.norm.weight": np.ones(48, np.int8)}))
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight has dtype I8"):
        load_model(checkpoint)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_pickled_weights_are_read_like_safetensors(tmp_path: Path, dtype, tied):
    import torch

    variant = "llama_tied" if tied else "llama"
    oracle = tiny_models.save(variant, tmp_path, dtype=getattr(torch, dtype))
    expected = by_logical_path(nnx.state(load_model(tmp_path, param_dtype=None)))
    (tmp_path / "model.safetensors").unlink()
    torch.save(oracle.state_dict(), tmp_path / "pytorch_model.bin")
    found = by_logical_path(nnx.state(load_model(tmp_path, param_dtype=None)))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_several_pickles_with_an_index(checkpoint: Path):
    import torch

    tensors = {n: torch.tensor(v) for n, v in load_file(checkpoint / "model.safetensors").items()}
    expected = by_logical_path(nnx.state(load_model(checkpoint)))
    (checkpoint / "model.safetensors").unlink()
    weight_map = {}
    for i in range(2):
        part = dict(list(tensors.items())[i::2])
        torch.save(part, checkpoint / f"part{i}.bin")
        weight_map |= dict.fromkeys(part, f"part{i}.bin")
    index = checkpoint / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for name, array in by_logical_path(nnx.state(load_model(checkpoint))).items():
        np.testing.assert_array_equal(array, expected[name])


class Intruder:
    """Runs a command when unpickled without care."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_pickle_cannot_run_code(checkpoint: Path, tmp_path_factory):
    import torch

    target = tmp_path_factory.mktemp("out") / "ran"
    (checkpoint / "model.safetensors").unlink()
    torch.save({"a": Intruder(target)}, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        load_model(checkpoint)
    assert not target.exists()
    torch.load(checkpoint / "pytorch_model.bin", weights_only=False)
    assert target.exists(), "the file would not have shown anything"


def test_pickles_are_not_opened_without_pytorch(checkpoint: Path, monkeypatch):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        load_model(checkpoint)  # not a pickle at all
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"is a pickle.* install torch, or save"):
        load_model(checkpoint)


def test_pickles_of_other_things_are_refused(checkpoint: Path):
    import torch

    (checkpoint / "model.safetensors").unlink()
    for content in ([1, 2], {"model.norm.weight": 3}, torch.ones(3)):
        torch.save(content, checkpoint / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            load_model(checkpoint)


def forge(file: Path, header: object, *, length: int | None = None, data: bytes = b"") -> None:
    """Write a safetensors file whose header says whatever it likes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    file.write_bytes(size.to_bytes(8, "little") + text + data)


def entry(shape: list[int], *offsets: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "forged",
    [
        {"header": {}, "length": 2**63},
        {"header": {}, "length": 2**64 - 1},
        {"header": {}, "length": 10**9},
        {"header": b"[" * 100_000},
        {"header": {"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, "data": bytes(12)},
        {"header": {"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, "data": bytes(8)},
        {"header": {"a": entry([2], 0, 8)}, "data": bytes(4)},
        {"header": {"a": entry([2], 0, 8)}, "data": bytes(12)},
        {"header": {"a": entry([3], 0, 8)}, "data": bytes(8)},
        {"header": {"a": entry([2**40, 2**40], 0, 8)}, "data": bytes(8)},
        {"header": {"a": entry([2], 8, 0)}, "data": bytes(8)},
        {"header": {"a": entry([2], 0, 2**62)}, "data": bytes(8)},
        {"header": {"a": entry([2], -8, 0)}, "data": bytes(8)},
        {"header": {"a": entry([2], 0, 8, dtype="F99")}, "data": bytes(8)},
    ],
    ids=lambda forged: str(forged)[:60],
)
def test_forged_headers_are_refused(checkpoint: Path, forged):
    forge(checkpoint / "model.safetensors", **forged)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_model(checkpoint)


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_corrupted_header_or_index_is_only_ever_a_clear_error(tmp_path: Path, data):
    """Bytes overwritten, inserted or cut anywhere in the header, or in an index."""
    checkpoint, whole = tmp_path, tmp_path / "whole"
    if not whole.exists():
        tiny_models.save("llama", checkpoint, num_hidden_layers=1)
        (checkpoint / "model.safetensors").rename(whole)
    index = checkpoint / "model.safetensors.index.json"
    weights = checkpoint / "model.safetensors"
    good = whole.read_bytes()
    if data.draw(st.booleans(), label="in an index"):
        weights.unlink(missing_ok=True)
        (checkpoint / "part.safetensors").write_bytes(good)
        names = dict.fromkeys(load_file(whole), "part.safetensors")
        target, good = index, json.dumps({"weight_map": names}).encode()
        end = len(good)
    else:
        target, end = weights, 8 + int.from_bytes(good[:8], "little")
    start = data.draw(st.integers(0, end - 1), label="start")
    cut = data.draw(st.integers(0, 12), label="cut")
    new = data.draw(st.binary(max_size=12), label="new")
    target.write_bytes(good[:start] + new + good[start + cut :])
    try:
        load_model(checkpoint)
    except CheckpointError as error:
        assert str(error)
    finally:
        target.unlink()


def test_a_config_of_more_layers_than_there_are_tensors_is_refused_at_once(
    checkpoint: Path,
):
    edit_config(checkpoint, num_hidden_layers=10**4)
    with pytest.raises(CheckpointError, match="num_hidden_layers=10000, but its weights are"):
        load_model(checkpoint)


def test_a_misnamed_tensor_is_shown_with_the_name_it_may_have_had(checkpoint: Path):
    edit_weights(checkpoint, lambda t: t.update({"model.norm.wieght": t.pop("model.norm.weight")}))
    expected = r"architecture: model\.norm\.wieght\. Did you mean 'model\.norm\.weight'\?"
    with pytest.raises(CheckpointError, match=expected):
        load_model(checkpoint)


def test_stored_dtypes_are_kept_on_request(tmp_path: Path):
    model = tiny_models.make("llama").bfloat16()
    model.model.norm.float()
    model.model.layers[1].mlp.up_proj.half()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, param_dtype=None)
    assert loaded.embed_tokens.embedding.dtype == jnp.bfloat16
    assert loaded.norm.scale.dtype == jnp.float32
    assert loaded.layers["0"].mlp.up_proj.kernel.dtype == jnp.float32  # holds both exactly
    assert loaded.layers["0"].mlp.down_proj.kernel.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "model-00001.safetensors"}}, "not there: model-00001.safetensors"),
        ({"weight_map": {"a": "../secret.safetensors"}}, "expected the name of a .safetensors"),
        ({"weight_map": {"a": "/etc/passwd"}}, "expected the name of a .safetensors"),
        ({"weight_map": {"a": "model.bin"}}, "expected the name of a .safetensors"),
        ({"weight_map": {"a": "a\0.safetensors"}}, "expected the name of a .safetensors"),
        ({"weight_map": {"a": "a" * 999 + ".safetensors"}}, "names files that are not there"),
        ({"weight_map": ["a"]}, "is not an index"),
        ([], "is not an index"),
    ],
)
def test_an_index_may_only_name_files_beside_it(checkpoint: Path, index, message):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_model(checkpoint)


def test_an_index_may_only_name_tensors_that_are_there(checkpoint: Path):
    (checkpoint / "model.safetensors").rename(checkpoint / "part.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"nothing": "part.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="does not hold what the index says"):
        load_model(checkpoint)


def test_an_unsupported_architecture_is_refused_before_weights_are_looked_at(checkpoint: Path):
    (checkpoint / "model.safetensors").unlink()
    edit_config(checkpoint, model_type="lama")
    with pytest.raises(ConfigError, match=r"'lama' is not supported. Did you mean 'llama'"):
        load_model(checkpoint)


@pytest.mark.parametrize("content", [None, "{", "[]", "[" * 100_000])
def test_a_directory_without_a_config_is_refused(checkpoint: Path, content):
    (checkpoint / "config.json").unlink()
    if content is not None:
        (checkpoint / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("token", [131, -1, "1", 1.0, True, [1, 131], [None], {}])
def test_the_token_that_ends_replies_is_one_of_the_models(checkpoint: Path, name, token):
    assert load_config(checkpoint).vocab_size == 131
    content = json.loads((checkpoint / name).read_text())
    (checkpoint / name).write_text(json.dumps(content | {"eos_token_id": token}))
    with pytest.raises(CheckpointError, match=rf"{name}: eos_token_id must be .* from 0 to 130"):
        load_config(checkpoint)


def test_a_faulty_config_is_named_by_its_file(checkpoint: Path):
    edit_config(checkpoint, rope_parameters={"rope_type": "default", "rope_theta": float("nan")})
    with pytest.raises(ConfigError, match=r"config\.json: model config: rope_theta must be .*nan"):
        load_model(checkpoint)


def test_shardings_of_another_model_are_refused(checkpoint: Path):
    with pytest.raises(CheckpointError, match="shardings has 1 leaves"):
        load_model(checkpoint, shardings={"a": jax.devices()[0]})


# --- A model of texts and images ----------------------------------------------------------------


def test_of_gemma_3_with_images_the_text_model_is_read_and_saved_as_it_was(tmp_path: Path):
    """But a vision tower is refused."""
    plain, whole = tmp_path / "plain", tmp_path / "whole"
    tiny_models.save("gemma3_text", plain)
    tensors = load_file(plain / "model.safetensors")
    tensors = {f"language_model.{name}": value for name, value in tensors.items()}
    whole.mkdir()
    text = json.loads((plain / "config.json").read_text())
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 16}}
    (whole / "config.json").write_text(json.dumps(config))
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    model = load_model(whole)
    for name, array in by_logical_path(nnx.state(load_model(plain))).items():
        np.testing.assert_array_equal(by_logical_path(nnx.state(model))[name], array, err_msg=name)
    save_model(model, tmp_path / "saved", source=whole)
    before, after = (path / "model.safetensors" for path in (whole, tmp_path / "saved"))
    assert before.read_bytes() == after.read_bytes()

    tensors["vision_tower.post_layernorm.weight"] = np.ones(16, np.float32)
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"vision tower \(vision_tower\.\*\), which is not"):
        load_model(whole)


def test_a_constant_of_a_family_must_have_its_value(tmp_path: Path):
    tiny_models.save("apertus", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.act_fn.beta"] = np.array(0.7, np.float32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.act_fn\.beta must be 0\.5"):
        load_model(tmp_path)


def test_a_constant_may_have_been_rounded_before_it_was_saved_in_float32(tmp_path: Path):
    """As in a model that was trained in bfloat16, or read from it."""
    tiny_models.make("apertus").bfloat16().float().save_pretrained(tmp_path)
    eps = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.act_fn.eps"]
    assert eps != np.float32(-1e-6)
    load_model(tmp_path)
