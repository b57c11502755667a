"""Fetching wheels, against a package index on this machine that can be made to misbehave."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jaxmoo.errors import DownloadError
from jaxmoo.hf import fetch_wheel
from jaxmoo.hf.cache import cache_directory

NAME = "some_package-1.0-py3-none-any.whl"
CONTENT = os.urandom(3_000_000)
PIECE = 1 << 16  # what is written to disk at a time
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Index:
    """A package index; counts requests and can break off, ignore ranges or lie."""

    def __init__(self):
        self.content = CONTENT
        self.requests: list[tuple[str, str | None]] = []
        self.break_after: list[int] = []  # bytes to send in each of the next answers
        self.ranges = True
        self.json = False
        self.page = f'<a href="/files/{NAME}#sha256={SHA256}">{NAME}</a>'
        index = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                index.requests.append((self.path, self.headers.get("Range")))
                if self.path == "/simple/some-package/":
                    self.answer_page()
                elif self.path == f"/files/{NAME}":
                    self.answer_file()
                else:
                    self.send_error(404)

            def answer_page(self):
                kind, page = "text/html", index.page
                if index.json:
                    kind = "application/vnd.pypi.simple.v1+json"
                    file = {"filename": NAME, "url": f"/files/{NAME}", "hashes": {"sha256": SHA256}}
                    meta = {"api-version": "1.0"}
                    page = json.dumps({"meta": meta, "name": "some-package", "files": [file]})
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(page.encode())

            def answer_file(self):
                body, status = index.content, 200
                wanted = self.headers.get("Range")
                if wanted and index.ranges:
                    start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                    body, status = body[start:], 206
                    if not body:
                        self.send_error(416)
                        return
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: index.break_after.pop(0)] if index.break_after else body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def file_requests(self) -> list[str | None]:
        return [ranges for path, ranges in self.requests if path.startswith("/files/")]


@pytest.fixture
def index(monkeypatch):
    index = Index()
    use_index(monkeypatch, index.url)
    yield index
    index.server.shutdown()
    index.server.server_close()


def use_index(monkeypatch, url: str) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", url)


def fetch(cache: Path) -> Path:
    return fetch_wheel("Some.Package", "1.0", SHA256, cache_dir=cache)


def test_a_terminal_shows_a_progress_bar(index: Index, tmp_path: Path, capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fetch(tmp_path)
    assert "100%" in capfd.readouterr().err


@pytest.mark.parametrize("as_json", [False, True], ids=["html", "json"])
def test_the_wheel_is_fetched_once(index: Index, tmp_path: Path, as_json, capfd):
    index.json = as_json
    file = fetch(tmp_path)
    assert file.name == NAME and file.read_bytes() == CONTENT
    assert capfd.readouterr().err == f"Downloading {NAME} ...\n"  # a bar, were this a terminal
    count = len(index.requests)
    assert fetch(tmp_path) == file
    assert len(index.requests) == count
    assert not list(tmp_path.rglob("*.part"))


def test_a_broken_connection_is_taken_up_where_it_broke(index: Index, tmp_path: Path):
    index.break_after = [32 * PIECE + 5, 8 * PIECE]
    assert fetch(tmp_path).read_bytes() == CONTENT
    assert index.file_requests() == [None, f"bytes={32 * PIECE}-", f"bytes={40 * PIECE}-"]


def test_an_interrupted_process_is_taken_up_by_the_next(index: Index, tmp_path: Path, monkeypatch):
    index.break_after = [10 * PIECE] + [0] * 4
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(DownloadError, match="the connection broke again and again"):
        fetch(tmp_path)
    assert not list(tmp_path.rglob("*.whl"))
    index.requests.clear()
    assert fetch(tmp_path).read_bytes() == CONTENT
    assert index.file_requests() == [f"bytes={10 * PIECE}-"]


def test_a_server_that_knows_no_ranges_sends_everything_again(index: Index, tmp_path: Path):
    index.break_after, index.ranges = [1_000_000], False
    assert fetch(tmp_path).read_bytes() == CONTENT


def test_a_complete_part_that_was_never_renamed_is_used(index: Index, tmp_path: Path):
    part = cache_directory(tmp_path, "wheels") / f"{NAME}.{SHA256[:8]}.part"
    part.write_bytes(CONTENT)
    assert fetch(tmp_path).read_bytes() == CONTENT
    assert index.file_requests() == [f"bytes={len(CONTENT)}-"]


def test_a_file_with_another_checksum_is_never_kept(index: Index, tmp_path: Path):
    index.content = b"x" + CONTENT[1:]
    with pytest.raises(DownloadError, match=f"has sha256 [0-9a-f]{{64}}, expected {SHA256}"):
        fetch(tmp_path)
    assert not [f for f in tmp_path.rglob("*") if f.suffix in (".whl", ".part")]


def test_an_index_with_another_file_of_that_name_is_not_asked_for_it(index: Index, tmp_path: Path):
    index.page = f'<a href="/files/{NAME}#sha256={"0" * 64}">{NAME}</a>'
    with pytest.raises(DownloadError, match=f"{NAME} there has sha256 000000"):
        fetch(tmp_path)
    assert index.file_requests() == []


def test_a_damaged_file_in_the_cache_is_reported_not_used(index: Index, tmp_path: Path):
    file = fetch(tmp_path)
    file.write_bytes(CONTENT[:1000])
    with pytest.raises(DownloadError, match=r"\(1000 bytes\) has sha256 .* truncated") as error:
        fetch(tmp_path)
    assert str(file) in str(error.value)


def test_offline_the_message_says_what_to_put_where(tmp_path: Path, monkeypatch):
    use_index(monkeypatch, "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(DownloadError) as error:
        fetch(tmp_path)
    message = str(error.value)
    assert "http://127.0.0.1:9/simple/some-package/: cannot be reached" in message
    assert "secret" not in message
    assert "pip download --no-deps Some.Package==1.0" in message
    assert str(tmp_path / "wheels") in message
    # Doing as the message says is enough.
    (tmp_path / "wheels" / NAME).write_bytes(CONTENT)
    assert fetch(tmp_path).name == NAME


def test_links_and_extra_indexes_that_pip_knows_are_searched_too(
    index: Index, tmp_path: Path, monkeypatch
):
    index.page = "nothing here"
    with pytest.raises(DownloadError, match=r"no usable wheel of Some\.Package 1\.0"):
        fetch(tmp_path)
    links = tmp_path / "links"
    links.mkdir()
    (links / NAME).write_bytes(CONTENT)
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    assert fetch(tmp_path).read_bytes() == CONTENT
    monkeypatch.delenv("PIP_FIND_LINKS")
    simple = tmp_path / "mirror" / "some-package"
    simple.mkdir(parents=True)
    (simple / "index.html").write_text(f'<a href="../../links/{NAME}">{NAME}</a>')
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", simple.parent.as_uri())
    assert fetch(tmp_path / "other").read_bytes() == CONTENT


def test_without_pip_the_environment_decides(index: Index, tmp_path: Path, monkeypatch):
    empty = tmp_path / "no_pip"
    empty.mkdir()
    (empty / "pip.py").write_text("raise ImportError('no pip here')")
    monkeypatch.setenv("PYTHONPATH", str(empty))
    assert subprocess.run([sys.executable, "-m", "pip"], capture_output=True).returncode != 0
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("UV_DEFAULT_INDEX", index.url)
    assert fetch(tmp_path).read_bytes() == CONTENT


def test_two_processes_fetch_one_file_between_them(index: Index, tmp_path: Path):
    program = (
        "from pathlib import Path; from jaxmoo.hf import fetch_wheel; "
        f"print(fetch_wheel('some-package', '1.0', {SHA256!r}, cache_dir=Path({str(tmp_path)!r})))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    found = {process.communicate()[0].strip() for process in processes}
    assert found == {str(tmp_path / "wheels" / NAME)}
    assert index.file_requests() == [None]


def test_an_unusable_cache_directory_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="JAXMOO_CACHE"):
        fetch_wheel("some-package", "1.0", SHA256, cache_dir=tmp_path / "file")


def test_the_cache_is_chosen_by_argument_then_environment(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("JAXMOO_CACHE", str(tmp_path / "by_environment"))
    assert cache_directory(None, "wheels") == tmp_path / "by_environment" / "wheels"
    assert cache_directory(tmp_path / "given", "wheels") == tmp_path / "given" / "wheels"
