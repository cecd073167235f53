"""A judge to ask: a real server that answers well or badly."""

import pytest
from judge_server import SMALL, Server

from danceopd.evaluation.gedit import judge
from danceopd.evaluation.gedit.endpoint import KEY_VARIABLE


@pytest.fixture
def serve(monkeypatch):
    """serve(behave): a server whose behave(handler, body, count) answers."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setattr(judge, "SHOWN_AREA", SMALL)  # PNGs of 512 x 512 take most of a test's time
    servers = []

    def start(behave) -> Server:
        servers.append(Server(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
