"""Paths in buckets: what they do, against real servers, and what is refused."""

import importlib.util
import os
from pathlib import Path

import pytest

from bucket_servers import SECRET
from jaxmoo.errors import ConfigError
from jaxmoo.files.appended import Appended
from jaxmoo.files.atomic import replace_text, replacing
from jaxmoo.files.buckets import BucketPath, _filesystem
from jaxmoo.files.digests import damaged_files, read_digests, write_digests
from jaxmoo.files.outputs import check_writable, typed_path


@pytest.fixture(params=["memory", "s3_bucket", "gs_bucket"])
def bucket(request):
    if request.param == "memory":
        return typed_path("memory://tests")
    return request.getfixturevalue(request.param)


def test_files_are_written_found_read_and_removed(bucket):
    folder = bucket / "a"
    assert not folder.exists() and not list(bucket.glob("*"))
    folder.mkdir(parents=True)  # no directories but in names
    assert not folder.exists()
    (folder / "one.txt").write_text("eins\n")
    replace_text(folder / "b/two.txt", "zwei")
    with replacing(folder / "three.bin") as stream:
        stream.write(b"\0" * 5)
    assert folder.is_dir() and not folder.is_file()
    assert (folder / "one.txt").is_file() and not (folder / "one.txt").is_dir()
    assert [p.name for p in folder.iterdir()] == ["b", "one.txt", "three.bin"]
    assert [p.name for p in folder.glob("*.txt")] == ["one.txt"]
    (folder / "same/same/one.txt").write_text("eins")
    assert list((folder / "same").iterdir()) == [folder / "same/same"]
    (folder / "same").rmtree()
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*")]
    assert names == ["b/two.txt", "one.txt", "three.bin"]
    assert (folder / "three.bin").stat().st_size == 5
    assert (folder / "one.txt").read_text() == "eins\n"
    assert (folder / "b/two.txt").read_range(1, 3) == b"we"
    (folder / "one.txt").unlink()
    (folder / "one.txt").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=r"no such object.*one\.txt"):
        (folder / "one.txt").read_text()
    folder.rmtree()
    assert not folder.exists()


def test_a_file_appears_when_it_is_whole(bucket):
    file = bucket / "big.bin"
    part = os.urandom(2**20)
    with file.open("wb") as stream:
        for _ in range(20):  # more than is sent at a time
            stream.write(part)
        assert stream.tell() == 20 * 2**20
        if file.scheme != "memory":  # where a file is there when it is opened
            assert not file.exists()
    assert file.stat().st_size == 20 * 2**20
    with file.open("rb") as stream:
        stream.seek(19 * 2**20)
        assert stream.read() == part
    for mode, half in (("wb", b"half"), ("w", "half")):
        with pytest.raises(RuntimeError, match="no more"), file.open(mode) as stream:
            stream.write(half)
            raise RuntimeError("no more")
    if file.scheme != "memory":
        assert file.stat().st_size == 20 * 2**20


def test_lines_that_did_not_get_there_are_sent_with_the_next(monkeypatch):
    monkeypatch.setattr("jaxmoo.files.appended._EVERY", 0.0)
    path = BucketPath("memory://appended/rows.jsonl")
    file = Appended(path)
    file.write("1\n")
    with monkeypatch.context() as gone, pytest.raises(OSError, match="connection reset"):
        gone.setattr(BucketPath, "write_text", unreachable)
        file.write("2\n")
        file.sync()
    file.write("3\n")  # which ends no run
    file.close()
    assert path.read_text() == "1\n2\n3\n"


def unreachable(*_):
    raise OSError(5, "connection reset")


def test_digests_of_a_directory_are_kept_beside_it(bucket):
    (bucket / "d/x/a.bin").write_bytes(b"a")
    write_digests(bucket / "d", {"step": 3})
    found = read_digests(bucket / "d")
    assert found.about == {"step": 3} and list(found.files) == ["x/a.bin"]
    (bucket / "d/x/a.bin").write_bytes(b"b")
    assert damaged_files(bucket / "d", found.files) == ["x/a.bin is not what was written"]


