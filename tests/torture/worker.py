"""Gives damaged files to the product, one after another, in a process that watches itself.

Called as `python worker.py TARGET FIRST COUNT FOLDER`; it writes the number of what it is at into FOLDER/at, and prints
a line of JSON for each mutation that was not taken or refused as it should be.
"""

import contextlib
import io
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

HANG = 10.0  # seconds of a processor
IMPORTS = 600.0  # seconds that the good files may take, whose first reader imports much

MEMORY = 2**30  # bytes that a small file may take
MOST = 8 * 2**30  # of address space over what the libraries have, for the machine's sake


class Hang(BaseException):
    """An input took longer than HANG."""


class Guard:
    """Notes what the product does outside of a folder: writing, starting a program, connecting elsewhere, a secret."""

    def __init__(self, folder: Path, secret: Path):
        self.folder, self.secret, self.on, self.seen = str(folder.resolve()), str(secret.resolve()), False, []
        sys.addaudithook(self._look)

    def _look(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            writes = (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            self._place("writes" if writes else "reads", args[0], writes)
        elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "shutil.rmtree"):
            for path in args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]:
                if isinstance(path, str | bytes | os.PathLike):
                    self._place(event, path, True)
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pty.spawn"):
            self.seen.append(f"{event} {args[0]!r}")
        elif event == "socket.connect" and args[1][0] != "127.0.0.1":
            self.seen.append(f"{event} {args[1]!r}")

    def _place(self, what: str, path, writes) -> None:
        name = os.path.realpath(os.fsdecode(path))
        inside = name == self.folder or name.startswith(self.folder + os.sep)
        if name == self.secret or (writes and not inside and not name.startswith("/dev/")):
            self.seen.append(f"{what} {name}")


def memory(key: str) -> int:
    """Returns a line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def attempt(run, path: Path, name: str, expected: tuple, seconds: float = HANG) -> str | None:
    """Runs one input, for so many seconds of a processor; returns what is wrong with how it went."""
    from danceopd.support.errors import UserError

    signal.setitimer(signal.ITIMER_PROF, seconds)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = run(path, name)
    except (UserError, *expected):
        code = None
    except SystemExit as error:
        code = error.code
    except Hang:
        return f"hangs: over {seconds:g} s of a processor"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in where if "danceopd" in f.filename]
        return f"traceback: {type(error).__name__}: {str(error)[:150]} ({' '.join(ours[-3:])})"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if "Traceback (most recent call last)" in printed.getvalue():
        return f"prints a traceback: {printed.getvalue()[-300:]}"
    return f"ends with the status {code}" if code not in (None, 0, 1, 2) else None


def main(name: str, first: int, count: int, folder: Path) -> None:
    """Makes the target's good files, sees that they are taken, and then damages one of them each time."""
    from mutations import damaged
    from targets import TARGETS

    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no line of JSON
    target = TARGETS[name]
    place, secret = folder / "case", folder / "outside" / "secret.png"
    place.mkdir(parents=True, exist_ok=True)
    secret.parent.mkdir(exist_ok=True)
    if not (folder / "made").exists():
        target.make(place)
        (folder / "made").touch()
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(secret)
    os.chdir(place)
    files = {path: (place / path).read_bytes() for path in target.files(place)}
    guard, run = Guard(place, secret), target.start(place)

    def hang(*_):
        raise Hang

    signal.signal(signal.SIGPROF, hang)
    for file in files:
        if trouble := attempt(run, place, file, (), IMPORTS):
            raise SystemExit(f"{name}: {file} is not taken as it was made: {trouble}")

    room = memory("VmSize") + MOST
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    names = sorted(files)
    with open(folder / "at", "w") as at, open("/proc/self/clear_refs", "w") as clear:
        for number in range(first, first + count):
            at.seek(0)
            at.write(f"{number:9d}")
            at.flush()
            dice = random.Random(f"{name} {number}")
            file = dice.choice(names)
            data = damaged(files[file], file, dice)
            (place / file).write_bytes(data)
            clear.write("5")  # the peak begins anew
            clear.flush()
            before, began, guard.seen, guard.on = memory("VmRSS"), time.monotonic(), [], True
            trouble = attempt(run, place, file, target.expected)
            guard.on, took = False, time.monotonic() - began
            grown = memory("VmHWM") - before
            if not trouble and guard.seen:
                trouble = f"leaves its folder: {guard.seen[0]}"
            if not trouble and grown > MEMORY:
                trouble = f"takes {grown / 2**20:.0f} MiB for a file of {len(data)} bytes"
            (place / file).write_bytes(files[file])
            target.clean(place, files)
            line = {"number": number, "file": file, "trouble": trouble} if trouble else {}
            print(json.dumps({**line, "seconds": round(took, 3), "memory": grown}), file=told, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    os._exit(0)  # what libraries do at the end takes its time, and nothing is left to be written
