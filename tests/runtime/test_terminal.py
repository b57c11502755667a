"""What a command prints never decides how it ends."""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys

import pytest

from devices import ROOT
from jaxmoo.runtime.terminal import forgiving_output

COMMANDS = (
    "jaxmoo.commands.analyze",
    "jaxmoo.commands.convert",
    "jaxmoo.commands.evaluate",
    "jaxmoo.commands.study",
    "jaxmoo.commands.train",
    "jaxmoo.commands.data",
    "jaxmoo.commands.plan",
    "jaxmoo.commands.methods",
    "jaxmoo.commands.configs",
    "jaxmoo.commands.main",
)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_forgiving(name):
    assert hasattr(importlib.import_module(name).main, "__wrapped__")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_an_encoding_lacks_is_spelt(monkeypatch, encoding):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding, newline="\n"))

    @forgiving_output
    def command():
        print("2.0 → 1.5 ± 0.1")
        print("ja 日本 \udc80")
        return 3

    assert command() == 3
    lines = shown.getvalue().decode(encoding).splitlines()
    arrow, sign = "→" if encoding == "utf-8" else "->", "+-" if encoding == "ascii" else "±"
    # A line is spelt as a whole.
    assert lines[0] in (f"2.0 {arrow} 1.5 {sign} 0.1", "2.0 -> 1.5 +- 0.1")
    assert lines[1] in (r"ja \u65e5\u672c \udc80", r"ja 日本 \udc80")


TERMINAL = ROOT / "jaxmoo" / "runtime" / "terminal.py"
# Much is printed, on both streams, so that more than one buffer is; then a file is written, whose
# number could have been that of a stream.
COMMAND = """
import runpy, sys
terminal = runpy.run_path(sys.argv[1])  # alone: nothing else of the package is needed

@terminal["forgiving_output"]
def command():
    with open(sys.argv[2], "w") as file:
        for stream in (sys.stdout, sys.stderr):
            for _ in range(2000):
                print("a line of some length for people to read", file=stream)
            stream.flush()
            stream.isatty()
        file.write("done")
    return 7

sys.exit(command())
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
@pytest.mark.parametrize(
    "redirection", [">/dev/full", ">&- 2>&-", ">/dev/full 2>&1", "2>&- | true", "2>&1 | head -1"]
)
def test_a_full_closed_or_broken_output_does_not_end_a_command(tmp_path, redirection):
    file = tmp_path / "file"
    line = f'"$0" -c "$1" "$2" "$3" {redirection}; echo ${{PIPESTATUS[0]}} >&9'
    done = subprocess.run(
        ["bash", "-c", f"exec 9>&1; {line}", sys.executable, COMMAND, TERMINAL, file],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "7", done.stderr
    assert file.read_text() == "done"
    assert "Exception ignored" not in done.stderr
