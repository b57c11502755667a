"""Let an S3 server fail while a run's model, data and output are on it, and see what comes of it.

    python benchmarks/bucket_faults.py [--rate 0.1] [--only NAME ...]

The run is that of ``benchmarks/reliability.py``, on a server (moto) on the loopback, behind a proxy
that spoils requests: a share of them all, chosen at random, or those that write checkpoints. What
passes must leave weights, scores and losses as they are without; what does not pass must end the
run with an error that names the matter, and the same command must finish it, to the same result,
when the matter is settled. No credentials may be in what is printed or stored.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from moto.server import ThreadedMotoServer
from reliability import make_config, make_model, result

from bucket_servers import SECRET, FaultyProxy, everything, s3_environment, upload
from jaxmoo.commands.train import main as train
from jaxmoo.files.buckets import _filesystem
from jaxmoo.files.outputs import typed_path


class Fault(NamedTuple):
    """What happens to requests, and how the run is to end.

    Attributes:
      spoil: says what happens to a request; see `FaultyProxy`.
      code: the run's exit code.
      environment: variables that are set meanwhile; None removes one.
      overrides: settings that are changed.
    """

    spoil: Callable[[str], str | None] = lambda _: None
    code: int = 0
    environment: Mapping[str, str | None] = MappingProxyType({})
    overrides: tuple[str, ...] = ()


def at_random(fault: str, rate: float) -> Callable[[str], str | None]:
    chance = random.Random(0)
    return lambda _: fault if chance.random() < rate else None


def denied(asked: str) -> str | None:
    """Nothing can be written to the checkpoints of a step but the first."""
    return "denied" if asked.startswith("PUT") and "/checkpoints/4/" in asked else None


def faults(rate: float) -> dict[str, Fault]:
    share = f"in {rate:.0%} of requests"
    nobody = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
    nobody |= {"AWS_CONFIG_FILE": "/nowhere", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere"}
    return {
        f"throttling (503 SlowDown) {share}": Fault(at_random("slow", rate)),
        f"500 InternalError {share}": Fault(at_random("error", rate)),
        f"connection cut in the middle of the reply {share}": Fault(at_random("cut", rate)),
        f"connection ended without a reply {share}": Fault(at_random("gone", rate)),
        "writing the second checkpoint is denied (403)": Fault(denied, code=1),
        "the bucket does not exist": Fault(code=2, overrides=("output=s3://no-such-bucket/run",)),
        "no credentials": Fault(code=2, environment=nobody),
    }


@contextlib.contextmanager
def environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({name: value for name, value in changes.items() if value is not None})
    for name in (name for name, value in changes.items() if value is None):
        os.environ.pop(name, None)
    _filesystem.cache_clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        _filesystem.cache_clear()


def run(config: Path, *overrides: str) -> tuple[int, str]:
    """Run the command in this process; return its exit code and all that it has printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = train(["--config", str(config), *overrides])
    return code, said.getvalue()


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rate", type=float, default=0.1, help="share of spoiled requests")
    parser.add_argument("--only", nargs="+", help="faults whose names begin so")
    options = parser.parse_args()
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    proxy = FaultyProxy(f"http://{host}:{port}")
    passed = True
    with tempfile.TemporaryDirectory() as name, environment(s3_environment(proxy.address)):
        folder = Path(name)
        os.environ["JAXMOO_SCRATCH"] = str(folder / "scratch")
        make_model(folder / "model")
        config = make_config(folder, 4, checkpoint_every=2, evaluate_every=2)
        run(config, "data.seen=[es,de]")
        expected = result(folder / "run")
        _filesystem("s3").mkdir("faults")
        bucket = typed_path("s3://faults")
        upload(folder / "model", bucket / "model")
        print("| fault | exit code | what is said | requests, spoiled | the same command later |")
        print("|---|---:|---|---:|---|")
        for number, (what, fault) in enumerate(faults(options.rate).items()):
            if options.only and not what.startswith(tuple(options.only)):
                continue
            output = bucket / f"run-{number}"
            settings = [f"model.source={bucket / 'model'}", f"output={output}", "data.seen=[es,de]"]
            spoiled: list[str] = []

            def spoil(asked: str, fault: Fault = fault, spoiled: list[str] = spoiled) -> str | None:
                found = fault.spoil(asked)
                spoiled.extend([asked] if found else [])
                return found

            proxy.seen.clear()
            proxy.spoil = spoil
            with environment(fault.environment):
                code, said = run(config, *settings, *fault.overrides)
            requests = len(proxy.seen)
            proxy.spoil = lambda _: None
            later, again = run(config, *settings)
            equal = later == 0 and result(output) == expected
            leaked = SECRET in said + again or SECRET.encode() in everything(output)
            passed &= code == fault.code and equal and not leaked
            lines = [line for line in said.splitlines() if line.startswith("error")]
            print(
                f"| {what} | {code} | {lines[0] if lines else ''} | {requests}, {len(spoiled)} | "
                f"{'equal' if equal else f'NOT EQUAL ({later}) {again[-500:]}'}"
                f"{', CREDENTIALS SHOWN' if leaked else ''} |",
                flush=True,
            )
    server.stop()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
