"""Metrics on disk, in TensorBoard and on the terminal."""

from __future__ import annotations

import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoo.errors import ConfigError, DataError
from jaxmoo.train.metrics import MetricsWriter, read_metrics
from jaxmoo.train.trackers import Trackers


def row(step: int, **more) -> dict:
    return {"step": step, "loss": {"en": 2.5, "no": 3.25}, **more}


def steps(directory) -> list[int]:
    return [r["step"] for r in read_metrics(directory)]


# --- metrics.jsonl ---------------------------------------------------------------------------


def test_rows_come_back_as_they_were(tmp_path):
    rows = [row(1, blocks={"layers.22": {"conflict_share": 0.5}}), row(2, cosine=[[1, 0], [0, 1]])]
    with MetricsWriter(tmp_path / "run") as writer:
        for each in rows:
            writer.write(each)
            # On disk at once, for whoever watches or if the process is killed.
            assert read_metrics(tmp_path / "run")[-1] == each
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == rows


def test_arrays_become_the_shortest_numbers_that_equal_them(tmp_path):
    values = {
        "a": jnp.float32(0.1),
        "b": np.float64(0.1),
        "c": jnp.array([0.1, 2.0]),
        "d": np.int32(3),
        "e": np.bool_(True),
        "f": jnp.bfloat16(0.5),
        "g": {"h": [np.float32(1.1)]},
    }
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": np.int64(1), **values})
    (read,) = read_metrics(tmp_path)
    assert read == {
        "step": 1,
        "a": 0.1,
        "b": 0.1,
        "c": [0.1, 2.0],
        "d": 3,
        "e": True,
        "f": 0.5,
        "g": {"h": [1.1]},
    }
    assert np.float32(read["a"]) == np.float32(0.1)


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "a": math.nan, "b": jnp.inf, "c": np.array([1, -np.inf])})
    line = (tmp_path / "metrics.jsonl").read_text()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read_metrics(tmp_path) == [{"step": 1, "a": None, "b": None, "c": [1.0, None]}]


def test_a_row_needs_a_step(tmp_path):
    with (
        MetricsWriter(tmp_path) as writer,
        pytest.raises(DataError, match="integer step"),
    ):
        writer.write({"loss": 1.0})


def test_resuming_keeps_the_rows_up_to_the_checkpoint(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(row(step))
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()[:3]
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        assert steps(tmp_path) == [1, 2, 3]
        writer.write(row(4))
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:3] == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_starting_afresh_keeps_no_rows(tmp_path):
    for _ in range(2):
        with MetricsWriter(tmp_path) as writer:
            writer.write(row(0))
            writer.write(row(1))
    assert steps(tmp_path) == [0, 1]


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3}', "{", '{"step": 3, "a": "é'])
def test_a_line_cut_by_a_kill_is_not_read_and_not_continued(tmp_path, tail):
    with MetricsWriter(tmp_path) as writer:
        writer.write(row(1))
        writer.write(row(2))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail.encode()[: len(tail)])
    complete = [1, 2, 3] if tail.endswith("}") else [1, 2]
    assert steps(tmp_path) == complete
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write(row(4))
    assert steps(tmp_path) == [*complete, 4]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: expected one JSON object"):
        read_metrics(path)
    with pytest.raises(DataError, match=":2:"):
        MetricsWriter(tmp_path, resume_step=1)
    assert path.read_text().count("\n") == 3  # left as it was


# --- TensorBoard -----------------------------------------------------------------------------


def read_events(directory) -> dict[str, dict[int, float]]:
    """Every scalar of the event files that TensorBoard would show, by tag and step."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    shown: dict[str, dict[int, float]] = {}
    for path in sorted(directory.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            record = data[at + 12 : at + 12 + length]
            checksum = int.from_bytes(data[at + 12 + length : at + 16 + length], "little")
            assert masked_crc32c(record) == checksum
            event = Event.FromString(record)
            if event.session_log.status == event.session_log.START:
                for values in shown.values():
                    for step in [s for s in values if s >= event.step]:
                        del values[step]
            for value in event.summary.value:
                shown.setdefault(value.tag, {})[event.step] = value.simple_value
            at += length + 16
    return shown


EVENTS = Trackers(tensorboard=True)


def test_tensorboard_groups_scalars_by_quantity(tmp_path):
    with MetricsWriter(tmp_path, EVENTS) as writer:
        writer.write(
            row(
                1,
                learning_rate=0.5,
                grad_norm=math.nan,
                cosine=[[1, 0], [0, 1]],
                blocks={"layers.22": {"conflict_share": 0.25}},
            )
        )
    events = read_events(tmp_path / "tensorboard")
    assert events["loss/en"] == {1: 2.5}
    assert events["train/learning_rate"] == {1: 0.5}
    assert math.isnan(events["train/grad_norm"][1])
    assert events["block_conflict_share/layers.22"] == {1: 0.25}
    assert set(events) == {
        "loss/en",
        "loss/no",
        "train/learning_rate",
        "train/grad_norm",
        "block_conflict_share/layers.22",
    }


def test_tensorboard_forgets_what_a_resume_repeats(tmp_path):
    with MetricsWriter(tmp_path, EVENTS) as writer:
        for step in range(1, 6):
            writer.write({"step": step, "loss": {"en": 1.0}})
    with MetricsWriter(tmp_path, EVENTS, resume_step=3) as writer:
        writer.write({"step": 4, "loss": {"en": 9.0}})
    events = read_events(tmp_path / "tensorboard")
    assert events["loss/en"] == {1: 1.0, 2: 1.0, 3: 1.0, 4: 9.0}


def test_missing_tensorboardx_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"tensorboardX is not installed.*tensorboard=false"):
        MetricsWriter(tmp_path, EVENTS)
    MetricsWriter(tmp_path).close()
