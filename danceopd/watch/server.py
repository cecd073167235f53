"""Serves the page on this machine alone; it reads runs and changes nothing."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from danceopd.watch.runs import Runs, WatchedRun

ASSETS = Path(__file__).parent / "assets"

FILES = ("watch.js", "watch.css", "uPlot.iife.min.js", "uPlot.min.css")

HOST = "127.0.0.1"

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def application(runs: Runs) -> Starlette:
    """Makes the application.

    Args:
        runs: What it shows.

    Returns:
        An ASGI application that answers GET alone, and requests for this machine's own name alone.
    """
    routes = [
        Route("/", _page),
        Route("/assets/{name}", _asset),
        Route("/api/runs", partial(_list, runs)),
        Route("/api/run", _of_run(runs, lambda run, _: JSONResponse(run.everything()))),
        Route("/api/sample", _of_run(runs, _sample)),
        Route("/api/log", _of_run(runs, lambda run, _: PlainTextResponse(run.tail()))),
        Route("/api/config", _of_run(runs, lambda run, _: PlainTextResponse(run.configuration()))),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])])


def serve(runs: Runs, port: int, started: Callable[[str], object]) -> None:
    """Serves until Ctrl-C.

    Args:
        runs: What is shown.
        port: Of the loopback address; 0 takes a free one.
        started: Is told the page's address.

    Raises:
        OSError: The port is taken.
    """
    import socket

    import uvicorn

    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
        listening.listen()  # who comes before the server has begun waits, and is not turned away
        started(f"http://{HOST}:{listening.getsockname()[1]}")
        # Long logs are read while the browser still opens.
        threading.Thread(target=lambda: [run.everything() for run in runs.found().values()], daemon=True).start()
        config = uvicorn.Config(application(runs), log_level="warning", access_log=False, server_header=False)
        uvicorn.Server(config).run(sockets=[listening])


def _page(request: Request) -> Response:
    return FileResponse(ASSETS / "watch.html", headers=HEADERS)


def _asset(request: Request) -> Response:
    name = request.path_params["name"]
    return FileResponse(ASSETS / name, headers=HEADERS) if name in FILES else _nothing("file")


def _list(runs: Runs, request: Request) -> Response:
    return JSONResponse([{"name": name, **run.state()} for name, run in runs.found().items()], headers=HEADERS)


def _of_run(runs: Runs, answer: Callable[[WatchedRun, Request], Response]) -> Callable[[Request], Response]:
    """Makes an endpoint of one run, which the request names as the list of runs does."""

    def endpoint(request: Request) -> Response:
        run = runs.found().get(request.query_params.get("run", ""))
        response = answer(run, request) if run else _nothing("run")
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return endpoint


def _sample(run: WatchedRun, request: Request) -> Response:
    step = request.query_params.get("step", "")
    path = run.sample(int(step)) if step.isascii() and step.isdecimal() and len(step) <= 12 else None
    # A grid is written once; the page may keep those that it has.
    return FileResponse(path, headers={"cache-control": "private, max-age=3600"}) if path else _nothing("sample")


def _nothing(what: str) -> Response:
    return PlainTextResponse(f"no such {what}", status_code=404, headers=HEADERS)
