"""Kill runs at random moments and see that they lose nothing; watch a long one's memory.

    python benchmarks/reliability.py kill --trials 20 --processes 2
    python benchmarks/reliability.py kill --trials 20 --bucket --signals SIGKILL
    python benchmarks/reliability.py soak --steps 2000
    python benchmarks/reliability.py processes

A real run: ``scripts/train.py`` on a Llama of two layers with random weights, the tokenizer of
SmolLM2 and the built-in corpus, with evaluations, checkpoints and the export. ``kill`` makes an
unbroken run first. A trial starts the same run, sends SIGKILL or SIGTERM (in turn) to one of its
processes at a random moment between start and end (of CPU time), waits for all of them to be gone,
and runs the command again. It counts as passed when the exit codes are those documented, the run
goes on from a checkpoint that was complete, and weights, held-out scores and losses equal the
unbroken run's bit for bit. ``processes`` trains the very model and languages of the quick start for
a few steps, in two processes of one device and in one process of two, and compares. The exit code
is 1 when something fails.

With ``--bucket`` the runs' output is in a bucket of an S3 server (moto) on the loopback, and every
process has a scratch directory of its own.

With ``--folder`` everything is kept there, and the trials that it holds are not made again: a long
series can be made in parts.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from flax import nnx
from safetensors.numpy import load_file

from jaxmoo.files.digests import DIGESTS
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf import resolve_source, save_model
from jaxmoo.hf.directory import remove_directory
from jaxmoo.models import Decoder, DecoderConfig
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
HEARTBEAT, CONNECT, LONGEST = 20, 120, 3600  # seconds


def make_model(path: Path) -> None:
    """Write a Hugging Face directory of a tiny model with random weights."""
    source = resolve_source("smollm2-135m-instruct")
    path.mkdir(parents=True)
    for file in source.iterdir():
        wanted = file.suffix in (".json", ".jinja") and "safetensors" not in file.name
        if wanted and file.name != DIGESTS:
            shutil.copyfile(file, path / file.name)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = json.loads((path / "config.json").read_text()) | sizes
    (path / "config.json").write_text(json.dumps(config))
    model = Decoder(DecoderConfig.from_hf(config), rngs=nnx.Rngs(0))
    save_model(model, path / "weights", source=path, dtype="float32")
    (path / "weights" / "model.safetensors").rename(path / "model.safetensors")
    shutil.rmtree(path / "weights")


def make_config(folder: Path, steps: int, **train: int) -> Path:
    """Write the settings of the run."""
    config = {
        "output": str(folder / "run"),
        "report": False,
        "tensorboard": False,
        "model": {"source": str(folder / "model"), "trainable": r"^layers\."},
        "data": {
            "source": "chatterbot",
            "seen": ["es", "de", "fr", "id"],
            "batch_size": 1,
            "sequence_length": 64,
            "max_held_out": 4,
        },
        "resolve": {"aggregator": "pcgrad"},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
        "train": {"steps": steps, "hang_timeout": 120.0, **train},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Run:
    """A run in one or several processes."""

    def __init__(
        self, config: Path, output: Path, processes: int, *overrides: str, devices: int = 1
    ) -> None:
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            port = listener.getsockname()[1]
        command = [sys.executable, "scripts/train.py", "--config", config, f"output={output}"]
        command += overrides
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            # Compiled once, read by all the others (not by several processes on CPUs).
            "JAX_COMPILATION_CACHE_DIR": str(config.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.processes = []
        for number in range(processes):
            if processes > 1:
                flags = [f"--coordinator-address=localhost:{port}", f"--num-processes={processes}"]
                flags += [f"--process-id={number}", f"--heartbeat-timeout={HEARTBEAT}"]
                flags.append(f"--connect-timeout={CONNECT}")
                arguments = [*command, *flags]
            else:
                arguments = command
            log = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- read when the process has ended
            process = subprocess.Popen(
                list(map(str, arguments)),
                cwd=ROOT,
                # As on hosts that share no disk.
                env=environment | {"JAXMOO_SCRATCH": str(config.parent / f"scratch-{number}")},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            self.processes.append((process, log))

    def wait_until(self, seconds: float) -> float:
        """Wait until the first process has used so much CPU time, or ended; return what it had.

        Other than the time of day, it does not depend on what else the machine is doing.
        """
        process, used = self.processes[0][0], 0.0
        while used < seconds and process.poll() is None:
            time.sleep(0.01)
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") or used
        return used

    def wait(self) -> tuple[list[int], list[str]]:
        """Wait until all have ended; return their exit codes and what they have printed."""
        codes, texts = [], []
        for process, log in self.processes:
            codes.append(process.wait(timeout=LONGEST))
            log.seek(0)
            texts.append(log.read())
        return codes, texts


def result(output: Path) -> dict[str, Any]:
    """Everything that two equal runs have in common."""
    run = RunDirectory(output)
    return {
        "weights": hashlib.sha256((run.export / "model.safetensors").read_bytes()).hexdigest(),
        "scores": [file.read_text() for file in sorted(run.evaluation.iterdir())],
        "losses": [
            [row["step"], row.get("loss"), row.get("held_out")] for row in read_metrics(run.path)
        ],
    }


class Trial(NamedTuple):
    """What happened in one."""

    signal: str
    after: float
    codes: list[int]
    reached: int
    resumed: int | None
    problems: list[str]


def trial(
    config: Path,
    output: Path,
    processes: int,
    number: int,
    longest: float,
    expected: dict,
    signals: Sequence[signal.Signals],
    kills: int,
) -> Trial:
    """Kill a run, finish it, and compare."""
    chance = random.Random(number)
    sent = signals[number % len(signals)]
    for _ in range(kills):  # each of what the one before has left
        after = chance.uniform(0, longest)
        run = Run(config, output, processes)
        victim = chance.choice(run.processes)[0]
        run.wait_until(after)
        victim.send_signal(sent)
        codes, texts = run.wait()
    problems = []
    directory = RunDirectory(output)
    complete = directory.steps()
    stopped = re.search(r"Stopped by SIGTERM after step (\d+) of", texts[0])
    if sent == signal.SIGTERM:
        # It may arrive before Python can handle it, or when everything is done.
        if set(codes) not in ({128 + sent}, {0}) and -sent not in codes:
            problems.append(f"exit codes {codes}")
        if stopped and int(stopped[1]) and int(stopped[1]) not in complete:
            problems.append(f"stopped after step {stopped[1]}, which is not saved")
    rows = directory.metrics.exists() and read_metrics(directory.metrics)
    reached = rows[-1]["step"] if rows else 0
    finished = (output / "results.json").exists()
    one_is_done = processes > 1 and any(code == 0 for code in codes) and len(set(codes)) > 1
    if sent != signal.SIGTERM and one_is_done and not finished:
        problems.append(f"exit codes {codes}: one process thinks that it is done")

    codes_after, texts_after = Run(config, output, processes).wait()
    found = re.search(r"Resuming from the checkpoint of step (\d+)", texts_after[0])
    resumed = int(found[1]) if found else None
    if set(codes_after) != {0}:
        problems.append(f"resumed: exit codes {codes_after}\n{texts_after[0][-2000:]}")
    elif not finished and resumed != (complete[-1] if complete else None):
        problems.append(f"resumed from {resumed}, complete were {complete}")
    else:
        found_result = result(output)
        problems += [f"{name} differ" for name in expected if found_result[name] != expected[name]]
    remove_directory(output)
    return Trial(sent.name, after, codes, reached, resumed, problems)


@contextlib.contextmanager
def s3_server(given: str | None = None) -> Iterator[Path]:
    """Yield a bucket of an S3 server, of one that is given or one of our own on the loopback."""
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    with moto_server() if given is None else contextlib.nullcontext(given) as address:
        os.environ["AWS_ENDPOINT_URL"] = address
        urllib.request.urlopen(urllib.request.Request(f"{address}/reliability", method="PUT"))
        yield typed_path("s3://reliability")


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """Start an S3 server on the loopback, in a process of its own; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(address):
                break
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def kill(options: argparse.Namespace, folder: Path) -> bool:
    """Run the trials; tell whether all have passed."""
    with s3_server() if options.bucket else contextlib.nullcontext(folder) as place:
        return _kill(options, folder, place)


