"""Train the quick start from and to a bucket, and see that it ends as on the disk.

    python benchmarks/bucket_quickstart.py --steps 4 --folder FOLDER

The very model and languages of the quick start are trained for a few steps with model, data and
output in a bucket, on an S3 server (moto) on the loopback or on one that is given, stopped by
SIGTERM when the first checkpoint is there and finished by the same command. The same run on the
disk must end with the same weights, scores, metrics and report; the exit code is 1 if it does not,
or when something fails.

With ``--folder`` what has been done is kept there and not done again; with ``--server`` as well,
what is in the bucket.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

from reliability import Run, quickstart_config, result, s3_server

from jaxmoo.config import load_config
from jaxmoo.data import open_source
from jaxmoo.files.digests import DIGESTS
from jaxmoo.hf import resolve_source
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.train.metrics import read_metrics


def quickstart(options: argparse.Namespace, folder: Path) -> bool:
    """Compare the quick start from and to a bucket with that on the disk; tell whether equal."""
    config = quickstart_config(folder)
    files = folder / "inputs"
    if not files.exists():
        write_inputs(config, files)
    overrides = [f"train.steps={options.steps}", f"data.max_held_out={options.held_out}"]
    overrides += ["optimizer.warmup_steps=1", "train.checkpoint_every=2"]

    def run(place: Path, output: Path) -> Run:
        source = [f"model.source={place}/model", f"data.source={place}/data/{{language}}.jsonl"]
        return Run(config, output, 1, *source, *overrides)

    disk = folder / "disk"
    if not (disk / "results.json").exists():
        begun, [[code], [text]] = time.monotonic(), run(files, disk).wait()
        print(f"disk: exit code {code}, {time.monotonic() - begun:.0f} s", flush=True)
        if code:
            print(text[-3000:])
            return False
    with s3_server(options.server) as bucket:
        output = bucket / "run"
        parts = ["finished"]  # one that was begun is finished
        if not RunDirectory(output).steps():
            parts.insert(0, "stopped")
            for file in filter(Path.is_file, files.rglob("*")):
                (bucket / file.relative_to(files).as_posix()).write_bytes(file.read_bytes())
        for part in parts:
            begun, going = time.monotonic(), run(bucket, output)
            while part == "stopped" and not RunDirectory(output).steps():
                time.sleep(2)
                if going.processes[0][0].poll() is not None:
                    break
            if part == "stopped":
                going.processes[0][0].send_signal(signal.SIGTERM)
            [code], [text] = going.wait()
            lines = re.findall(r"(?:Stopped by SIGTERM|Resuming from).*", text)
            print(
                f"{part}: exit code {code}, {time.monotonic() - begun:.0f} s: {lines}", flush=True
            )
            if code != (143 if part == "stopped" else 0):
                print(text[-3000:])
                return False
        names = {one.relative_to(output).parts[0] for one in output.rglob("*") if one.is_file()}
        print(f"in the bucket: {', '.join(sorted(names))}")
        return same_results(output, disk)


# What is not the same in two equal runs.
TIMES = {"time", "step_seconds", "tokens_per_second", "seconds", "goodput"}


def same_results(output: Path, disk: Path) -> bool:
    """Tell, and say of what, whether all that two runs have made is equal, but for times."""
    found, expected = result(output), result(disk)
    found["metrics"], expected["metrics"] = (
        [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(one)]
        for one in (output, disk)
    )
    found["report"], expected["report"] = (
        {file.name for file in RunDirectory(one).report.iterdir()} for one in (output, disk)
    )
    for name in expected:
        print(f"{name}: {'equal' if found[name] == expected[name] else 'DIFFERENT'}")
    return found == expected


def write_inputs(config: Path, files: Path) -> None:
    """Write the model and the examples of the quick start as files of one directory."""
    settings = load_config(config)
    whole, files = files, files.with_suffix(".partial")
    shutil.rmtree(files, ignore_errors=True)
    for folder in ("model", "data"):
        (files / folder).mkdir(parents=True)
    for file in resolve_source(settings.model.source).iterdir():
        if file.is_file() and file.name != DIGESTS:
            shutil.copyfile(file, files / "model" / file.name)
    source = open_source(settings.data)
    for language in (*settings.data.seen, *settings.data.unseen):
        records = [json.dumps(values) for _, values in source.open(language) if values is not None]
        (files / "data" / f"{language}.jsonl").write_text("\n".join(records))
    files.rename(whole)


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=8, help="examples per language")
    parser.add_argument("--server", help="address of an S3 server, which keeps what it has")
    parser.add_argument("--folder", type=Path, help="keep everything there, and go on there")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        passed = quickstart(options, folder.absolute())
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
