"""What a rank says where another one has ended."""

import contextlib
import os
import socket
import subprocess
import sys

import pytest
import torch

from danceopd.support.ranks import ALONE, Ranks
from danceopd.training.zero.launch import Watch, guard

CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:31415"


@pytest.fixture
def other():
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def watch(other):
    """Rank 0's, of two on this machine, as it is once both have told of themselves."""
    made = Watch(ALONE, 60)
    made.ranks = Ranks(0, 2)
    made.processes = {0: (socket.gethostname(), os.getpid()), 1: (socket.gethostname(), other.pid)}
    return made


def fails(message):
    raise RuntimeError(message)


@pytest.mark.parametrize("function", [lambda: None, lambda: fails("a fault of this rank")])
def test_no_thread_is_left_when_a_rank_is_done(function, tmp_path, monkeypatch):
    """One that is in the store's C++ when Python ends would abort the process."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    watch = Watch(Ranks(0, 2), 60)
    assert all(thread.is_alive() for thread in watch.threads)
    with contextlib.suppress(RuntimeError):
        guard(watch, tmp_path, function)
    assert len(watch.threads) == 2
    assert not any(thread.is_alive() for thread in watch.threads)


def test_a_rank_that_was_killed_is_named(watch, other, tmp_path, capfd):
    assert watch.ended(0) == []
    other.kill()  # and not waited for: its launcher may not have taken notice yet
    with pytest.raises(SystemExit) as ended:
        guard(watch, tmp_path, fails, CLOSED)
    assert ended.value.code == 1
    said = capfd.readouterr().err
    assert f"rank 1 has ended on {socket.gethostname()}, without which rank 0 cannot go on" in said
    assert "Run the same command again to go on from the newest checkpoint" in said
    assert "gloo" not in said
    assert "Connection closed by peer" in (tmp_path / "ranks" / "rank-00000.log").read_text()
    other.wait()
    assert watch.ended(0) == [1]


def test_what_is_this_ranks_own_fault_stays_so(watch, other, tmp_path, capfd):
    other.kill()
    with pytest.raises(RuntimeError, match="a fault of this rank"):
        guard(watch, tmp_path, fails, "a fault of this rank")
    assert "has ended" not in capfd.readouterr().err


def test_a_connection_that_is_lost_to_a_rank_that_lives_is_told_as_it_is(watch, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(watch, "ended", lambda: Watch.ended(watch, 0.1))
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        guard(watch, tmp_path, fails, CLOSED)
    assert "rank 0 on" in capfd.readouterr().err


def test_a_connection_lost_to_another_machine_names_it(watch, tmp_path, capfd):
    watch.processes[1] = ("far", os.getpid())
    with pytest.raises(SystemExit):
        guard(watch, tmp_path, fails, CLOSED)
    said = capfd.readouterr().err
    assert f"the connection to a rank on far is lost ({CLOSED}); look there for why it has ended" in said
    assert "without it rank 0 cannot go on" in said
    assert "Traceback" not in said
    assert CLOSED in (tmp_path / "ranks" / "rank-00000.log").read_text()
