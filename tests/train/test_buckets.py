"""A run whose model, data and output are in a bucket."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load

from bucket_servers import SECRET, everything, upload
from jaxmoo.commands.train import main
from jaxmoo.convert.models import to_hf
from jaxmoo.files.outputs import typed_path
from jaxmoo.runs.directory import RunDirectory

QUIET = {
    "data__seen": ["it", "pt"],
    "data__unseen": [],
    "data__max_held_out": 2,
    "resolve__aggregator": "mean",
}


@pytest.fixture
def in_bucket(write_config, s3_bucket, tiny_model, conversations):
    """The config of a run with everything in a bucket, and the bucket."""
    upload(tiny_model, s3_bucket / "model")
    upload(typed_path(conversations).parent, s3_bucket / "data")
    config = write_config(
        output=str(s3_bucket / "run"),
        model__source=str(s3_bucket / "model"),
        data__source=str(s3_bucket / "data/{language}.jsonl"),
        **QUIET,
    )
    return config, s3_bucket


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_a_disk(in_bucket, write_config, tmp_path, capsys):
    config, bucket = in_bucket
    assert main(["--config", str(config)]) == 0
    text = config.read_text()
    assert main(["--config", str(write_config(**QUIET))]) == 0
    here, there = tmp_path / "run", bucket / "run"
    same = ["export/model.safetensors", "evaluation/step_00000004.json"]
    for name in same:
        assert (there / name).read_bytes() == (here / name).read_bytes(), name
    names = {p.relative_to(here).parts[0] for p in here.iterdir()} - {"compiled", ".lock"}
    assert {p.name for p in there.iterdir()} == names
    rows = [json.loads(row) for row in (there / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "loss" not in row] == [0, 4]  # held out
    assert RunDirectory(there).steps() == RunDirectory(here).steps()
    # The same command finds it complete; a new checkpoint would be another.
    config.write_text(text)
    before = everything(there / "export")
    capsys.readouterr()
    assert main(["--config", str(config)]) == 0
    assert everything(there / "export") == before
    # No directory of this machine has been made, and nobody's credentials stored.
    assert not list(tmp_path.glob("s3*")) and not typed_path(".").joinpath("s3:").exists()
    assert SECRET.encode() not in everything(bucket)
    weights = load((there / "export/model.safetensors").read_bytes())
    assert all(np.isfinite(w).all() for w in weights.values())


@pytest.mark.slow
def test_two_hosts_need_no_disk_in_common(in_bucket, tmp_path):
    config, bucket = in_bucket
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jaxmoo", "train", "--config", str(config), "report=false"]
    command += [f"--coordinator-address=localhost:{port}", "--num-processes=2"]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"
    common = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    started = [
        subprocess.Popen(
            [*command, f"--process-id={number}"],
            env=common | {"JAXMOO_SCRATCH": str(tmp_path / f"host_{number}")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    run = bucket / "run"
    assert any("ocdbt.process_1" in str(file) for file in (run / "checkpoints/4").rglob("*"))
    assert not (run / ".parts").exists()
    # What hosts have written alone is whole together, and read from where it is.
    to_hf(run, tmp_path / "again", step=4, say=lambda _: None)
    found = (tmp_path / "again/model.safetensors").read_bytes()
    assert found == (run / "export/model.safetensors").read_bytes()
