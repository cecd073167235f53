"""A run in the processes that deepspeed or torchrun started: they find each other, and one that hangs is named."""

import os
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from danceopd.errors import UserError
from danceopd.training.ranks import ALONE, Ranks
from danceopd.training.zero import read_deepspeed

HUNG = 4  # exit status
DEFAULT = {"zero_optimization": {"stage": 3}}  # DeepSpeed's settings where several ranks were started without any


def begin(deepspeed_config: Path | None, device: str, patience: float) -> tuple[Ranks, dict | None]:
    """(this process among those that were started, DeepSpeed's settings): (ALONE, None) for one without settings.

    device: of the configuration; patience: seconds after which a rank that does nothing counts as hung.
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
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Who hangs is named by the watch; the collectives of the others must not give up before.
    deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=timedelta(seconds=4 * patience), verbose=False)
    return Ranks(dist.get_rank(), dist.get_world_size()), settings


def guard(ranks: Ranks, folder: Path, function: Callable, *args):
    """function(*args); where it fails, its traceback goes to this rank's own file too."""
    try:
        return function(*args)
    except BaseException as error:
        if ranks.size > 1 and not isinstance(error, KeyboardInterrupt):
            path = folder / "ranks" / f"rank-{ranks.rank:05d}.log"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(traceback.format_exc(), encoding="utf-8")
            if ranks.rank and not isinstance(error, UserError):
                print(f"rank {ranks.rank} on {socket.gethostname()} failed; see {path}: {error}", file=sys.stderr)
        raise


class Watch:
    """Where each rank is, told to all; a thread of each names those that stay behind and ends the run.

    patience: seconds without any rank's moving.
    """

    def __init__(self, ranks: Ranks, patience: float):
        self.ranks, self.patience, self.passed, self.names = ranks, patience, 0, {}
        if ranks.size > 1:
            self.store = dist.distributed_c10d._get_default_store()
            self.at("the start")
            threading.Thread(target=self._look, daemon=True).start()

    def at(self, place: str) -> None:
        """This rank comes to a place. All ranks come to the same places, in the same order."""
        self.passed += 1
        if self.ranks.size > 1:
            self.store.set(f"watch/{self.ranks.rank}", f"{self.passed} {socket.gethostname()} {place}")

    def _look(self) -> None:
        seen, since = {}, time.monotonic()
        patience = self.patience + min(5 * self.ranks.rank, 60)  # the first that is alive speaks
        while True:
            time.sleep(min(1.0, self.patience / 10))
            try:
                keys = [f"watch/{rank}" for rank in range(self.ranks.size)]
                told = {rank: self.store.get(key).decode() for rank, key in enumerate(keys) if self.store.check([key])}
            except (RuntimeError, ValueError):  # the run is over, or rank 0 is gone and the launcher ends the others
                return
            if told != seen:
                seen, since = told, time.monotonic()
            elif time.monotonic() - since > patience and len(told) == self.ranks.size:
                print(hung(told, self.patience), file=sys.stderr, flush=True)
                os._exit(HUNG)


def hung(told: dict[int, str], patience: float) -> str:
    """Which ranks are furthest behind; told: by rank "number host place"."""
    numbers = {rank: int(text.split()[0]) for rank, text in told.items()}
    last = min(numbers.values())
    behind = [rank for rank, number in numbers.items() if number == last]
    lines = [f"no rank has moved for {patience:g} s:"]
    for rank in behind:
        _, host, place = told[rank].split(" ", 2)
        lines.append(f"rank {rank} on {host} hangs in {place}")
    ahead = sorted({told[rank].split(" ", 2)[2] for rank in told if rank not in behind})
    if ahead:
        lines.append(f"the others wait in {', '.join(ahead)}")
    return "\n  ".join(lines) + "\nrun the same command again to go on from the newest checkpoint"
