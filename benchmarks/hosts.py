"""Host memory and time until a run's first batch is there, for one process and for several.

    python benchmarks/hosts.py --megabytes 1000
    python benchmarks/hosts.py --megabytes 64 --checkout ../before

Writes JSON Lines of generated text, as many megabytes as asked in eight languages, and starts
processes on this machine, each with one CPU device, that read, split and tokenise them and put the
first batch on their devices; no model is read. A case is started twice: the second time finds what
the first has kept. Prints Markdown: the wall time until all processes have their batch, the CPU
time of all, and the peaks of their resident memory above what each has before it begins, the
largest and the sum; all of them with the helpers that a process starts. Mapped files count as
resident as far as they were looked at, though processes share them and the system frees them when
memory is short. MB read are what a process itself has asked the system for (``rchar`` in
``/proc/self/io``): files, and what its helpers tell it. ``--checkout`` measures another checkout's
package, one that keeps nothing, perhaps; ``--json`` keeps the numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import Pages, environment, markdown

HERE = Path(__file__).resolve()
LANGUAGES = [f"l{number}" for number in range(8)]
LENGTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=64, help="JSON Lines in all (64)")
    parser.add_argument("--processes", default="1,8", help="cases, separated by commas (1,8)")
    parser.add_argument("--checkout", help="directory whose package is measured (this one)")
    parser.add_argument("--starts", type=int, default=2, help="of each case, one by one (2)")
    parser.add_argument("--json", help="file for the numbers")
    flags = parser.parse_args()
    packages = ["jax", "tokenizers", "transformers"]
    pages = Pages(flags.json, environment(os.cpu_count() or 1, packages))
    checkout = Path(flags.checkout or HERE.parents[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        records = write(Path(folder), flags.megabytes * 10**6)
        for count in map(int, flags.processes.split(",")):
            cache = Path(folder) / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            for start in range(1, flags.starts + 1):
                found = measure(count, Path(folder), cache, checkout)
                about = {"processes": count, "start": start, "records": records}
                pages.add(about | {"MB": flags.megabytes} | found)
    print(pages.markdown(table))


def table(rows: list[dict[str, Any]]) -> str:
    header = [name for name in rows[0] if name not in ("records", "MB")]
    shown = [
        [f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name]) for name in header]
        for row in rows
    ]
    about = f"{rows[0]['MB']:,} MB, {rows[0]['records']:,} records"
    return f"{about}\n\n{markdown([header, *shown])}"


def write(folder: Path, size: int) -> int:
    """Write the files and a tokenizer that knows their words; return the number of records."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    records, some = 0, []
    for language in LANGUAGES:
        rng = random.Random(language)
        letters = [chr(rng.randrange(0x61, 0x250)) for _ in range(40)]
        words = ["".join(rng.choices(letters, k=rng.randrange(2, 9))) for _ in range(2000)]
        some.append(" ".join(words))
        with (folder / f"{language}.jsonl").open("w", encoding="utf-8") as file:
            left = size // len(LANGUAGES)
            while left > 0:
                prompt, reply = (" ".join(rng.choices(words, k=k)) for k in (20, 400))
                line = json.dumps({"prompt": prompt, "completion": reply}, ensure_ascii=False)
                left -= len(line.encode()) + 1
                file.write(line + "\n")
                records += 1
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator(some, trainer)
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=special[1], pad_token=special[1], chat_template=template
    )
    tokenizer.save_pretrained(folder / "model")
    return records


def measure(count: int, folder: Path, cache: Path, checkout: Path) -> dict[str, Any]:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    variables = {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, HERE, "of", address, str(number), str(count), folder, cache],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
        )
        for number in range(count)
    ]
    found = []
    for process in running:
        out, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"A process has ended with exit code {process.returncode}.")
        found.append(json.loads(out.splitlines()[-1]))
    assert len({one["batch"] for one in found}) == 1
    return {
        "seconds": max(one["end"] for one in found) - min(one["begin"] for one in found),
        "CPU seconds": sum(one["cpu"] for one in found),
        "GB, most": max(one["peak"] for one in found) / 1e9,
        "GB, all": sum(one["peak"] for one in found) / 1e9,
        "MB read, most": round(max(one["read"] for one in found) / 1e6),
        "MB read, all": round(sum(one["read"] for one in found) / 1e6),
    }


def resident() -> int:
    """Bytes of memory of this process and those that it has started."""
    total = 0
    todo = [str(os.getpid())]
    while todo:
        number = todo.pop()
        try:
            status = Path(f"/proc/{number}/statm").read_text()
            for task in Path(f"/proc/{number}/task").iterdir():
                todo += (task / "children").read_text().split()
        except OSError:  # has ended meanwhile
            continue
        total += int(status.split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def read_so_far() -> int:
    """Bytes that this process has read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def one(address: str, number: str, count: str, folder: str, cache: str) -> None:
    """What one of the processes does."""
    import dataclasses

    import jax
    import numpy as np

    if int(count) > 1:
        jax.distributed.initialize(address, num_processes=int(count), process_id=int(number))
    from jax.experimental import multihost_utils

    from jaxmoo.config.data_section import DataConfig
    from jaxmoo.data import LanguageBatches, load_corpus
    from jaxmoo.hf import load_tokenizer
    from jaxmoo.mesh import batch_sharding, make_mesh
    from jaxmoo.runtime.processes import place

    tokenizer = load_tokenizer(Path(folder) / "model")
    settings: dict[str, Any] = {"max_held_out": 100, "sequence_length": LENGTH}
    if "cache" in {field.name for field in dataclasses.fields(DataConfig)}:
        settings["cache"] = cache
    data = DataConfig(source=f"{folder}/{{language}}.jsonl", seen=LANGUAGES, **settings)
    mesh = make_mesh(len(LANGUAGES), language=int(count))
    multihost_utils.sync_global_devices("all have imported what they need")
    before = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, resident())

    watching = threading.Thread(target=watch)
    watching.start()
    begin, cpu, read = time.time(), os.times(), read_so_far()
    corpus = load_corpus(data, tokenizer, say=lambda line: print(line, file=sys.stderr))
    batches = LanguageBatches(corpus.train, LANGUAGES, 8, LENGTH, 0)
    rows: tuple[Any, ...] = ()
    if "cache" in settings:
        from jaxmoo.mesh import local_rows

        rows = (local_rows(mesh, len(LANGUAGES), 8),)
    jax.block_until_ready(place(batches.batch(0, *rows), batch_sharding(mesh)))
    end, spent, read = time.time(), os.times(), read_so_far() - read
    done.set()
    watching.join()
    digest = hashlib.sha256()
    for _, array in sorted(batches.batch(0).items()):
        digest.update(np.ascontiguousarray(array).data)
    used = [a - b for a, b in zip(spent[:4], cpu[:4], strict=True)]
    found = {"begin": begin, "end": end, "cpu": sum(used), "peak": peak - before, "read": read}
    print(json.dumps(found | {"batch": digest.hexdigest()}), flush=True)
    multihost_utils.sync_global_devices("all are done")


if __name__ == "__main__":
    one(*sys.argv[2:]) if sys.argv[1:2] == ["of"] else main()
