"""Reads LoRA files in any layout that diffusers converts, and writes adapters as it does."""

import json
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import nn

from danceopd.models.lora_algebra import Lora, named_factors
from danceopd.support.errors import UserError

FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # of PEFT and of diffusers

FACTOR = re.compile(r"(.+?)\.(?:lora_(A|B|down|up)|lora\.(down|up))(?:\.default)?\.weight")

# Their initialisation changes the base, so that the file alone does not say what was trained.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")


@torch.inference_mode(False)  # reading asks for gradients
def load_lora(
    path: str | Path, transformer: nn.Module, pipeline_class: type, scale: float = 1.0, header_only: bool = False
) -> Lora:
    """Reads a LoRA by module of a transformer, in float32; nothing in the file is left out.

    Args:
        path: A PEFT folder, or a safetensors file (or the folder of one) in any layout that the pipeline class converts
            by its lora_state_dict: diffusers', kohya's, ComfyUI's, ai-toolkit's.
        transformer: Whose layers it changes, on any device.
        pipeline_class: Diffusers' class of the pipeline.
        scale: Multiplies alpha / rank.
        header_only: Whether no tensor is read: the factors are on the meta device then, with scales that say nothing.

    Returns:
        {module: (A [rank, in], B [out, rank], scale)}.

    Raises:
        UserError: Files are missing or corrupt, the class cannot convert the layout, or a key is no factor of a linear
            layer of the transformer.
        RuntimeError: With header_only, where the conversion depends on values.
    """
    file = _find(Path(path))
    raw, config = _read(file, header_only)
    raw = _fold_alphas(file, raw, config)
    if any(_module(key, transformer) is None for key in raw):
        raw = _convert(file, raw, pipeline_class)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in raw.items():
        if not key.endswith(".alpha"):  # folded in
            name, side = _module(key, transformer) or (None, None)
            if name is None:
                unknown = [k for k in raw if not k.endswith(".alpha") and _module(k, transformer) is None]
                raise _unknown(file, unknown, type(transformer).__name__)
            pairs.setdefault(name, {})[side] = value
    lora = {}
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise UserError(f"{file}: {name} has only one of its two factors; the file is incomplete")
        a, b = pair["A"], pair["B"]
        out, width = transformer.get_submodule(name).weight.shape
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or a.shape[1] != width or len(b) != out:
            raise UserError(
                f"{file}: {name} is {width} -> {out} in {type(transformer).__name__}, the LoRA's factors are "
                f"{list(a.shape)} and {list(b.shape)}; it was trained for another model"
            )
        lora[name] = (a, b, scale * _configured_scale(file, config, name, len(a)))
    return lora


def lora_parameters(path: str | Path, transformer: nn.Module, pipeline_class: type) -> tuple[int, bool]:
    """Counts a LoRA's parameters by its file's header alone.

    Returns:
        The number, and whether its keys were checked: they are not in a layout whose conversion depends on values.

    Raises:
        UserError: As load_lora.
    """
    try:
        lora = load_lora(path, transformer, pipeline_class, header_only=True)
    except RuntimeError:
        raw, _ = _read(_find(Path(path)), header_only=True)
        return sum(value.numel() for key, value in raw.items() if not key.endswith(".alpha")), False
    return sum(a.numel() + b.numel() for a, b, _ in lora.values()), True


