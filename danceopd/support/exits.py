"""Turns what a command raises into a message and an exit status."""

import logging
import os
import signal
import socket
import sys

from danceopd.support.errors import Terminated, UserError
from danceopd.support.memory import ran_out

# What pip installs optional packages by; a command that needs one says so.
EXTRAS = dict.fromkeys(("diffusers", "transformers", "accelerate"), "danceopd[models]")
EXTRAS |= {"datasets": "danceopd[datasets]", "deepspeed": "danceopd[deepspeed]", "triton": "danceopd[triton]"}
EXTRAS |= dict.fromkeys(("torchao", "bitsandbytes"), "danceopd[8bit]")
EXTRAS |= dict.fromkeys(("starlette", "uvicorn"), "danceopd[watch]")
EXTRAS |= dict.fromkeys(("wandb", "trackio"), "danceopd[trackers]")
EXTRAS |= {"torchvision": "danceopd[models]", "ftfy": "danceopd[prx]", "flash_attn": "danceopd[flash-attn]"}


def guarded(function, args) -> int:
    """Runs a command; what a user can mend is printed without a trace.

    Of several ranks one prints; before they have found each other, one of each machine.

    Args:
        function: Takes `args` and returns an exit status or None.
        args: The command's.

    Returns:
        The exit status: 2 for a UserError, 130 after Ctrl-C and 143 after a TERM signal.
    """
    rank = int(os.environ.get("RANK", "0"))
    first = rank == 0
    try:
        return function(args) or 0
    except KeyboardInterrupt as error:
        if "RANK" in os.environ:  # a launcher sends it to all once one has ended
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if first:
            print("\nstopped; run the same command again to go on", file=sys.stderr)
        return 143 if isinstance(error, Terminated) else 130
    except (UserError, OSError) as error:
        return _refused(error, rank)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:  # a fault of ours
            raise
        return _refused(f"this command needs {package}, which is not installed: pip install '{EXTRAS[package]}'", rank)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        why = str(error).splitlines()[0]
        return _refused(
            f"memory ran out: {why} Take smaller pictures or fewer at a time, or --offload where --help has it", rank
        )


def _refused(message: object, rank: int) -> int:
    """Prints why a command ends, once for all ranks; returns its exit status."""
    if rank == 0:
        print(f"danceopd: {message}", file=sys.stderr)
    elif os.environ.get("LOCAL_RANK") == "0":
        import torch.distributed as dist

        if not dist.is_initialized():
            print(f"danceopd: rank {rank} on {socket.gethostname()}: {message}", file=sys.stderr)
    return 2


def quieten() -> None:
    """Silences what libraries say while they are imported, of parts that nobody asked for and that are missing."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("torchao", "torch.utils._pytree", "DeepSpeed", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