def _kill(options: argparse.Namespace, folder: Path, place: Path) -> bool:
    # Several processes compile every time, and the machine code runs for seconds.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    signals = [signal.Signals[name] for name in options.signals]
    config = make_config(folder, options.steps, checkpoint_every=5, evaluate_every=10)
    record = folder / f"kill-{options.processes}{'-bucket' if options.bucket else ''}.json"
    if not record.exists():
        longest, expected = unbroken(options, folder, place, config)
        record.write_text(json.dumps({"longest": longest, "expected": expected, "trials": {}}))
    kept = json.loads(record.read_text())
    expected, trials = kept["expected"], kept["trials"]
    for number in range(options.seed, options.seed + options.trials):
        if str(number) not in trials:
            done = trial(
                config,
                place / f"trial-{number}",
                options.processes,
                number,
                kept["longest"],
                expected,
                signals,
                options.kills,
            )
            trials[str(number)] = done._asdict()
            record.write_text(json.dumps(kept))
            print(f"trial {number}: {'; '.join(done.problems) or 'equal'}", flush=True)
    print(
        f"unbroken: {options.steps} steps, {options.processes} process(es), "
        f"{kept['longest']:.1f} s of CPU"
    )
    print("| trial | signal | after CPU s | exit codes | last step seen | resumed from | result |")
    print("|---|---|---|---|---|---|---|")
    for number, fields in trials.items():
        done = Trial(**fields)
        print(
            f"| {number} | {done.signal} | {done.after:.1f} | "
            f"{', '.join(map(str, done.codes))} | {done.reached} | "
            f"{'the beginning' if done.resumed is None else done.resumed} | "
            f"{'; '.join(done.problems) or 'equal'} |"
        )
    failed = sum(bool(fields["problems"]) for fields in trials.values())
    print(f"{len(trials) - failed} of {len(trials)} trials passed")
    return not failed


