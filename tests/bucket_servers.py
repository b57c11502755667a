"""Stores of objects on the loopback: an S3 server and an emulator of Google Cloud Storage."""

from __future__ import annotations

import http.client
import http.server
import itertools
import json
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxmoo.files.buckets import _filesystem
from jaxmoo.files.outputs import typed_path

SECRET = "wJalrXUtnFEMI-not-for-anyone"
_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory) -> Iterator[str]:
    """The address of an S3 server; the environment points to it as long as it is there."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(f"http://{host}:{port}").items():
            patch.setenv(name, value)
        patch.setenv("JAXMOO_SCRATCH", str(tmp_path_factory.mktemp("scratch")))
        _filesystem.cache_clear()
        yield f"http://{host}:{port}"
        _filesystem.cache_clear()
    server.stop()


def s3_environment(address: str) -> dict[str, str]:
    """What points the libraries of S3 to a server."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "AKIDNOTFORANYONE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture
def s3_bucket(s3_server) -> Path:
    """A new bucket on the S3 server."""
    name = f"bucket-{next(_numbers)}"
    _filesystem("s3").mkdir(name)
    return typed_path(f"s3://{name}")


@pytest.fixture(scope="session")
def gs_server() -> Iterator[str]:
    """The address of an emulator of Google Cloud Storage, to which the environment points."""
    pytest.importorskip("gcsfs")
    create_server = pytest.importorskip("gcp_storage_emulator.server").create_server
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        # It asks what kind of bucket one is by a protocol that the emulator does not speak.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        patch.setenv("FSSPEC_GS_TOKEN", "anon")
        _filesystem.cache_clear()
        yield f"http://127.0.0.1:{port}"
        _filesystem.cache_clear()
    server.stop()


@pytest.fixture
def gs_bucket(gs_server) -> Path:
    """A new bucket on the emulator of Google Cloud Storage."""
    name = f"bucket-{next(_numbers)}"
    request = urllib.request.Request(
        f"{gs_server}/storage/v1/b?project=none",
        data=json.dumps({"name": name}).encode(),
        headers={"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request).close()
    return typed_path(f"gs://{name}")


def everything(path: Path) -> bytes:
    """All that is stored below a path, names included."""
    files = path.rglob("*")
    return b"\n".join(part for file in files for part in (str(file).encode(), file.read_bytes()))


def upload(source: Path, target: Path) -> Path:
    """Copy a directory of this machine to a bucket."""
    for file in source.rglob("*"):
        if file.is_file():
            (target / file.relative_to(source).as_posix()).write_bytes(file.read_bytes())
    return target


class FaultyProxy:
    """Stands before an S3 server and spoils requests as it is told.

    Attributes:
      faults: what happens to the next requests, to each one of: ``"slow"`` (503 SlowDown),
        ``"error"`` (500), ``"denied"`` (403), ``"cut"`` (the connection ends in the middle of the
        reply), ``"gone"`` (the server does as it is told, but the connection ends without a reply).
      spoil: called with every request while `faults` is empty; may return such a fault as well.
      seen: the requests so far, as ``"GET /bucket/name"`` and the range that is asked for.
    """

    def __init__(self, server: str) -> None:
        self.faults: list[str] = []
        self.spoil: Callable[[str], str | None] = lambda _: None
        self.seen: list[tuple[str, str | None]] = []
        host = server.removeprefix("http://")
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(size)
                asked = f"{self.command} {self.path}"
                proxy.seen.append((asked, self.headers.get("Range")))
                fault = proxy.faults.pop(0) if proxy.faults else proxy.spoil(asked)
                if fault in _REPLIES:
                    status, code = _REPLIES[fault]
                    text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
                    self.reply(status, {}, text, len(text))
                    return
                connection = http.client.HTTPConnection(host, timeout=30)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                if fault == "gone":
                    self.close_connection = True
                    return
                whole = answer.headers.get("Content-Length") or len(content)
                if fault == "cut":
                    content, self.close_connection = content[: len(content) // 2], True
                self.reply(answer.status, dict(answer.headers), content, int(whole))

            def reply(self, status: int, headers: dict, content: bytes, size: int) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(size))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

            def log_message(self, *_: object) -> None:
                """Nobody reads it."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


_REPLIES = {
    "slow": (503, "SlowDown"),
    "error": (500, "InternalError"),
    "denied": (403, "AccessDenied"),
}


@pytest.fixture(scope="session")
def proxied(s3_server) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3_server)
    yield proxy
    proxy.close()


@pytest.fixture
def faulty(proxied, s3_bucket, monkeypatch) -> Iterator[tuple[FaultyProxy, Path]]:
    """A proxy before the S3 server, without faults so far, and a bucket that is reached by it."""
    proxied.faults.clear()
    proxied.seen.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxied.address)
    _filesystem.cache_clear()
    yield proxied, s3_bucket
    _filesystem.cache_clear()
