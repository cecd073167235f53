"""Ids of the hub: read, found in its cache, downloaded from a server on this machine, and refused in words."""

import json
import os
import subprocess
import sys
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from danceopd.support.hub import HubName, hub_name, located, near, near_cached, wanted

COMMIT = "a" * 40

NOBODY = "http://127.0.0.1:9"  # where no server is

FILES = {
    "model_index.json": b"{}",
    "whole.safetensors": b"all parts again",
    "run.py": b"raise SystemExit",
    "scheduler/scheduler_config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": b"weights",
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"half of them",
    "transformer/diffusion_pytorch_model.bin": b"a pickle",
}

# There too, and in no listing.
ADAPTER = {"ink/lora/adapter_model.safetensors": b"factors", "ink/lora/adapter_config.json": b'{"lora_alpha": 8}'}

FETCH = """
import sys
from pathlib import Path
from danceopd.support.hub import downloads, located
with downloads(sys.argv[2] == "yes"):
    try:
        print(located(Path(sys.argv[1])))
    except ValueError as error:
        print("refused:", error)
"""


def test_an_id_is_read():
    assert hub_name("owner/repo") == HubName("owner/repo")
    assert hub_name("owner/repo@v1.0") == HubName("owner/repo", None, "v1.0")
    assert hub_name("owner/repo:ink/ink.safetensors@main") == HubName("owner/repo", "ink/ink.safetensors", "main")
    for path in ("folder", "/owner/repo", "a/b/c", "./owner/repo", "../repo", "owner/..", "owner/repo:code.py", ""):
        assert hub_name(path) is None, path


def test_of_a_repository_what_a_pipeline_reads_is_wanted():
    chosen = wanted(list(FILES))
    assert chosen == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    assert wanted(["ink.safetensors", "README.md"]) == ["ink.safetensors"]
    half = ["unet/config.json", "unet/model.fp16.safetensors"]
    assert wanted(half) == half


def test_a_path_that_is_there_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/repo").mkdir(parents=True)
    assert located(Path("owner/repo")) == Path("owner/repo")


@pytest.fixture(scope="module")
def server():
    """A hub with one repository, owner/klein; it counts what was asked."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def send(self, body: bytes, status: int = 200, **headers) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(self.path.partition("?")[0])
            asked.append(path)
            if path.startswith("/api/models/owner/klein/tree"):
                self.send(json.dumps([self.entry(name) for name in FILES]).encode(), Content_Type="application/json")
            elif path.startswith("/api/models/owner/klein"):
                siblings = [{"rfilename": name} for name in FILES]
                body = {"id": "owner/klein", "sha": COMMIT, "siblings": siblings}
                self.send(json.dumps(body).encode(), Content_Type="application/json")
            elif path.startswith("/owner/klein/resolve/") and (name := path.split("/", 5)[5]) in FILES | ADAPTER:
                body = (FILES | ADAPTER)[name]
                self.send(body, ETag=f'"{sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)
            elif path.startswith("/owner/klein/"):
                self.send(b"", 404, X_Error_Code="EntryNotFound")
            else:
                self.send(b"", 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        @staticmethod
        def entry(name: str) -> dict:
            return {"type": "file", "path": name, "size": len(FILES[name]), "oid": sha1(FILES[name]).hexdigest()}

    http = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_address[1]}", asked
    http.shutdown()


def fetch(name: str, cache: Path, endpoint: str, download: bool, token: str = "") -> str:
    """What `located` says in a process of its own, whose hub is the server."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_TOKEN": token, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", FETCH, name, "yes" if download else "no"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert not token or token not in done.stdout + done.stderr
    return done.stdout.strip()


def test_a_model_is_downloaded_once_and_only_where_allowed(server, tmp_path):
    endpoint, asked = server
    asked.clear()
    assert fetch("owner/klein", tmp_path, endpoint, download=False) == "owner/klein"
    assert asked == []  # a dry run asks nobody
    folder = Path(fetch("owner/klein", tmp_path, endpoint, download=True))
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there == set(wanted(list(FILES)))
    asked.clear()
    assert Path(fetch("owner/klein", tmp_path, endpoint, download=False)) == folder
    assert Path(fetch(f"owner/klein@{COMMIT}", tmp_path, endpoint, download=False)) == folder
    assert asked == []  # the cache has it
    assert Path(fetch("owner/klein", tmp_path, endpoint, download=True)) == folder
    assert not any("resolve" in path for path in asked)
    assert Path(fetch("owner/klein", tmp_path, NOBODY, download=True)) == folder


def test_an_adapter_comes_with_the_file_that_holds_its_scale(server, tmp_path):
    endpoint, _ = server
    name = "owner/klein:ink/lora/adapter_model.safetensors"
    file = Path(fetch(name, tmp_path, endpoint, download=True))
    assert file.read_bytes() == ADAPTER["ink/lora/adapter_model.safetensors"]
    assert json.loads(file.with_name("adapter_config.json").read_text()) == {"lora_alpha": 8}
    assert Path(fetch(name, tmp_path, NOBODY, download=False)) == file


def test_what_cannot_be_had_is_said_in_words(server, tmp_path):
    endpoint, _ = server
    fetch("owner/klein", tmp_path, endpoint, download=True)
    said = fetch("owner/klien", tmp_path, endpoint, download=True, token="hf_secret")
    assert said.startswith("refused: there is no owner/klien here, and the hub has no such repository; did you mean")
    assert said.endswith("'owner/klein'?")
    said = fetch("owner/klein:ink.safetensors", tmp_path, endpoint, download=True)
    assert "the hub has no such file" in said
    said = fetch("other/model", tmp_path, NOBODY, download=True)
    assert said.startswith("refused: there is no other/model here, and the hub does not answer")


def test_the_cache_names_what_is_near(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    assert near_cached("owner/klein") == ""
    assert near_cached("/somewhere/else") == ""
    (tmp_path / "klein").mkdir()
    assert near(tmp_path / "klien") == f"; did you mean '{tmp_path}/klein'?"
    assert "--download" in near("owner/klein")
    assert "give owner/repo" in near("https:/huggingface.co/owner/klein")
