"""Opens safetensors files, and says of those that cannot be read what they are."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from danceopd.support.errors import UserError
from danceopd.support.texts import parse_object

MOST = 100_000_000  # bytes of a header: the format's own limit

POINTER = b"version https://git-lfs.github.com/spec/"  # begins what Git LFS puts in a file's place

TAIL = 2**16  # bytes at a file's end that are no weights where all of them are zero

# What else lies under a wrong name, by how it begins.
KINDS = {
    b"GGUF": "is a GGUF file, whose quantized weights are not read; get it as safetensors",
    b"\x1f\x8b": "is a gzip archive; unpack it",
    b"7z\xbc\xaf": "is a 7-Zip archive; unpack it",
}

BITS = {f"{kind}{bits}": bits for kind in "FIU" for bits in (8, 16, 32, 64)} | {"BF16": 16, "BOOL": 8}


@contextmanager
def opened(path: Path | str) -> Iterator[safe_open]:
    """Opens a safetensors file for torch.

    Raises:
        UserError: It cannot be read; also where the block finds that.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise damaged(Path(path), error) from error


def read_header(path: Path | str) -> dict[str, tuple[str, torch.Size]]:
    """Reads what a safetensors file says of its tensors, and checks that it is as long as it says.

    Returns:
        {name: (dtype as the format names it, shape)}.

    Raises:
        UserError: It cannot be read, is cut off, or is no safetensors file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > MOST or 8 + length > size:
                raise ValueError("its header is longer than the file")
            header = parse_object(file.read(length).rstrip(b" "))
        header.pop("__metadata__", None)
        found = {name: (entry["dtype"], torch.Size(entry["shape"])) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
        wrong = [n for n, (kind, shape) in found.items() if kind in BITS and BITS[kind] * prod(shape) != 8 * sizes[n]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise damaged(path, error) from None
    if wrong or 8 + length + end != size:
        raise damaged(path, f"{wrong[0]} has not the bytes of its shape" if wrong else "its parts do not fill it")
    return found


def check_finite(path: Path | str, name: str, value: torch.Tensor) -> None:
    """Raises UserError where a tensor of a file or a folder holds NaN or infinity.

    The smallest and the largest number tell, in a tenth of the time of `isfinite().all()`.
    """
    if not value.is_floating_point() or not value.numel():
        return
    ends = torch.aminmax(value.float() if value.itemsize == 1 else value.detach())
    if not torch.stack(ends).isfinite().all():
        raise UserError(
            f"{path}: {name} holds numbers that are not finite (NaN or infinity), so nothing can be learned from it; "
            "copy it again, or take an earlier file of its training"
        )


def damaged(path: Path, error: object) -> UserError:
    """Returns the error of a file that cannot be read as safetensors: what it is, as far as it shows, and what to do.

    Args:
        path: The file.
        error: What was said when it was read.
    """
    try:
        with open(path, "rb") as file:
            begin, size = file.read(512), os.fstat(file.fileno()).st_size
    except OSError as trouble:
        return UserError(f"{path}: cannot be read: {trouble.strerror or trouble}")
    return UserError(f"{path}: {_what(path, begin, size) or f'cannot be read as safetensors, copy it again: {error}'}")


def _what(path: Path, begin: bytes, size: int) -> str | None:
    """Says what a file is that is no whole safetensors file, and what to do; None where that does not show."""
    if size == 0:
        return "cannot be read as safetensors: it is empty, of 0 bytes; copy it again"
    if begin.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "holds pickled weights under a .safetensors name, which may run code when read; get it as safetensors"
    if other := _other(path, begin, size, "safetensors"):
        return other
    length = int.from_bytes(begin[:8], "little")
    if length <= MOST and begin[8:9] in (b"{", b""):
        if 8 + length > size:
            return f"is cut off within its header, at {size} bytes; the download did not end: copy it again"
        try:
            with open(path, "rb") as file:
                file.seek(8)
                header = json.loads(file.read(length))
            end = 8 + length + max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        if end > size:
            return f"cannot be read as safetensors: it is cut off at {size} of {end} bytes; copy it again"
    return None


def in_its_place(path: Path) -> str | None:
    """Says what lies in the place of a JSON file that cannot be read, and what to do; None where it is such a file."""
    try:
        with open(path, "rb") as file:
            begin, size = file.read(512), os.fstat(file.fileno()).st_size
    except OSError:
        return None
    return "is empty, of 0 bytes; copy it again" if size == 0 else _other(path, begin, size, "JSON")


def _other(path: Path, begin: bytes, size: int, kind: str) -> str | None:
    """Says what a download left in the place of a file of a kind; None where it is nothing that is known."""
    if begin.startswith(POINTER):
        words = begin.decode(errors="replace").split()
        whole = f" of {words[words.index('size') + 1]} bytes" if "size" in words[:-1] else ""
        return (
            f"is a Git LFS pointer of {size} bytes in place of the file{whole}; fetch it: run `git lfs pull` in "
            f"{path.parent}, with Git LFS installed, or download the file itself"
        )
    if begin.lstrip().startswith(b"<"):
        return f"is a web page and no {kind} file, as a download without access leaves it; download it again"
    if not begin.strip(b"\0"):
        return "begins with zeros, as a download leaves it that did not end; copy it again"
    text = begin.decode(errors="ignore")
    if kind != "JSON" and len(text) > len(begin) - 4 and all(c.isprintable() or c.isspace() for c in text):
        said = " ".join(text.split())[:80]
        return f"is text and no {kind} file, as a download without access leaves it ({said!r}); download it again"
    return next((what for first, what in KINDS.items() if begin.startswith(first)), None)


def ends_in_zeros(path: Path) -> bool:
    """Tells whether a file ends in zeros alone, as a download leaves it that took its place before it came."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - TAIL))
        return size > TAIL and not file.read().strip(b"\0")
