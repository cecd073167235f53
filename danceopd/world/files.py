"""Keeps embedded networks on disk: one safetensors file for each, its configuration in the header."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.world.dit import DiT, DiTConfig

SHIPPED = Path(__file__).parent / "assets" / "sources"


def shipped_sources() -> list[str]:
    """Returns the names of the networks that ship with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))


def resolve_weights(weights: str) -> Path:
    """Returns the file of an embedded network by its name ("base", "t2i", ...), or the path itself.

    Raises:
        FileNotFoundError: There is neither; the names are listed.
    """
    if weights in shipped_sources():
        return SHIPPED / f"{weights}.safetensors"
    if not Path(weights).is_file():
        raise FileNotFoundError(f"no file {weights!r}, nor an embedded network ({', '.join(shipped_sources())})")
    return Path(weights)


def save_model(model: DiT, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the weights in `dtype`, with the network's configuration as metadata, atomically."""
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(path, save(weights, {"config": json.dumps(model.config.to_dict())}))


def read_config(path: Path) -> DiTConfig:
    """Reads a network's configuration from its file's header alone; raises as load_model does."""
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
    """Loads a network written by save_model, in float32 and evaluation mode.

    Raises:
        FileNotFoundError: There is no such file.
        UserError: It is damaged or not a DiT.
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
