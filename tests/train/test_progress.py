"""Progress of a run, on a terminal and in a log."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoo.train import progress as progress_module
from jaxmoo.train.progress import Progress


def row(step: int, **more) -> dict:
    return {"step": step, "loss": {"en": 2.5, "no": 3.25}, **more}


SHOWN = row(1, conflict_share=np.float32(0.31), tokens_per_second=2123.4)


def test_a_log_file_gets_a_plain_line_every_few_steps():
    log = io.StringIO()
    with Progress(25, every=10, file=log) as progress:
        for step in range(1, 26):
            progress.update({**SHOWN, "step": step})
        progress.message("Evaluated.")
    lines = log.getvalue().splitlines()
    assert [line.split()[2:4] for line in lines[:-1]] == [
        ["step", f"{step}/25"] for step in (1, 10, 20, 25)
    ]
    assert lines[-1].endswith("  Evaluated.")
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    for part in ("loss 2.875", "worst no 3.250", "conflict 31%", "2,123 tok/s", "en 2.50  no 3.25"):
        assert part in lines[0]
    assert "\r" not in log.getvalue()


def test_the_first_line_of_a_resumed_run_comes_at_once():
    log = io.StringIO()
    with Progress(100, start=41, every=50, file=log) as progress:
        progress.update({**SHOWN, "step": 42})
        progress.update({**SHOWN, "step": 43})
    assert [line.split()[3] for line in log.getvalue().splitlines()] == ["42/100"]


def test_a_loss_that_is_not_a_number_is_the_worst():
    log = io.StringIO()
    with Progress(1, file=log) as progress:
        progress.update({"step": 1, "loss": {"en": 1.0, "no": jnp.nan, "es": 9.0}})
    assert "worst no nan" in log.getvalue()


@pytest.fixture
def terminal():
    """A pseudo terminal 100 columns wide: (file, function that closes it and reads it all)."""
    import fcntl
    import struct
    import termios

    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    file = os.fdopen(writer, "w", encoding="utf-8")

    def read() -> str:
        file.close()
        data = b""
        # A pseudo terminal hands over what it holds in pieces, then an error (on Linux) or nothing.
        with contextlib.suppress(OSError):
            while piece := os.read(reader, 1 << 16):
                data += piece
        return data.decode()

    yield file, read
    os.close(reader)


def test_a_terminal_gets_a_bar_over_the_losses(terminal):
    file, read = terminal
    with Progress(20, start=10, file=file) as progress:
        progress.update({**SHOWN, "step": 20})
        progress.message("Evaluated.")
    text = read()
    assert "100% |" in text and "20/20" in text
    assert "loss 2.875  worst no 3.250  conflict 31%  2,123 tok/s" in text
    assert "en 2.50  no 3.25" in text and "Evaluated." in text


def test_many_languages_fit_one_line_of_a_terminal(terminal):
    file, read = terminal
    losses = {f"l{i:02}": i / 10 for i in range(64)}
    with Progress(1, file=file) as progress:
        progress.update({"step": 1, "loss": losses})
    lines = [line for line in read().replace("\x1b[A", "").replace("\r", "\n").split("\n") if line]
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("l63 6.30  l62 6.20") and line.endswith("...") for line in lines)


def test_the_time_left_is_that_of_steps_not_of_compilation(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    log = io.StringIO()
    progress = Progress(10, every=1, file=log)
    now[0] = 600.0  # of which the compiler took most
    progress.update({**SHOWN, "step": 1})
    for step in (2, 3):
        now[0] += 2.0
        progress.update({**SHOWN, "step": step})
    shown = re.findall(r"step (\d+)/10 \[(.*?)<(.*?)\]", log.getvalue())
    assert shown == [("1", "10:00", "?"), ("2", "10:02", "00:16"), ("3", "10:04", "00:14")]


def test_a_log_is_not_silent_during_a_long_step(monkeypatch):
    class Log(io.StringIO):
        def write(self, text):
            if "under way" in text:
                heard.set()
            return super().write(text)

    heard, log, doing = threading.Event(), Log(), [""]
    with Progress(10, quiet=0.01, doing=lambda: doing[0], file=log) as progress:
        assert heard.wait(30)
        progress.update({**SHOWN, "step": 1})
        doing[0] = "checkpoint"
        heard.clear()
        assert heard.wait(30)
    assert "step 0/10 [00:00<?]  the first step, compiled, under way for 00:00" in log.getvalue()
    assert "checkpoint, under way" in log.getvalue()
