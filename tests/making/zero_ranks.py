"""Ranks of a training run, and what may befall one: test_zero.py forks them from a process that has imported all this.

Launchers start this file as they would start train.py, with the fault in ZERO_FAULT.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from danceopd_kernels import fp8_quantize_rowwise

from danceopd.cli.parser import main
from danceopd.models.fp8 import Fp8Linear
from danceopd.training import checkpoints as state
from danceopd.training.loop import Trainer
from danceopd.training.zero import engine as zero
from danceopd.training.zero import launch  # noqa: F401 (imported before the fork)


def install(fault: dict) -> None:
    """Let this process do as told at a place: {"what", "rank" (all without), "step", "place", ...}."""
    what, rank = fault.get("what"), int(os.environ.get("RANK", "0"))
    if what is None or rank != fault.get("rank", rank):
        return
    if what == "watch_replica":
        watch_replica(Path(fault["report"]))
    elif what == "nan":
        nan_gradients(fault["step"])
    elif what == "full":  # the kernel refuses to write more into a file than this
        at(fault, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY)))
    elif what == "raise":
        at(fault, fail)
    elif what == "memory":  # more than a process can have
        at(fault, lambda: torch.empty(2**50))
    elif what == "kill":
        at(fault, lambda: os.kill(os.getpid(), signal.SIGKILL))
    elif what == "stop":
        at(fault, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    elif what == "sleep":
        at(fault, lambda: time.sleep(3600))
    elif what == "slow":
        at({**fault, "place": "rollout"}, lambda: time.sleep(1.0))
    elif what == "missing":  # this rank's machine has not the file
        forget(fault["path"])
    elif what == "without_deepspeed":
        sys.modules["deepspeed"] = None
    else:
        raise ValueError(what)


def fail() -> None:
    raise RuntimeError("a fault of this rank")


def at(fault: dict, act) -> None:
    """act() where a step of the run comes to a place: rollout, backward, update; write, manifest of a checkpoint."""
    place, step = fault["place"], fault.get("step")
    if place in ("write", "manifest"):
        owner, name = (state, "save_file") if place == "write" else (state.json, "dump")
        original = getattr(owner, name)

        def written(*args, **kwargs):
            if place == "write":
                original(*args, **kwargs)
                target = Path(args[1])
                ours = f".step-{step:08d}" in str(target)
                if ours:  # a torn write: half of the file is there
                    os.truncate(target, target.stat().st_size // 2)
            else:
                ours = args[0].get("step") == step
                original(*args, **kwargs)
            if ours:
                act()

        setattr(owner, name, written)
        return
    names = {"rollout": (Trainer, "provided"), "backward": (None, "backward"), "update": (None, "step")}
    owner, name = names[place]
    if owner:
        original = getattr(owner, name)

        def provided(self, *args):
            if step in (None, self.step):
                act()
            return original(self, *args)

        setattr(owner, name, provided)
        return
    begin = Trainer.__init__

    def init(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        original = getattr(self.engine, name)

        def called(*given):
            if self.step == step:
                act()
            return original(*given)

        setattr(self.engine, name, called)

    Trainer.__init__ = init


def nan_gradients(step: int) -> None:
    """At one step this rank's gradient of one single parameter is not a number."""
    begin = Trainer.__init__

    def init(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        p = list(self.parts.student.parameters())[-1]
        p.register_hook(lambda gradient: gradient * float("nan") if self.step == step else gradient)

    Trainer.__init__ = init


def forget(path: str) -> None:
    """A file that is not there, for whoever looks."""
    real = Path.is_file

    def is_file(self):
        return str(self) != path and real(self)

    Path.is_file = is_file


def watch_replica(report: Path) -> None:
    """After each update compare the replica with the student that DeepSpeed gathers; write which parameters differ."""
    update, seen = zero.Zero.step, []

    def step(self, rate, *more):
        result = update(self, rate, *more)
        wrong = []
        for name, module in self.replica.named_modules():
            for leaf, copied in module.named_parameters(recurse=False):
                full = f"{name}.{leaf}".lstrip(".")
                with deepspeed.zero.GatheredParameters([self.parameters[full]]):
                    weights = self.parameters[full].detach().clone()
                if isinstance(module, Fp8Linear) and leaf == "weight":
                    weights, scale = fp8_quantize_rowwise(weights)
                    if not torch.equal(module.weight_scale, scale):
                        wrong.append(f"{full}_scale")
                # What a forward of the student computes with: autocast casts for these layers, and for no others.
                if self.engine.torch_autocast_enabled() and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                    weights = weights.to(torch.bfloat16)
                if copied.dtype != weights.dtype or not torch.equal(copied.float(), weights.float()):
                    wrong.append(full)
        seen.append(wrong)
        (report / f"replica-{self.ranks.rank}.json").write_text(json.dumps(seen))
        return result

    zero.Zero.step = step


def forked(rank: int, size: int, port: int, folder: Path, arguments: list[str], fault: dict) -> None:
    """One rank of a run, in a process that was forked for it; what it prints goes to files of the folder."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    if size:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
    install(fault)
    sys.exit(main(["train", *arguments]))


if __name__ == "__main__":
    install(json.loads(os.environ.get("ZERO_FAULT", "{}")))
    sys.exit(main(["train", *sys.argv[1:]]))
