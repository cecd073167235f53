"""Parts of a diffusers pipeline's folder: never from the network, whole or not at all, errors that name the path."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from danceopd.errors import UserError


def read_json(path: Path | str) -> dict:
    """A JSON file of a pipeline. Raises UserError if it is not there or is damaged."""
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}; give the folder of a whole diffusers pipeline")
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}; give the folder of a whole diffusers pipeline")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again") from None


def class_name_of(folder: Path | str, served: tuple[str, ...] = ()) -> str:
    """The pipeline's class named in a folder's model_index.json.

    Raises UserError if there is none, and if it is not one of `served`, where these are given.
    """
    name = read_json(Path(folder) / "model_index.json").get("_class_name")
    if served and name not in served:
        raise UserError(f"{folder} holds a {name}, not one of {', '.join(served)}")
    return str(name)


def load(cls: type, path: Path | str, **options):
    """cls.from_pretrained of a folder. Raises UserError if it is not there or cannot be loaded."""
    path = Path(path)
    if not path.is_dir():  # else taken for the name of a repository
        raise UserError(f"there is no folder {path}; give the folder of a whole diffusers pipeline")
    try:
        return cls.from_pretrained(str(path), local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be loaded as {cls.__name__}: {error}") from error


def load_model(cls: type, path: Path | str, dtype: torch.dtype) -> nn.Module:
    """A model of diffusers or transformers from its folder, in eval mode on the CPU.

    Raises UserError as load does, and for weights of another class of diffusers or with some missing.
    """
    path = Path(path)
    config = read_json(path / "config.json")
    if config.get("_class_name", cls.__name__) != cls.__name__:
        raise UserError(f"{path} holds a {config['_class_name']}, not a {cls.__name__}")
    model, info = load(cls, path, dtype=dtype, use_safetensors=True, output_loading_info=True)
    if info["missing_keys"]:  # the libraries only warn, and leave them random
        missing = sorted(info["missing_keys"])
        raise UserError(f"{path}: the weights lack {len(missing)} tensors, such as {missing[0]}; copy them again")
    return model.eval()


def load_transformer(cls: type, folder: Path | str, dtype: torch.dtype) -> nn.Module:
    """load_model of a pipeline folder's transformer, or of a transformer folder itself."""
    return load_model(cls, transformer_folder(folder), dtype)


def transformer_folder(folder: Path | str) -> Path:
    """A pipeline folder's transformer, or a transformer folder itself."""
    folder = Path(folder)
    return folder if (folder / "config.json").is_file() else folder / "transformer"


def check_weights(folder: Path | str) -> None:
    """A transformer's or VAE's weights are all there; none is opened. Raises UserError that names the missing ones."""
    from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME

    folder = transformer_folder(folder)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = [SAFETENSORS_WEIGHTS_NAME]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged ({error}); copy it again") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"no weights {', '.join(missing[:3])}{more} in {folder}; copy the folder again")


def picture_codec(folder: Path | str, device: torch.device | str, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """(encode, decode) of a pipeline's AutoencoderKL, without gradient, both on `device` in `dtype`.

    encode: pictures [n, 3, H, W] in [-1, 1] -> latents [n, C, h, w], the mode of the posterior, shifted and scaled;
    decode: the inverse. Raises UserError for a missing VAE.
    """
    from diffusers import AutoencoderKL  # takes its time, and the embedded network's commands read folders too

    vae = load_model(AutoencoderKL, Path(folder) / "vae", dtype).to(device)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor

    @torch.no_grad()
    def encode(pictures: torch.Tensor) -> torch.Tensor:
        return (vae.encode(pictures.to(device, dtype)).latent_dist.mode() - shift) * scale

    @torch.no_grad()
    def decode(latents: torch.Tensor) -> torch.Tensor:
        return vae.decode(latents.to(device, dtype) / scale + shift, return_dict=False)[0].clamp(-1, 1)

    return encode, decode


def load_tokenizer(cls: type, path: Path | str):
    """A tokenizer from its folder. Raises UserError as load does, and for missing files, which would make it empty."""
    path = Path(path)
    files = {kind: (path / file).is_file() for kind, file in cls.vocab_files_names.items()}
    if path.is_dir() and not files.pop("tokenizer_file", False) and not all(files.values()):
        raise UserError(f"{path}: lacks {' or '.join(cls.vocab_files_names.values())}; copy the whole folder")
    return load(cls, path)
