"""Stores of objects on the loopback: an S3 server and an emulator of Google Cloud Storage."""

from __future__ import annotations

import itertools
import json
import socket
import urllib.request
from collections.abc import Iterator
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
