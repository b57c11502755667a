"""Uploads to a hub, which is here a server on the loopback."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from jaxmoo.errors import ConfigError
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.push import PushError, prepare_push, push

TOKEN = "hf_secretsecret"


class Hub:
    """What the hub's server has been told."""

    def __init__(self):
        self.made, self.files, self.messages, self.refuse = [], {}, [], 0

    def answer(self, path, body):
        if path == "/api/repos/create":
            self.made.append(json.loads(body))
            return {"url": f"{self.address}/me/model", "id": "me/model"}
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            return {
                "files": [
                    {"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names
                ]
            }
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                else:
                    self.messages.append(value["summary"])
            return {"commitUrl": f"{self.address}/me/model/commit/1", "commitOid": "1"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        return {"id": "me/model", "sha": "0", "siblings": []}


@pytest.fixture
def hub(monkeypatch):
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
            status = found.refuse or (200 if allowed else 401)
            path = self.path.partition("?")[0]
            content = json.dumps(found.answer(path, body) if status == 200 else {}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield found
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("in_bucket", [False, True])
def test_an_export_is_uploaded_with_its_card(in_bucket, hub, tmp_path):
    export = typed_path("memory://pushed/export") if in_bucket else tmp_path
    files = {"README.md": b"---\nlicense: mit\n---\n# A card\n", "model.safetensors": b"\0\1"}
    for name, content in files.items():
        (export / name).write_bytes(content)
    assert prepare_push("model", private=True) == "me/model"
    (made,) = hub.made
    assert made["name"] == "model"
    assert made.get("private") is True or made["visibility"] == "private"
    assert not hub.files
    assert push(export, "me/model", "step 3") == f"{hub.address}/me/model/commit/1"
    assert hub.files == files and hub.messages == ["step 3"]


def test_what_is_missing_is_known_before_any_work(hub, monkeypatch):
    hub.refuse = 403
    with pytest.raises(ConfigError, match="may not write there"):
        prepare_push("me/model")
    hub.refuse = 0
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(ConfigError, match="does not know the token") as refused:
        prepare_push("me/model")
    assert "hf_another" not in str(refused.value)
    with pytest.raises(ConfigError, match="no name of a repository"):
        prepare_push("a/b/c")
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
        with pytest.raises(ConfigError, match="cannot be reached"):
            prepare_push("me/model")
    monkeypatch.setattr("jaxmoo.hf.push.get_token", lambda: None)
    with pytest.raises(ConfigError, match=r"no token .* `hf auth login`, or set HF_TOKEN"):
        prepare_push("me/model")


def test_a_hub_that_fails_at_the_end_is_an_error_of_the_upload_alone(hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    hub.refuse = 404
    with pytest.raises(PushError, match="the hub answers 404") as failed:
        push(tmp_path, "me/model", "step 3")
    assert failed.value.exit_code == 1
