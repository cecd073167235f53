"""Writing files where the file system or the disk refuses something."""

import errno
import os
import stat

import pytest

from danceopd.support.files import new_folder, sync, write_atomic


@pytest.fixture
def without_folder_sync(monkeypatch):
    """A file system that answers an fsync of a folder by the given number; the files and folders that were asked."""
    real, asked = os.fsync, {"files": 0, "folders": 0}

    def set_up(number):
        def fsync(descriptor):
            folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            asked["folders" if folder else "files"] += 1
            if folder:
                raise OSError(number, os.strerror(number))
            return real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        return asked

    return set_up


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_an_fsync_of_folders(tmp_path, without_folder_sync, number):
    asked = without_folder_sync(number)
    write_atomic(tmp_path / "in" / "a", b"1")
    with new_folder(tmp_path / "whole") as folder:
        (folder / "b").write_bytes(b"2")
    assert (tmp_path / "in" / "a").read_bytes() == b"1"
    assert (tmp_path / "whole" / "b").read_bytes() == b"2"
    assert asked["files"] == 2
    assert asked["folders"] >= 2


def test_a_failing_disk_is_not_passed_over(tmp_path, without_folder_sync, monkeypatch):
    without_folder_sync(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_atomic(tmp_path / "a", b"1")
    (tmp_path / "b").write_bytes(b"1")

    def refuse(_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):  # of a file it is no matter of the file system
        sync(tmp_path / "b")


def test_a_folder_that_cannot_be_opened_but_written(tmp_path, monkeypatch):
    real = os.open

    def opened(path, flags, *rest, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", opened)
    write_atomic(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_what_a_killed_process_left_beside_a_folder_goes(tmp_path):
    """And nothing else: neither what a living process writes, nor what is of another name."""
    gone = max(int(name) for name in os.listdir("/proc") if name.isdigit())
    while os.path.exists(f"/proc/{gone}"):
        gone += 1
    there = [f".out.{gone}.tmp", f".out.{os.getppid()}.tmp", ".out.mine.tmp", f".other.{gone}.tmp", "out.txt"]
    for name in there:
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_bytes(b"1")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *there[1:]}
