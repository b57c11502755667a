"""What tells a run that its machine will be taken away, and what follows."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxmoo.errors import ConfigError
from jaxmoo.files.buckets import BucketPath
from jaxmoo.runtime.notices import check_stop_file, metadata_host, watch_for_notices


class Asked:
    """Counts what is asked for, and lets a test wait for it."""

    def __init__(self):
        self.stopped, self.saved = threading.Event(), threading.Semaphore(0)

    def watch(self, stop_file=None):
        return watch_for_notices(
            stop_file, stop=self.stopped.set, save=self.saved.release, every=0.005
        )


@pytest.fixture
def metadata(monkeypatch):
    """What a metadata server on the loopback answers, to be changed by the test."""
    answers = {"maintenance-event": "NONE", "preempted": "FALSE"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            place, _, name = self.path.rpartition("/")
            known = place == "/computeMetadata/v1/instance" and name in answers
            allowed = self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known and allowed else 403)
            self.end_headers()
            self.wfile.write(answers[name].encode() if known and allowed else b"TERMINATE TRUE")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # which leads nowhere
    yield answers
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_maintenance_saves_once_and_a_preemption_stops(metadata, capfd):
    asked = Asked()
    with asked.watch():
        metadata["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
        assert not asked.saved.acquire(timeout=0.1), "nobody notices a migration"
        metadata["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
        assert asked.saved.acquire(timeout=10)
        assert not asked.saved.acquire(timeout=0.1) and not asked.stopped.is_set()
        metadata["preempted"] = "TRUE"
        assert asked.stopped.wait(10)
    text = capfd.readouterr().err
    assert "maintenance (TERMINATE_ON_HOST_MAINTENANCE): saving" in text
    assert "preempted): stopping as on SIGTERM" in text


def test_a_server_that_does_not_answer_or_refuses_stops_nothing(metadata):
    metadata.clear()
    asked = Asked()
    with asked.watch():
        assert not asked.stopped.wait(0.1) and not asked.saved.acquire(timeout=0)


def test_a_file_that_appears_stops_the_run_and_one_that_is_there_refuses_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GCE_METADATA_HOST", "")
    assert metadata_host() is None
    file, asked = tmp_path / "stop", Asked()
    check_stop_file(str(file))
    with asked.watch(str(file)):
        assert not asked.stopped.wait(0.05)
        file.touch()
        assert asked.stopped.wait(10)
    with pytest.raises(ConfigError, match=r"stop is there.*Remove it first"):
        check_stop_file(str(file))


def test_a_bucket_that_cannot_be_reached_is_looked_at_again(monkeypatch):
    monkeypatch.setenv("GCE_METADATA_HOST", "")
    asked, exists, looks = Asked(), BucketPath.exists, []

    def fails_first(self):
        looks.append(self)
        if len(looks) == 1:
            raise OSError(5, "connection reset")
        return exists(self)

    monkeypatch.setattr(BucketPath, "exists", fails_first)
    file = BucketPath("memory://notices/stop")
    with asked.watch(str(file)):
        file.write_bytes(b"")
        assert asked.stopped.wait(10)
    file.unlink()
