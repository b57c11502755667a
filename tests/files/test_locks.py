"""Locks in buckets: kept by the living, taken over from the dead, whatever clocks say."""

import json
import threading
import time

import pytest

from jaxmoo.files import locks
from jaxmoo.files.locks import BucketLock, Timeout, lock_of


@pytest.fixture
def path(s3_bucket):
    return s3_bucket / ".lock"


def quick(path, **options):
    return BucketLock(path, beat=0.1, expiry=1.0, **options)


def test_two_do_not_hold_it(path):
    first, second = quick(path), quick(path)
    first.acquire(timeout=0)
    with pytest.raises(Timeout):
        second.acquire(timeout=0)
    first.release()
    assert not path.exists()
    second.acquire(timeout=0)
    second.release()


def test_one_who_waits_gets_it(path):
    first, second = quick(path), quick(path)
    first.acquire(timeout=0)
    threading.Timer(0.3, first.release).start()
    second.acquire(timeout=10)
    second.release()


def test_one_that_lives_elsewhere_keeps_it(path, monkeypatch):
    monkeypatch.setattr(locks, "_machine", lambda: "other")
    first = quick(path)
    first.acquire(timeout=0)
    monkeypatch.setattr(locks, "_machine", lambda: "this")
    with pytest.raises(Timeout):
        quick(path).acquire(timeout=0.5)
    first.release()


def test_one_that_stood_still_elsewhere_loses_it_whatever_its_clock_said(path):
    path.write_bytes(json.dumps({"token": "x", "beat": 1, "machine": "other"}).encode())
    begun = time.monotonic()
    lock = quick(path)
    lock.acquire(timeout=0)
    assert time.monotonic() - begun > 1.0
    lock.release()


def test_one_that_died_here_loses_it_at_once(path):
    lock = quick(path)
    lock.acquire(timeout=0)
    lock._stop.set()
    lock._thread.join()
    path.write_bytes(json.dumps(json.loads(path.read_bytes()) | {"since": "1"}).encode())
    other = BucketLock(path)
    other.acquire(timeout=0)
    other.release()


def test_one_that_was_taken_for_dead_hears_of_it(path):
    heard = threading.Event()
    lock = quick(path, lost=lambda _: heard.set())
    lock.acquire(timeout=0)
    path.write_bytes(json.dumps({"token": "x", "beat": 1, "machine": "other"}).encode())
    assert heard.wait(10)
    lock.release()
    assert json.loads(path.read_bytes())["token"] == "x"  # it is not its own to remove


def test_a_disk_has_locks_of_the_system(tmp_path):
    lock = lock_of(tmp_path / ".lock")
    lock.acquire(timeout=0)
    with pytest.raises(Timeout):
        lock_of(tmp_path / ".lock").acquire(timeout=0)
    lock.release()
