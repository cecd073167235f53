"""A run in the processes that deepspeed or torchrun started: they find each other, and one that hangs is named."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from pydantic import ValidationError

from danceopd.support.errors import UserError
from danceopd.support.memory import ran_out
from danceopd.support.ranks import ALONE, Ranks
from danceopd.training.zero.settings import read_deepspeed

HUNG = 4  # exit status

LOADING = 4  # times the patience: what the start of a run may take, and what a collective waits

DEFAULT = {"zero_optimization": {"stage": 3}}  # DeepSpeed's settings where several ranks were started without any


def begin(deepspeed_config: Path | None, device: str, patience: float) -> tuple[Ranks, dict | None]:
    """Joins the processes that were started, which find each other here.

    Args:
        deepspeed_config: The file of DeepSpeed's settings; None without one.
        device: The configuration's training.device.
        patience: Seconds after which a rank that does nothing counts as hung.

    Returns:
        This process among the others, and DeepSpeed's settings; ALONE and None for one process without settings.

    Raises:
        UserError: DeepSpeed is not installed or refuses the settings, or the ranks cannot find each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 and deepspeed_config is None:
        return ALONE, None
    settings = DEFAULT if deepspeed_config is None else read_deepspeed(deepspeed_config)
    cuda = device != "cpu" and torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    try:
        import deepspeed
    except ModuleNotFoundError:
        raise UserError("several processes need DeepSpeed; pip install 'danceopd[deepspeed]'") from None
    deepspeed.utils.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    if deepspeed_config is not None:
        _check(settings, deepspeed_config)
    # Its sums in shared memory must be compiled first, and where a rank dies the others spin there for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Who hangs is named by the watch; the collectives of the others must not give up before.
    waiting = timedelta(seconds=LOADING * patience)
    try:
        deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=waiting, verbose=False)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        place, reason = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(error).splitlines()[0]
        raise UserError(
            f"the ranks cannot find each other at {place}: {reason} If another run has this port, give the launcher "
            "another --master_port"
        ) from None
    return Ranks(dist.get_rank(), dist.get_world_size()), settings


def guard(watch: "Watch", folder: Path, function: Callable, *args):
    """Calls a function; where it fails, its traceback goes to this rank's own file, in `ranks` of the run's folder.

    Where it fails because another rank has ended, that is said in place of what the connection to it said.

    Args:
        watch: This rank's.
        folder: The run's folder.
        function: Is called with args.

    Returns:
        What the function returns.
    """
    ranks = watch.ranks
    try:
        return function(*args)
    except BaseException as error:
        if ranks.size > 1 and not isinstance(error, KeyboardInterrupt):
            path = folder / "ranks" / f"rank-{ranks.rank:05d}.log"
            with contextlib.suppress(OSError):  # the disk may be what failed
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(traceback.format_exc(), encoding="utf-8")
            if _lost_connection(error) and (said := _without(watch, path.parent, error)):
                print(said, file=sys.stderr, flush=True)
                raise SystemExit(1) from None
            if not isinstance(error, UserError):
                said = f"rank {ranks.rank} on {socket.gethostname()} failed; see {path}: {error}\n"
                print(said, end="", file=sys.stderr, flush=True)  # in one piece among the others'
                if ranks.rank or ran_out(error):  # of rank 0 else the trace is shown too
                    raise SystemExit(1) from None
        raise
    finally:
        watch.close()


