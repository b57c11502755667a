"""Safetensors in a bucket: only the bytes that are wanted are fetched, and damage is found."""

import json

import numpy as np
import pytest
from safetensors.numpy import save

from jaxmoo.errors import CheckpointError
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.weights import Weights

ROWS = np.arange(4096 * 256, dtype=np.float32).reshape(4096, 256)


def test_only_the_rows_that_are_wanted_are_fetched(faulty):
    proxy, bucket = faulty
    other = np.ones((8,), np.float16)
    (bucket / "m/model.safetensors").write_bytes(save({"a.weight": ROWS, "b.weight": other}))
    weights = Weights(bucket / "m")
    assert weights.names() == ["a.weight", "b.weight"]
    assert weights.shape("a.weight") == (4096, 256) and weights.dtype("b.weight") == "float16"
    proxy.seen.clear()
    np.testing.assert_array_equal(
        weights.read("a.weight", (slice(1000, 1010), slice(8, 16))), ROWS[1000:1010, 8:16]
    )
    np.testing.assert_array_equal(  # the same rows, for the next device
        weights.read("a.weight", (slice(1000, 1010), slice(16, 24))), ROWS[1000:1010, 16:24]
    )
    [(_, asked)] = [found for found in proxy.seen if found[0].startswith("GET")]
    first, last = map(int, asked.removeprefix("bytes=").split("-"))
    assert last - first + 1 == 10 * 256 * 4
    np.testing.assert_array_equal(weights.read("b.weight"), other)
    np.testing.assert_array_equal(weights.read("a.weight"), ROWS)


def forged(change):
    data = save({"a.weight": ROWS[:4, :4]})
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 64,
        b"\x02" + b"\0" * 7 + b"[]",
        save({"a.weight": ROWS[:4, :4]})[:-4],
        forged(lambda header: header["a.weight"].update(shape=[4, 5])),
        forged(lambda header: header["a.weight"].update(data_offsets=[4, 68])),
        forged(lambda header: header["a.weight"].update(data_offsets=[-64, 0])),
        forged(lambda header: header["a.weight"].update(dtype=7)),
        forged(lambda header: header.update(b=3)),
    ],
)
def test_damage_is_found_before_anything_is_read(data):
    directory = typed_path("memory://bucket/damaged")
    (directory / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be read: it is damaged, truncated"):
        Weights(directory)


def test_pickles_are_not_read_from_buckets():
    directory = typed_path("memory://bucket/pickles")
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a pickle, and not read from a bucket"):
        Weights(directory)
