"""The server of the page: what it answers, and what it refuses."""

import asyncio
import json
import shutil
import socket
from urllib.parse import urlencode, urlsplit

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="danceopd[watch] is not installed")

from danceopd.cli.parser import main
from danceopd.watch.runs import Runs
from danceopd.watch.server import FILES, application, serve


def write_run(folder, steps=3, most=10):
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"training: {{max_steps: {most}}}\n")
    records = [{"step": i, "loss": 1 / i, "loss_by_capability": {"t2i": 1 / i}} for i in range(1, steps + 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    Image.new("RGB", (8, 8), "red").save(folder / "samples" / "step-00000002.png")
    return folder


def ask(app, path, query=(), method="GET", host="127.0.0.1:8642"):
    """Returns (status, headers, body) of one request, by the protocol that a server speaks with an application."""
    sent, scope = [], {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"}
    scope |= {"method": method, "path": path, "raw_path": path.encode(), "root_path": "", "client": ("127.0.0.1", 1)}
    scope |= {"query_string": urlencode(dict(query)).encode(), "headers": [(b"host", host.encode())]}
    scope |= {"server": ("127.0.0.1", 8642), "extensions": {}}

    body = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive():
        return next(body, None) or await asyncio.Event().wait()  # the client stays until it is answered

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    headers = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "runs" / "one")


@pytest.fixture
def app(run):
    return application(Runs([run.parent]))


def test_it_lists_runs_and_gives_their_numbers(app, run):
    write_run(run.with_name("two"), steps=10)  # begun after the page
    found = json.loads(ask(app, "/api/runs")[2])
    assert [(one["name"], one["state"], one["step"]) for one in found] == [
        (str(run), "training", 3),
        (str(run.with_name("two")), "finished", 10),
    ]
    everything = json.loads(ask(app, "/api/run", {"run": str(run)})[2])
    assert everything["training"]["columns"]["loss/t2i"] == pytest.approx([1, 1 / 2, 1 / 3], rel=1e-5)
    assert everything["samples"] == [2]
    status, headers, body = ask(app, "/api/sample", {"run": str(run), "step": 2})
    assert (status, headers["content-type"], body) == (
        200,
        "image/png",
        (run / "samples" / "step-00000002.png").read_bytes(),
    )
    assert ask(app, "/api/config", {"run": str(run)})[2] == (run / "config.yaml").read_bytes()
    assert ask(app, "/api/log", {"run": str(run)})[2].decode() == (run / "log.jsonl").read_text().rstrip("\n")


def test_a_deleted_run_is_said_to_be_gone(app, run):
    ask(app, "/api/runs")
    shutil.rmtree(run)
    (found,) = json.loads(ask(app, "/api/runs")[2])
    assert found["state"] == "gone"
    assert ask(app, "/api/run", {"run": str(run)})[0] == 200
    assert ask(app, "/api/sample", {"run": str(run), "step": 2})[0] == 404


def test_it_asks_nothing_of_other_addresses(app):
    status, headers, body = ask(app, "/")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    page = body.decode() + "".join(ask(app, f"/assets/{name}")[2].decode() for name in FILES if "uPlot" not in name)
    assert "//" not in page.replace("\n//", "").replace("; //", "").replace(" //", "").replace("http://127", "")


@pytest.mark.parametrize(
    ("path", "query", "options", "status"),
    [
        ("/api/runs", {}, {"host": "evil.example"}, 400),  # a page elsewhere whose name was turned to this machine
        ("/api/runs", {}, {"method": "POST"}, 405),
        ("/api/runs", {}, {"method": "DELETE"}, 405),
        ("/api/run", {"run": "/etc"}, {}, 404),
        ("/api/config", {"run": "."}, {}, 404),
        ("/api/config", {}, {}, 404),
        ("/assets/../server.py", {}, {}, 404),
        ("/assets/..%2fserver.py", {}, {}, 404),
        ("/assets/watch.html.bak", {}, {}, 404),
    ],
)
def test_what_it_refuses(app, path, query, options, status):
    assert ask(app, path, query, **options)[0] == status


@pytest.mark.parametrize("step", ["", "../../x", "1e3", "-2", "9" * 400, "３", "3"])
def test_a_sample_that_is_not_there(app, run, step):
    assert ask(app, "/api/sample", {"run": str(run), "step": step})[0] == 404


def test_a_sample_outside_the_run_is_not_given(app, run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (run / "samples" / "step-00000007.png").symlink_to(tmp_path / "secret.png")
    assert ask(app, "/api/sample", {"run": str(run), "step": 7})[0] == 404


def test_a_configuration_that_cannot_be_read_does_not_end_the_page(app, run):
    for text in ("[" * 5000, "training: [1]", "training: {max_steps: {}}", "\x00"):
        (run / "config.yaml").write_text(text)
        (found,) = json.loads(ask(app, "/api/runs")[2])
        assert found["max_steps"] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["nowhere"], "there is no folder nowhere"), (["."], "no run in")],
)
def test_mistakes_of_the_command(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["watch", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_port_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["watch", ".", "--port", "70000"])
    assert "--port: must be at most 65535, not 70000" in capsys.readouterr().err


def test_the_page_can_be_asked_for_from_when_its_address_is_said(tmp_path):
    def open_and_end(address):
        socket.create_connection((urlsplit(address).hostname, urlsplit(address).port)).close()
        raise InterruptedError("opened")

    with pytest.raises(InterruptedError, match="opened"):
        serve(Runs([write_run(tmp_path / "run")]), 0, open_and_end)
