"""Keeps embedded networks on disk: one safetensors file for each, its configuration in the header."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.hints import did_you_mean
from danceopd.support.paths import near_path
from danceopd.support.texts import parse_json
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
        near = did_you_mean(weights, shipped_sources(), "")
        raise FileNotFoundError(f"no file {weights!r}, nor an embedded network ({', '.join(shipped_sources())}){near}")
    return Path(weights)


def save_model(model: DiT, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the weights in `dtype`, with the network's configuration as metadata, atomically."""
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(path, save(weights, {"config": json.dumps(model.config.to_dict())}))


def read_config(path: Path) -> DiTConfig:
    """Reads a network's configuration from its file's header, which must be that network's; raises as load_model."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}{near_path(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            config = DiTConfig(**parse_json(file.metadata()["config"]))
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        _check_shapes(config, shapes)
        return config
    except Exception as error:  # safetensors and JSON errors alike: the file is of no use
        raise _damaged(path, error) from error


def is_lora(path: Path) -> bool:
    """Tells whether a file holds a LoRA of a model, which is no embedded network; what is damaged holds none."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return any(part in name for name in file.keys() for part in ("lora", "lokr", "hada"))  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def _check_shapes(config: DiTConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError where a configuration is not of a network with these tensors; no memory is taken for it."""
    for key, value in config.to_dict().items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{key} of its configuration is {value!r}, not a number from 1 on")
    if config.depth > len(shapes):
        raise ValueError(f"its configuration says {config.depth} blocks, but it holds {len(shapes)} tensors")
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in DiT(config).state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            there, said = (str(of[name]) if name in of else "no such tensor" for of in (shapes, expected))
            raise ValueError(f"{name}: it holds {there}, by its configuration {said}")


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