def unbroken(
    options: argparse.Namespace, folder: Path, place: Path, config: Path
) -> tuple[float, dict]:
    """Make the run that all others are compared with; return its CPU time and result.

    Where the trials' output is in a bucket, its own is on the disk: these are compared as well.
    """
    longest = 0.0
    # Once to compile, once to measure how long it takes when nothing is compiled.
    outputs = [
        place / f"first-{options.processes}",
        folder / f"unbroken-{options.processes}",
    ]
    if options.bucket:  # the time is that of a run in a bucket
        outputs.reverse()
    for output in outputs:
        run = Run(config, output, options.processes)
        longest = run.wait_until(math.inf)
        codes, texts = run.wait()
        if set(codes) != {0}:
            raise SystemExit(f"The unbroken run failed: {codes}\n{texts[0]}")
    if result(outputs[0]) != result(outputs[1]):
        raise SystemExit("Two unbroken runs differ.")
    return longest, result(outputs[0])


def soak(options: argparse.Namespace, folder: Path) -> bool:
    """Train for long, with a restart in the middle; tell whether memory stayed flat."""
    every = max(options.steps // 20, 1)
    config = make_config(folder, options.steps, checkpoint_every=every, evaluate_every=2 * every)
    output, flat = folder / "run", True
    print(
        "| part | exit code | s | steps | first 10 % | third quarter | last quarter | change "
        "| slope in the second half per 1,000 steps |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for part, stop_at in enumerate((options.steps // 2, None), start=1):
        begun, run = time.monotonic(), Run(config, output, 1)
        process = run.processes[0][0]
        samples: list[tuple[int, float]] = []
        while process.poll() is None:
            time.sleep(0.2)
            step = last_step(RunDirectory(output).metrics)
            if step and (not samples or step > samples[-1][0]):
                samples.append((step, resident(process.pid)))
            if stop_at and step >= stop_at:
                process.send_signal(signal.SIGTERM)
                stop_at = None
        [code], [text] = run.wait()
        if code != (0 if part == 2 else 128 + signal.SIGTERM):
            print(text[-3000:])
            return False
        first, last = samples[0][0], samples[-1][0]

        def resident_in(begin: float, end: float) -> np.ndarray:
            """Samples of a part of the steps: [n, 2], step and MiB."""
            edges = [first + (last - first) * edge for edge in (begin, end)]
            return np.array([x for x in samples if edges[0] <= x[0] <= edges[1]])

        # Allocators and compilers fill their pools in the first half. A single sample says little:
        # memory goes up and down with every checkpoint.
        early, third, fourth = (
            resident_in(*edges)[:, 1].mean() for edges in ((0, 0.1), (0.5, 0.75), (0.75, 1))
        )
        flat &= fourth < 1.05 * third
        (slope, _), covariance = np.polyfit(*resident_in(0.5, 1).T, 1, cov=True)
        print(
            f"| {part} | {code} | {time.monotonic() - begun:.0f} | {first} to {last} | "
            f"{early:,.0f} MiB | {third:,.0f} MiB | {fourth:,.0f} MiB | "
            f"{fourth / third - 1:+.1%} | "
            f"{1000 * slope:+.1f} ± {1000 * covariance[0, 0] ** 0.5:.1f} MiB |",
            flush=True,
        )
    steps = [row["step"] for row in read_metrics(output) if "loss" in row]
    complete = steps == list(range(1, options.steps + 1))
    print(f"rows of metrics: {len(steps)}, each step once: {complete}")
    return flat and complete


def processes(options: argparse.Namespace, folder: Path) -> bool:
    """Compare the quick start in two processes with one process; tell whether they agree."""
    config = quickstart_config(folder)
    overrides = [f"train.steps={options.steps}", "optimizer.warmup_steps=1", "report=false"]
    overrides += ["tensorboard=false", f"data.max_held_out={options.held_out}"]
    outputs = {2: folder / "two", 1: folder / "one"}
    for number, output in outputs.items():
        if not (output / "results.json").exists():
            begun = time.monotonic()
            codes, texts = Run(config, output, number, *overrides, devices=3 - number).wait()
            if set(codes) != {0}:
                print(texts[0][-3000:])
                return False
            told = re.search(r".*device\(s\).*", texts[0])
            print(f"{number} process(es), {time.monotonic() - begun:.0f} s: {told and told[0]}")
    two, one = (load_file(outputs[n] / "export" / "model.safetensors") for n in (2, 1))
    largest = max(
        np.abs(two[name].astype(np.float64) - one[name]).max() / np.abs(one[name]).max()
        for name in one
    )
    equal = sum(np.array_equal(two[name], one[name]) for name in one)
    moved = load_file(resolve_source("smollm2-135m-instruct") / "model.safetensors")
    trained = sum(not np.array_equal(one[name], moved[name].astype(np.float32)) for name in one)
    print(f"arrays: {len(one)}, of them trained {trained}, equal in every bit {equal}")
    print(f"weights: largest difference {largest:.1e} of an array's largest entry")
    rows = [[row for row in read_metrics(outputs[n]) if "loss" in row] for n in (2, 1)]
    worst = 0.0
    for a, b in zip(*rows, strict=True):
        assert a["step"] == b["step"] and a["language_tokens"] == b["language_tokens"]
        for name in ("loss", "language_norm", "weights"):
            largest_value = max(map(abs, b[name].values()))
            differences = [abs(a[name][code] - b[name][code]) for code in b[name]]
            worst = max(worst, max(differences) / largest_value)
    print(
        f"metrics of {len(rows[0])} steps and {len(rows[0][0]['loss'])} languages: tokens equal; "
        f"losses, gradient norms and weights differ by at most {worst:.1e} of the largest"
    )
    scores = [
        json.loads(file.read_text())
        for n in (2, 1)
        for file in sorted(RunDirectory(outputs[n]).evaluation.iterdir())
    ]
    half = len(scores) // 2
    nll = max(
        abs(a[code]["nll"] / b[code]["nll"] - 1)
        for a, b in zip(scores[:half], scores[half:], strict=True)
        for code in b
    )
    print(f"held-out scores: differ by at most {nll:.1e} of their value")
    return max(largest, worst, nll) < 1e-4 and trained > 0


def quickstart_config(folder: Path) -> Path:
    """A copy of the quick start's settings, beside which runs keep what they compile."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(ROOT / "configs" / "quickstart.yaml", folder))


def last_step(metrics: Path) -> int:
    """The step of the last complete row of a file that is being written; 0 without any."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 20_000))
        found = re.findall(rb'^{"step": (\d+),.*\n', file.read(), re.MULTILINE)
    return int(found[-1]) if found else 0


def resident(pid: int) -> float:
    """Memory of a process in MiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int((re.search(r"VmRSS:\s+(\d+) kB", text) or [0, 0])[1]) / 2**10


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    killing = commands.add_parser("kill", help="kill runs at random moments, resume, compare")
    killing.add_argument("--trials", type=int, default=20)
    killing.add_argument("--processes", type=int, default=1)
    killing.add_argument("--steps", type=int, default=40)
    killing.add_argument("--seed", type=int, default=0, help="of the moments")
    killing.add_argument("--signals", nargs="+", default=["SIGKILL", "SIGTERM"], help="in turn")
    killing.add_argument("--kills", type=int, default=1, help="of a run before it may end")
    killing.add_argument("--bucket", action="store_true", help="output on an S3 server")
    soaking = commands.add_parser("soak", help="watch the memory of a long run")
    soaking.add_argument("--steps", type=int, default=2000)
    comparing = commands.add_parser("processes", help="two processes beside one, the real model")
    comparing.add_argument("--steps", type=int, default=3)
    comparing.add_argument("--held-out", type=int, default=8, help="examples per language")
    for command in (killing, soaking, comparing):
        command.add_argument("--folder", type=Path, help="keep everything there, and go on there")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = folder.absolute()
        if options.command in ("kill", "soak") and not (folder / "model").exists():
            make_model(folder / "model")
        known = {"kill": kill, "soak": soak, "processes": processes}
        passed = known[options.command](options, folder)
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
