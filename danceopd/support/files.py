"""Writes files so that a process that dies leaves either the old or the new."""

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import psutil
from safetensors import SafetensorError

from danceopd.support.errors import UserError


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that a crash leaves the old one or the new one whole: temporary file, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # of an open file it does not name it
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def check_writable(folder: Path) -> None:
    """Checks that a folder could be made and written, by a file in the nearest one that is there; none is left.

    Raises:
        UserError: It could not.
    """
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there} is no folder, so nothing can be written into it; choose another place")
    try:  # by permissions root may write anywhere, and so onto file systems that take no file
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {there}: {error.strerror}; choose another place") from None


# What file systems without an fsync of folders answer.
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EISDIR}


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to write into, which stands at `path` once the block has ended, and not at all if it fails.

    Raises:
        UserError: Something is there already, or the block could not write a safetensors file.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{path} is there already; remove it, or give another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = left.name.split(".")[-2]
        if number.isdigit() and (left == temporary or not psutil.pid_exists(int(number))):  # of one that was killed
            shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for written in (*temporary.iterdir(), temporary):
            sync(written)
        os.replace(temporary, path)
    except SafetensorError as error:  # a full disk, which for safetensors is no OSError
        raise UserError(f"cannot write {path}: {error}; make room, or give another place") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk; a folder only where its file system can."""
    try:
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:  # some network mounts have no fsync of a folder, and some do not even open one
        if error.errno not in NO_FOLDER_SYNC or not path.is_dir():
            raise
