"""A real HTTP server that answers as a judge does, well or badly, and edits to ask it about."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

from danceopd.evaluation.gedit.endpoint import EndpointJudge
from danceopd.evaluation.gedit.judge import AGAIN, Edit

SMALL = 48 * 48


def picture(seed: int, size=(24, 16)) -> Image.Image:
    """Of one colour by its seed: such a PNG is quickly written."""
    return Image.new("RGB", size, tuple(np.random.default_rng(seed).integers(0, 256, 3).tolist()))


def edits(count: int) -> list[Edit]:
    return [Edit(f"instruction {i}", lambda i=i: (picture(i), picture(1000 + i))) for i in range(count)]


class Server:
    """A real HTTP server in a thread; `behave(handler, body, count)` answers, count being the requests before."""

    def __init__(self, behave):
        self.requests, self.lock, server = [], threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    count = len(server.requests)
                    server.requests.append((self.path, dict(self.headers), body, time.monotonic()))
                try:
                    behave(self, body, count)
                except (BrokenPipeError, ConnectionResetError):
                    pass

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def send(handler, status: int, body, headers=()) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def answer(handler, text, tokens: int = 100) -> None:
    send(handler, 200, {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": tokens}})


def marks_of(body) -> str:
    """A good answer by the question alone, however often it is asked."""
    *pictures, text = body["messages"][0]["content"]
    first = sum(map(ord, text["text"].removesuffix(AGAIN))) % 11
    return json.dumps({"score": [first, 10 - len(pictures)], "reasoning": "because"})


def good(handler, body, count):
    answer(handler, marks_of(body))


KEY = "sk-very-secret-0123456789"


def judge_of(server: Server, **options) -> EndpointJudge:
    return EndpointJudge(server.url, "tiny", **{"parallel": 2, "timeout": 2.0, "backoff": 0.01, **options})


def first_badly(*ways):
    """Each of the first requests gets its own bad answer, and all later ones good ones."""

    def behave(handler, body, count):
        ways[count](handler) if count < len(ways) else good(handler, body, count)

    return behave
