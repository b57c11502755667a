"""A page as Chromium sees it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

_CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
# Appended to a copy of the page: what became of every image and what was asked for, once all of it
# has loaded or failed to. Images inside of a page are not asked for.
_PROBE = """<script>
addEventListener("load", () => {
  document.body.dataset.images = JSON.stringify(
    [...document.images].map(x => [x.alt, x.naturalWidth, x.naturalHeight]));
  document.body.dataset.requests = JSON.stringify(
    performance.getEntriesByType("resource").map(x => x.name));
  console.log("probe ran");
});
</script>
"""


class Seen(NamedTuple):
    """What the browser made of a page."""

    images: list[tuple[str, int, int]]  # alternative text, width, height
    console: list[str]  # messages, errors among them
    requests: list[str]  # addresses that the page asked for


def chromium() -> str | None:
    """The browser's path, or None where none is installed."""
    return next((path for name in _CHROMIUMS if (path := shutil.which(name))), None)


# In CI nothing is left out: there they fail without a browser.
needs_chromium = pytest.mark.skipif(
    chromium() is None and not os.environ.get("CI"), reason="no Chromium is installed"
)


def look_at(page: Path, scratch: Path) -> Seen:
    """Open a page in headless Chromium."""
    browser = chromium()
    if browser is None:
        raise FileNotFoundError(f"no Chromium is installed: none of {', '.join(_CHROMIUMS)}")
    copy = scratch / "page.html"
    copy.write_text(page.read_text("utf-8") + _PROBE, "utf-8")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking", "--no-first-run", "--disable-extensions",
            f"--user-data-dir={scratch / 'profile'}", "--enable-logging=stderr", "--v=0",
            "--dump-dom", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = re.findall(r'CONSOLE[^"]*"(.*)", source', done.stderr)
    assert "probe ran" in console, done.stderr[-2000:]
    return Seen(
        [tuple(x) for x in _dataset(done.stdout, "images")],
        [text for text in console if text != "probe ran"],
        _dataset(done.stdout, "requests"),
    )


def _dataset(dom: str, name: str) -> list:
    return json.loads(html.unescape(re.search(rf'data-{name}="([^"]*)"', dom)[1]))
