"""Fetching wheels, from a folder and from a package index on this machine."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jaxmoo.errors import DownloadError
from jaxmoo.hf import fetch_wheel
from jaxmoo.hf.cache import cache_directory

NAME = "some_package-1.0-py3-none-any.whl"


def _wheel() -> bytes:
    """The least that pip takes for a wheel."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        folder = "some_package-1.0.dist-info"
        archive.writestr(
            f"{folder}/METADATA", "Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n"
        )
        archive.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{folder}/RECORD", "")
        archive.writestr("some_package/data.bin", os.urandom(10_000))
    return content.getvalue()


CONTENT = _wheel()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def links(tmp_path, monkeypatch):
    """A folder that pip looks for files in; there is no index."""
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / NAME).write_bytes(CONTENT)
    only(monkeypatch, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(folder))
    return folder


def only(monkeypatch, **settings: str) -> None:
    """Leave no settings of pip and uv but these."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0", **settings}.items():
        monkeypatch.setenv(name, value)


def fetch(cache: Path) -> Path:
    return fetch_wheel("Some.Package", "1.0", SHA256, cache_dir=cache)


def left(cache: Path) -> set[str]:
    return {file.name for file in (cache / "wheels").iterdir() if file.suffix != ".lock"}


def test_the_wheel_is_fetched_once_whatever_pip_warns_of(links, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", f"{links} {tmp_path / 'nowhere'}")
    file = fetch(tmp_path)
    assert file.name == NAME and file.read_bytes() == CONTENT
    assert capfd.readouterr() == ("", "Downloading Some.Package 1.0 ...\n")
    assert left(tmp_path) == {NAME}
    (links / NAME).unlink()
    assert fetch(tmp_path) == file
    assert capfd.readouterr() == ("", "")


def test_an_index_is_asked_as_pip_is_told_to_and_a_terminal_shows_what_pip_does(
    tmp_path, monkeypatch, capfd
):
    asked = []

    class Index(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            asked.append(self.path)
            page = f'<a href="/files/{NAME}#sha256={SHA256}">{NAME}</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if "simple" in self.path else "binary")
            self.end_headers()
            self.wfile.write(page if "simple" in self.path else CONTENT)

    with ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        only(monkeypatch, PIP_INDEX_URL=f"http://127.0.0.1:{server.server_port}/simple")
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.setattr(sys.stderr, "fileno", lambda: 2)
        assert fetch(tmp_path).read_bytes() == CONTENT
        server.shutdown()
    assert asked == ["/simple/some-package/", f"/files/{NAME}"]
    assert "Saved" in capfd.readouterr().err


def test_a_file_with_another_checksum_is_never_kept(links, tmp_path):
    (links / NAME).write_bytes(CONTENT + b"x")
    with pytest.raises(DownloadError, match=rf"Expected sha256 {SHA256}\s+Got "):
        fetch(tmp_path)
    assert left(tmp_path) == set()


def test_a_damaged_file_in_the_cache_is_reported_not_used(tmp_path):
    file = cache_directory(tmp_path, "wheels") / NAME
    file.write_bytes(CONTENT[:1000])
    with pytest.raises(DownloadError, match=r"\(1000 bytes\) has sha256 .* truncated") as error:
        fetch(tmp_path)
    assert str(file) in str(error.value)


def test_offline_the_message_says_what_to_put_where(tmp_path, monkeypatch):
    only(monkeypatch, PIP_INDEX_URL="http://user:secret@127.0.0.1:9/simple", PIP_RETRIES="1")
    with pytest.raises(DownloadError) as error:
        fetch(tmp_path)
    message = str(error.value)
    assert "Some.Package 1.0 could not be fetched" in message and "refused" in message
    assert "secret" not in message
    assert "pip download --no-deps Some.Package==1.0" in message
    assert str(tmp_path / "wheels") in message
    # Doing as the message says is enough.
    (tmp_path / "wheels" / NAME).write_bytes(CONTENT)
    assert fetch(tmp_path).name == NAME


def test_without_pip_uv_runs_one_on_its_own_index(links, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(DownloadError, match="neither pip nor uv"):
        fetch(tmp_path)
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    # What uv does with `uv tool run --python PYTHON pip ...`, and a note of the index.
    uv.write_text(
        f'#!/bin/sh\necho "$1 $2 $3 $5 $PIP_INDEX_URL" > {tmp_path}/ran\nshift 4\n'
        f'exec {sys.executable} -m "$@"\n'
    )
    uv.chmod(uv.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    assert fetch(tmp_path).read_bytes() == CONTENT
    ran = (tmp_path / "ran").read_text()
    assert ran == "tool run --python pip http://127.0.0.1:9/simple\n"


def test_of_two_that_ask_at_the_same_time_one_downloads(links, tmp_path, capfd):
    # The lock is the system's: it keeps threads apart as it does processes.
    with ThreadPoolExecutor(2) as pool:
        found = set(pool.map(fetch, [tmp_path, tmp_path]))
    assert found == {tmp_path / "wheels" / NAME}
    assert capfd.readouterr().err.count("Downloading") == 1


def test_an_unusable_cache_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="JAXMOO_CACHE"):
        fetch_wheel("some-package", "1.0", SHA256, cache_dir=tmp_path / "file")


def test_the_cache_is_chosen_by_argument_then_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXMOO_CACHE", str(tmp_path / "by_environment"))
    assert cache_directory(None, "wheels") == tmp_path / "by_environment" / "wheels"
    assert cache_directory(tmp_path / "given", "wheels") == tmp_path / "given" / "wheels"