def test_an_object_is_made_once(s3_bucket):
    assert (s3_bucket / "once").create(b"1") and not (s3_bucket / "once").create(b"2")
    assert (s3_bucket / "once").read_bytes() == b"1"


def test_the_server_decides_who_made_an_object(s3_bucket, monkeypatch):
    """Two have seen that it is not there, and only one has made it."""
    (s3_bucket / "once").write_bytes(b"1")
    monkeypatch.setattr(_filesystem("s3"), "exists", lambda _: False)
    assert not (s3_bucket / "once").create(b"2")
    assert (s3_bucket / "once").read_bytes() == b"1"


def test_a_path_in_a_bucket_is_never_one_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = typed_path("memory://bucket/x")
    for misuse in (Path, os.listdir, open, os.fspath):
        with pytest.raises(ConfigError, match="memory://bucket/x is in a bucket, and here only"):
            misuse(path)
    assert not list(tmp_path.iterdir())
    assert typed_path(path) is path and isinstance(path, BucketPath)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("s3:/bucket/x", "write s3:// with two slashes"),
        ("az://bucket/x", "az:// is not supported.*s3://, gs://, hf://, memory://"),
        ("https://host/x", "https:// is not supported"),
        ("file:///tmp/x", "file:// is not supported"),
        ("s3://", "expected s3://BUCKET/NAME"),
        ("s3://bucket/../x", "expected s3://BUCKET/NAME"),
    ],
)
def test_what_is_no_path_is_refused(text, says):
    with pytest.raises(ConfigError, match=says):
        typed_path(text)


def test_credentials_in_a_path_are_refused_and_not_shown():
    with pytest.raises(ConfigError, match="must hold no credentials") as caught:
        typed_path("s3://KEY:sesame@bucket/x")
    assert "sesame" not in str(caught.value)


def test_the_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"needs the package gcsfs: pip install 'jaxmoo\[buckets\]'"
    ):
        typed_path("gs://bucket/x")


def test_where_nothing_can_be_written_is_said_before_long_work(s3_server, monkeypatch):
    with pytest.raises(ConfigError, match=r"output: .*there is no bucket s3://no-such-bucket"):
        check_writable(typed_path("s3://no-such-bucket/run"), "output")
    with pytest.raises(ConfigError, match="the Hugging Face hub keeps every change"):
        check_writable(typed_path("hf://owner/name"), "output")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    _filesystem.cache_clear()
    try:
        with pytest.raises(ConfigError, match="no credentials for s3://"):
            check_writable(typed_path("s3://bucket/run"), "output")
    finally:
        _filesystem.cache_clear()


@pytest.mark.parametrize("fault", ["slow", "error", "cut", "gone"])
def test_what_passes_is_tried_again(faulty, fault):
    proxy, bucket = faulty
    data = os.urandom(2**20)
    proxy.faults[:] = ["gone" if fault == "cut" else fault] * 2
    (bucket / "x").write_bytes(data)
    proxy.faults[:] = [fault] * 2
    assert (bucket / "x").read_bytes() == data
    with (bucket / "x").open("rb") as stream:
        stream.seek(100)
        proxy.faults[:] = [fault]
        assert stream.read(50) == data[100:150]
    assert not proxy.faults


def test_what_does_not_pass_is_an_error_without_credentials(faulty, monkeypatch):
    proxy, bucket = faulty
    proxy.faults[:] = ["denied"] * 5
    with pytest.raises(
        ConfigError, match=r"access denied; check what your credentials may do in s3://"
    ):
        check_writable(bucket / "run", "output")
    monkeypatch.setattr(_filesystem("s3"), "cat_file", lambda _: _fail(f"bad key {SECRET}"))
    with pytest.raises(OSError, match=r"bad key \*\*\*"):
        (bucket / "x").read_bytes()


def _fail(message):
    raise ValueError(message)
