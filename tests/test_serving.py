"""What ``docs/serving.md`` says of other programs, as far as they are installed here."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from devices import ROOT
from jaxmoo.commands import convert, generate
from tiny_tokenizer import bytes_tokenizer

PAGE = (ROOT / "docs" / "serving.md").read_text("utf-8")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Ciao!\n\n2 < 3 & "4"?'},
    {"role": "assistant", "content": "Sì."},
    {"role": "user", "content": "Perché?"},
]
# As Ollama gives a conversation to its templates.
RENDER = """package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	source, _ := os.ReadFile(os.Args[1])
	text, _ := os.ReadFile(os.Args[2])
	var messages []Message
	if err := json.Unmarshal(text, &messages); err != nil {
		panic(err)
	}
	data := map[string]any{"Messages": messages, "System": "", "Response": ""}
	parsed := template.Must(template.New("").Parse(string(source)))
	if err := parsed.Execute(os.Stdout, data); err != nil {
		panic(err)
	}
}
"""


def test_the_commands_of_the_page_are_commands_of_this_version():
    lines = re.findall(r"^jaxmoo (.*)$", PAGE.replace("\\\n", " "), re.M)
    parsers = {"convert": convert._parser, "generate": generate._parser}
    for line in lines:
        name, *arguments = shlex.split(line)
        assert isinstance(parsers[name]("jaxmoo").parse_args(arguments), argparse.Namespace)
    assert len(lines) == 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_ollamas_templates_write_what_the_models_do(tmp_path):
    modelfiles = re.findall(r"```dockerfile\n(.*?)```", PAGE, re.S)
    templates = [re.search(r'^TEMPLATE """(.*?)"""', one, re.S | re.M)[1] for one in modelfiles]
    assert len(templates) == 2
    (tmp_path / "render.go").write_text(RENDER)
    (tmp_path / "messages.json").write_text(json.dumps(CHAT))
    environment = os.environ | {"GOCACHE": str(tmp_path / "cache"), "GO111MODULE": "off"}
    build = ["go", "build", "-o", "render", "render.go"]
    subprocess.run(build, cwd=tmp_path, env=environment, check=True)
    for template, name in zip(templates, ("chatml", "llama-3"), strict=True):
        (tmp_path / "template").write_text(template)
        run = ["./render", "template", "messages.json"]
        found = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True).stdout.decode()
        ours = (ROOT / "configs" / "chat_templates" / f"{name}.jinja").read_text("utf-8")
        tokenizer = bytes_tokenizer(
            ["<|begin_of_text|>"], bos_token="<|begin_of_text|>", chat_template=ours
        )
        wanted = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        # Which Ollama puts before a prompt where the file says so.
        assert found == wanted.removeprefix("<|begin_of_text|>")


@pytest.mark.slow
def test_transformers_serve_replies_as_this_does(tiny_model, tmp_path, capsys):
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package)
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    command = "from transformers.cli.transformers import main; main()"
    arguments = ["serve", str(tiny_model), "--port", str(port), "--device", "cpu"]
    address, log = f"http://localhost:{port}", tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-c", command, *arguments], stdout=out, stderr=out
        )
    try:
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/health").close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.2)
        body = {"model": str(tiny_model), "messages": CHAT, "max_tokens": 12, "stream": False}
        request = urllib.request.Request(
            f"{address}/v1/chat/completions",
            json.dumps(body | {"temperature": 0}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            theirs = json.load(answer)["choices"][0]["message"]["content"]
    finally:
        server.terminate()
        server.wait(30)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": CHAT}))
    ours = [str(tiny_model), "--file", str(tmp_path / "prompts.jsonl"), "--max-tokens", "12"]
    assert generate.main(ours) == 0
    assert capsys.readouterr().out.strip() == theirs.strip()
