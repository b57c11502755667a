"""Progress of anything else than steps, and tables on narrow terminals."""

from __future__ import annotations

import io
import threading

from jaxmoo.data.table import text_table
from jaxmoo.runtime.watching import watched


def test_a_log_gets_lines_as_time_passes_and_no_bar():
    class Log(io.StringIO):
        def write(self, text):
            if "3 of 9" in text:
                heard.set()
            return super().write(text)

    heard, log = threading.Event(), Log()
    with watched(9, "evaluating", unit="row", file=log, every=0.01) as advance:
        advance(1)
        advance(2)
        assert heard.wait(30)
    lines = [line for line in log.getvalue().splitlines() if "3 of" in line]
    assert "  evaluating: 3 of 9 rows [00:00<" in lines[0] and "\r" not in log.getvalue()
    quiet = io.StringIO()
    with watched(9, "evaluating", file=quiet) as advance:
        advance(9)
    with watched(9, "evaluating", file=quiet, shown=False, every=0.0) as advance:
        advance(9)
    assert quiet.getvalue() == ""


def test_a_narrow_terminal_gets_narrow_tables():
    header = ["language", *(f"column {n}" for n in range(6))]
    rows = [[code, *range(6)] for code in ("en", "fr")]
    assert max(map(len, text_table(header, rows).splitlines())) > 60
    lines = text_table(header, rows, width=40).splitlines()
    assert max(map(len, lines)) <= 40
    assert [line.split()[1] for line in lines if line.startswith("| ")] == [
        *("language", "en", "fr"),
    ] * 3
    assert all(name in "\n".join(lines) for name in header)