def _lost_connection(error: BaseException) -> bool:
    """Tells whether an error is one of the connection to another rank: gloo's are plain RuntimeErrors."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text))


def _without(watch: "Watch", logs: Path, error: BaseException) -> str | None:
    """Says which rank has ended, why if its file tells, and how to go on; None if all live that this rank can see."""
    here, rank, gone = socket.gethostname(), watch.ranks.rank, watch.ended()
    elsewhere = sorted({host for host, _ in watch.processes.values()} - {here})
    if gone:
        said = [f"rank {one}" + (f" ({why})" if (why := _reason(logs, one, watch.began)) else "") for one in gone]
        ended = f"{', '.join(said)} {'has' if len(gone) == 1 else 'have'} ended on {here}, without which rank {rank}"
    elif elsewhere:
        ended = (
            f"the connection to a rank on {', '.join(elsewhere)} is lost ({str(error).splitlines()[0]}); look there "
            f"for why it has ended; without it rank {rank}"
        )
    else:
        return None
    return (
        f"{ended} cannot go on. A rank's file in {logs} says why it failed; there is none if it was killed, as the "
        "system does where memory is short. Run the same command again to go on from the newest checkpoint"
    )


def _reason(logs: Path, rank: int, began: float) -> str:
    """Reads what a rank failed by: the last line of its file, if it is of this run; empty if there is none."""
    path = logs / f"rank-{rank:05d}.log"
    with contextlib.suppress(OSError):
        if path.stat().st_mtime >= began - 1:  # file systems tell whole seconds
            return (path.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1][:200]
    return ""


class Watch:
    """Tells all ranks where each of them is; threads name those that stay behind, and end the run.

    The threads also ask this rank to stop, as a TERM signal does, where the launcher is gone: deepspeed's passes no
    signal on.

    Args:
        ranks: The processes of the run.
        patience: Seconds without any rank's moving; the start may take longer.
    """

    def __init__(self, ranks: Ranks, patience: float):
        self.ranks, self.patience, self.passed, self.place = ranks, patience, 0, ""
        self.together = False  # whether all have begun
        self.told: dict[int, str] = {}
        self.processes: dict[int, tuple[str, int]] = {}  # of all ranks: host and number
        self.moved = self.answered = time.monotonic()
        self.began = time.time()
        self.over, self.threads = threading.Event(), []
        if ranks.size > 1:
            # A connection of its own: while a collective waits for a rank on the common one, nobody else is answered.
            self.store = dist.distributed_c10d._get_default_store().clone()
            self.store.set(f"process/{ranks.rank}", f"{os.getpid()} {socket.gethostname()}")
            self.at("the start")
            self.threads = [threading.Thread(target=work, daemon=True) for work in (self._ask, self._judge)]
            for thread in self.threads:
                thread.start()

    def close(self) -> None:
        """Ends the threads: one that is in the store's C++ when Python ends aborts the process."""
        self.over.set()
        for thread in self.threads:
            thread.join(2.0)  # an answer never comes where the process that keeps them has stopped

    def at(self, place: str) -> None:
        """Tells that this rank comes to a place; all ranks come to the same places, in the same order.

        Args:
            place: What the place is called.
        """
        self.together |= self.place.startswith("the update")  # has ended, which it does on no rank without the others
        self.passed, self.place = self.passed + 1, place
        if self.ranks.size > 1:
            self.store.set(f"watch/{self.ranks.rank}", f"{self.passed} {socket.gethostname()} {place}")

    def ended(self, seconds: float = 2.0) -> list[int]:
        """Finds the ranks of this machine whose process has ended.

        Args:
            seconds: How long it waits for one: a process that is killed loses its connections a moment before.
        """
        until, here = time.monotonic() + seconds, socket.gethostname()
        while True:
            gone = [
                rank for rank, (host, number) in list(self.processes.items()) if host == here and _has_ended(number)
            ]
            if gone or time.monotonic() > until:
                return sorted(gone)
            time.sleep(0.05)

    def _ask(self) -> None:
        """Keeps what the ranks tell; the answer never comes where the process that keeps it has stopped."""
        keys = [f"watch/{rank}" for rank in range(self.ranks.size)]
        with contextlib.suppress(RuntimeError, ValueError):  # that process has ended
            while not self.over.is_set():
                told = {rank: self.store.get(key).decode() for rank, key in enumerate(keys) if self.store.check([key])}
                for rank in told.keys() - self.processes.keys():
                    number, host = self.store.get(f"process/{rank}").decode().split(" ", 1)
                    self.processes[rank] = host, int(number)
                self.answered = time.monotonic()
                if told != self.told:
                    self.moved, self.told = self.answered, told  # in this order: the judge looks in between
                self.over.wait(self._pause())

    def _judge(self) -> None:
        """Ends the run where no rank has moved for too long, and stops this rank where the launcher is gone."""
        patience = self.patience + min(5 * self.ranks.rank, 60)  # the first that is alive speaks
        launchers, asked = _launchers(), False
        while not self.over.wait(self._pause()):
            told, now = self.told, time.monotonic()
            loading = not self.together and (not told or any(text.startswith("1 ") for text in told.values()))
            if now - self.moved > patience * (LOADING if loading else 1):
                print(hung(told, self.patience, now - self.answered < patience), file=sys.stderr, flush=True)
                os._exit(HUNG)
            if not asked and any(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in launchers):
                asked = True
                os.kill(os.getpid(), signal.SIGTERM)

    def _pause(self) -> float:
        """Returns the seconds between two looks."""
        return min(1.0, self.patience / 10)


def _has_ended(number: int) -> bool:
    """Tells whether a process is no more, or waits for its launcher to take notice."""
    try:
        return psutil.Process(number).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _launchers() -> list[psutil.Process]:
    """Finds the processes that a launcher is: torchrun's one, or deepspeed's two."""
    found, words = [], ("torchrun", "torch.distributed", "deepspeed.launcher.launch")
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents()[:2]:
            if not any(word in " ".join(process.cmdline()) for word in words):
                break
            found.append(process)
            words = ("deepspeed",) if "deepspeed.launcher.launch" in process.cmdline() else ()
    return found


def hung(told: dict[int, str], patience: float, answers: bool) -> str:
    """Says which ranks are furthest behind, and what to do.

    Args:
        told: "number host place" by rank.
        patience: Seconds that no rank has moved for.
        answers: Whether rank 0, that keeps what is told, answers.

    Returns:
        The message, in lines.
    """
    numbers = {rank: int(text.split()[0]) for rank, text in told.items()}
    behind = [rank for rank, number in numbers.items() if number == min(numbers.values())] if answers else [0]
    lines = [f"no rank has moved for {patience:g} s:"]
    for rank in behind:
        _, host, place = told.get(rank, "0 another host the start").split(" ", 2)
        lines.append(f"rank {rank} on {host} {'hangs' if answers else 'does not answer; it was last seen'} in {place}")
    ahead = sorted({told[rank].split(" ", 2)[2] for rank in told if rank not in behind})
    if ahead and answers:
        lines.append(f"the others wait in {', '.join(ahead)}")
    return "\n  ".join(lines) + "\nrun the same command again to go on from the newest checkpoint"


def _check(settings: dict, path: Path) -> None:
    """Raises UserError for settings that DeepSpeed refuses."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig({**settings, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise UserError(f"{path}: DeepSpeed refuses {'; '.join(problems)}") from None
    except (DeepSpeedConfigError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise UserError(f"{path}: DeepSpeed refuses it: {str(error).splitlines()[0]}") from None
