"""Weights on disk: one safetensors file per network, its configuration in the header."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from danceopd.backbones.dit import DiT, DiTConfig
from danceopd.errors import UserError

SHIPPED = Path(__file__).parent / "world" / "assets" / "sources"


def shipped_sources() -> list[str]:
    """The names of the networks that ship with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))


def resolve_weights(weights: str) -> Path:
    """The file of an embedded network by its name ("base", "t2i", ...), or the path itself.

    Raises FileNotFoundError that lists the names.
    """
    if weights in shipped_sources():
        return SHIPPED / f"{weights}.safetensors"
    if not Path(weights).is_file():
        raise FileNotFoundError(f"no file {weights!r}, nor an embedded network ({', '.join(shipped_sources())})")
    return Path(weights)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one whole: temporary file, fsync, rename."""
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


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which stands at `path` once the block has ended, and not at all if it fails.

    Raises UserError where something is there already, and for a safetensors file that the block could not write.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{path} is there already; remove it, or give another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
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
    """Wait until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def save_model(model: DiT, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the weights in `dtype`, with the network's configuration as metadata, atomically."""
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(path, save(weights, {"config": json.dumps(model.config.to_dict())}))


def read_config(path: Path) -> DiTConfig:
    """A network's configuration, from its file's header alone. Raises as load_model does."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return DiTConfig(**json.loads(file.metadata()["config"]))
    except Exception as error:  # safetensors and JSON errors alike: the file is of no use
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a whole DanceOPD network ({error}); train or copy it again")


def load_model(path: Path) -> DiT:
    """Load a network written by save_model, in float32 and evaluation mode.

    Raises FileNotFoundError for a missing file and UserError for one that is damaged or not a DiT.
    """
    config = read_config(path)
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        model = DiT(config)
        model.load_state_dict(weights)
    except Exception as error:  # safetensors and shape errors alike
        raise _damaged(path, error) from error
    return model.eval()