def _find(path: Path) -> Path:
    """Returns the safetensors file that path is or holds."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path}: a LoRA must be a safetensors file; files of other kinds may run code when read")
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no LoRA there, neither a safetensors file nor a folder with one")
    files = sorted(path.glob("*.safetensors"))
    files = [f for f in files if f.name in FILES] or files
    if len(files) != 1:
        found = ", ".join(f.name for f in files) or "none"
        raise UserError(f"{path}: a LoRA folder holds one safetensors file, found {found}; name the file itself")
    return files[0]


def _read(file: Path, header_only: bool) -> tuple[dict[str, torch.Tensor], dict | None]:
    """Reads (tensors in float32, PEFT's configuration by its own names or None)."""
    try:
        with safe_open(file, framework="pt") as opened:
            read = partial(_described, opened) if header_only else opened.get_tensor
            raw = {key: read(key) for key in opened.keys()}  # noqa: SIM118
            config = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors, copy it again: {error}") from error
    if not raw:
        raise UserError(f"{file}: holds no tensors")
    beside = file.with_name("adapter_config.json")
    try:
        if file.name == FILES[0]:
            config = beside.read_text()
        config = json.loads(config) if config else None
    except FileNotFoundError:
        raise UserError(f"{file.parent}: no adapter_config.json beside {file.name}; it holds the scale") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: its configuration cannot be read as JSON: {error}") from error
    if config is not None and any(key.startswith("transformer.") for key in config):
        config = {k.removeprefix("transformer."): v for k, v in config.items() if k.startswith("transformer.")}
    if config is not None and config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{file}: its kind is {config['peft_type']}; only LORA is taken")
    if config is not None and str(config.get("init_lora_weights")).startswith(CHANGES_BASE):
        raise UserError(
            f"{file}: trained with init_lora_weights={config['init_lora_weights']}, which changes the base model; "
            "convert it into a plain LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )
    quantized = [key for key, value in raw.items() if not (value.is_floating_point() or key.endswith(".alpha"))]
    if quantized:
        raise UserError(f"{file}: {_first(quantized)}: not floating point; only LoRAs that are not quantized are taken")
    return {key: value.float() for key, value in raw.items()}, config


def _described(opened, key: str) -> torch.Tensor:
    """Makes a tensor of the shape that a file's header gives; an alpha, whose value nothing depends on, is 1."""
    entry = opened.get_slice(key)
    if key.endswith(".alpha"):
        return torch.ones(entry.get_shape())
    dtype = torch.float32 if entry.get_dtype().startswith(("F", "BF")) else torch.uint8
    return torch.empty(entry.get_shape(), dtype=dtype, device="meta")


def _fold_alphas(file: Path, raw: dict[str, torch.Tensor], config: dict | None) -> dict[str, torch.Tensor]:
    """Multiplies every A by its alpha / rank; the alphas stay as the rank, since some converters want them.

    Converters do the same for most alphas, but not for all.
    """
    result, downs = dict(raw), {}
    for key in raw:
        match = FACTOR.fullmatch(key)
        if match and (match[2] or match[3]) in ("A", "down"):
            downs[match[1]] = key
    alphas = [key for key in raw if key.endswith(".alpha")]
    alone = [key for key in alphas if key.removesuffix(".alpha") not in downs or raw[key].numel() != 1]
    if alone:
        raise UserError(f"{file}: {_first(alone)}: no number beside a pair of LoRA factors; the file is incomplete")
    if alphas and config is not None:
        raise UserError(f"{file}: has alphas ({_first(alphas)}) and a PEFT configuration too; remove one of them")
    for key in alphas:
        down = downs[key.removesuffix(".alpha")]
        rank = len(raw[down])
        result[down] = raw[down] * (raw[key].item() / rank)
        result[key] = torch.tensor(float(rank))
    return result


def _convert(file: Path, raw: dict[str, torch.Tensor], pipeline_class: type) -> dict[str, torch.Tensor]:
    """Converts by diffusers; a UserError for what it leaves out, found by the gradient that does not come back."""
    with torch.enable_grad():
        leaves = {key: value.detach().requires_grad_() for key, value in raw.items() if not key.endswith(".alpha")}
        # Copies, since some converters multiply in place.
        copies = {key: leaves[key].clone() if key in leaves else value for key, value in raw.items()}
        try:
            converted = pipeline_class.lora_state_dict(copies)
        except Exception as error:  # of any kind: the converters assume what they expect
            if "meta tensor" in str(error):  # read by its header alone, and the converter asks for values
                raise
            raise UserError(
                f"{file}: diffusers cannot convert this LoRA for {pipeline_class.__name__}: "
                f"{str(error).strip()[:400]}; check that it was trained for this model"
            ) from error
        kept = [value.sum() for value in converted.values() if value.requires_grad]
        gradients = torch.autograd.grad(sum(kept), leaves.values(), allow_unused=True) if kept else [None] * len(leaves)
    lost = [key for (key, leaf), grad in zip(leaves.items(), gradients, strict=True) if grad is None and leaf.any()]
    if lost:
        raise _unknown(file, lost, pipeline_class.__name__)
    return {key: value.detach() for key, value in converted.items()}


def _module(key: str, transformer: nn.Module) -> tuple[str, str] | None:
    """Returns (linear layer, "A" or "B") of a key as diffusers and PEFT name them.

    Alphas by their layer, others None.
    """
    name = next(iter(convert_unet_state_dict_to_peft({key: None})))  # diffusers' own older names
    if name.endswith(".alpha"):
        name, side = name.removesuffix(".alpha"), "alpha"
    elif match := FACTOR.fullmatch(name):
        name, side = match[1], "A" if (match[2] or match[3]) in ("A", "down") else "B"
    else:
        return None
    name = name.removeprefix("base_model.model.").removeprefix("transformer.")
    try:
        return (name, side) if isinstance(transformer.get_submodule(name), nn.Linear) else None
    except AttributeError:
        return None


def _configured_scale(file: Path, config: dict | None, name: str, rank: int) -> float:
    """Returns alpha / rank, or alpha over its root, as PEFT works it out for a module; 1 without a configuration."""
    if config is None:
        return 1.0
    patterns, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    expected = patterns.get(get_pattern_key(patterns, name), config.get("r", 8))
    if expected != rank:
        raise UserError(f"{file}: the configuration gives {name} rank {expected}, its factors have {rank}")
    alpha = alphas.get(get_pattern_key(alphas, name), config.get("lora_alpha", 8))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _first(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _unknown(file: Path, keys: Sequence[str], name: str) -> UserError:
    return UserError(
        f"{file}: cannot take all of this LoRA: {_first(keys)} would be left out, being no LoRA factors of linear "
        f"layers of {name}'s transformer. Check that it was trained for this model; train it without text encoders, "
        "biases, norms and DoRA, or remove these keys from the file"
    )


def save_lora(lora: Lora, folder: Path, pipeline_class: type) -> Path:
    """Writes an adapter as the pipeline's own save_lora_weights does, so that load_lora_weights takes it; atomically.

    Raises:
        UserError: It cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILES[1]
    with TemporaryDirectory(dir=folder, prefix=".") as temporary:
        try:
            pipeline_class.save_lora_weights(
                temporary, transformer_lora_layers=named_factors(lora), safe_serialization=True
            )
        except SafetensorError as error:  # a full disk, which for safetensors is no OSError
            raise UserError(f"cannot write {path}: {error}; make room, or give another place") from error
        written = Path(temporary) / FILES[1]
        with open(written, "rb") as file:
            os.fsync(file.fileno())
        os.replace(written, path)
    return path
