"""Reads LoRA files in any layout that diffusers converts, and writes adapters as it does."""

import inspect
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LoraBaseMixin
from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from danceopd.models.lora_algebra import Lora, named_factors
from danceopd.models.lora_formats import (
    CHANGE,
    CONVERTED,
    MERGED,
    as_factors,
    decomposed,
    full,
    kind_of,
    refused,
    without_magnitudes,
)
from danceopd.models.lora_names import ENCODERS, PREFIXES, in_order, known_layers, layers_of, nearest, whose
from danceopd.models.tensor_files import check_finite, opened, read_header
from danceopd.models.weights import Weights
from danceopd.support.errors import UserError
from danceopd.support.hub import near
from danceopd.support.texts import parse_object

FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # of PEFT and of diffusers

# Where files name their base: this program's, PEFT's, the model specification's, kohya's and ai-toolkit's.
BASES = ("base_model", "base_model_name_or_path", "modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")

BEING_WRITTEN = ".new-"  # begins the name of a folder that a file is written in

BIASES = (".diff_b", ".bias", ".b_norm")  # ends of changes of biases, which trainers write as zeros too

WITHOUT = "leave these keys out of the file, as docs/loras.md shows"

INCOMPLETE = "the file is incomplete, copy it again"

TAKEN = ("LORA", "LOKR", "LOHA")  # kinds of PEFT's adapters

FACTOR = re.compile(r"(.+?)\.(?:lora_(A|B|down|up)|lora\.(down|up))(?:\.default)?\.weight")

# Their initialisation changes the base, so that the file alone does not say what was trained.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")


# Long: a third of it says what its arguments are.
@torch.inference_mode(False)  # reading asks for gradients
def load_lora(
    path: str | Path,
    transformer: nn.Module,
    pipeline_class: type,
    scale: float = 1.0,
    header_only: bool = False,
    base: Weights | None = None,
) -> Lora:
    """Reads a LoRA by module of a transformer, in float32; nothing in the file is left out.

    Args:
        path: A PEFT folder, or a safetensors file (or the folder of one) with LoRA, DoRA, LoKr, LoHa or full changes of
            weights, whose names are those of lora_names.known_layers, or in a layout that the pipeline class converts
            by its lora_state_dict.
        transformer: Whose layers it changes, on any device.
        pipeline_class: Diffusers' class of the pipeline.
        scale: Multiplies alpha / rank.
        header_only: Whether no tensor is read: the factors are on the meta device then, with scales that say nothing.
        base: The weights that it lies on, which a DoRA's change depends on; the transformer's own if not given.

    Returns:
        {module: (A [rank, in], B [out, rank], scale)}. Of what has no low rank, one of them is a unit matrix.

    Raises:
        UserError: Files are missing or corrupt, hold numbers that are not finite or a format that is no change of
            linear weights, the class cannot convert the layout, a key is no factor of a linear layer of the
            transformer, or a DoRA's base is not at hand.
        RuntimeError: With header_only, where the conversion depends on values.
    """
    file = lora_file(Path(path))
    raw, config = _read(file, header_only)
    if found := refused(raw):
        raise UserError(f"{file}: {found[0]} ({_first(found[1])})")
    known = known_layers(transformer)
    raw, magnitudes = without_magnitudes(raw)
    magnitudes = _by_layers(file, magnitudes, transformer, known)
    try:
        raw = as_factors(raw)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    pairs = _pairs_of(file, _fold_alphas(file, raw, config), pipeline_class, transformer, known)
    lora, fused = {}, []
    for (name, layers), pair in pairs.items():
        if len(pair) != 2:
            raise UserError(f"{file}: {name} has only one of its two factors; {INCOMPLETE}")
        a, b, factor = pair["A"], pair["B"], _configured_scale(file, config, name, pair["A"])
        rows = _rows(file, name, layers, transformer, a, b)
        magnitude = magnitudes.pop(layers, None)
        if magnitude is not None:
            b, a = _decomposed(file, layers, transformer, base, factor * b @ a, magnitude)
            factor = 1.0
        made = _split(a, b, rows, layers, scale * factor)
        if len(layers) > 1:
            fused.append((name, made))
        else:
            lora |= made
    if magnitudes:
        layer = next(iter(magnitudes))[0]
        raise UserError(f"{file}: {layer} has a magnitude and no factors of the same layer; {INCOMPLETE}")
    for name, made in fused:
        _add_fused(file, name, made, lora)
    if not lora:
        raise UserError(f"{file}: holds no factors of any layer; train or copy it again")
    return lora


def _pairs_of(
    file: Path, raw: dict[str, torch.Tensor], pipeline_class: type, transformer: nn.Module, known: dict
) -> dict[tuple, dict[str, torch.Tensor]]:
    """Collects {(name, layers): {"A" or "B": factor}}, by known names where there are such, else by diffusers."""
    named = {key: _named(key, known) for key in raw}
    odd = {_once(key): raw[key] for key, found in named.items() if found is None}
    odd = {key: value for key, value in odd.items() if not key.endswith(BIASES) or value.any()}
    pairs = _pairs(file, ((key, found, raw[key]) for key, found in named.items() if found))
    if any(not key.endswith(".alpha") for key in odd):
        converted = _convert(file, odd, pipeline_class, transformer, known)
        named = {key: _named(key, known) for key in converted}
        unknown = [key for key, found in named.items() if found is None]
        if unknown:
            raise _unknown(file, unknown, transformer, known, of=odd)
        pairs |= _pairs(file, ((key, found, converted[key]) for key, found in named.items()))
    return pairs


def _by_layers(
    file: Path, magnitudes: dict[str, torch.Tensor], transformer: nn.Module, known: dict
) -> dict[tuple[str, ...], torch.Tensor]:
    """Names a DoRA's magnitudes by the layers that they are of."""
    found = {}
    for stem, value in magnitudes.items():
        layers = layers_of(next(iter(convert_unet_state_dict_to_peft({stem: None}))), known)
        if layers is None:
            raise _unknown(file, [stem], transformer, known)
        once, turned = in_order(layers, value)
        found[once] = value if len(value) == 1 else turned  # norms of columns stand in one row
    return found


def _decomposed(file: Path, layers: Sequence[str], transformer: nn.Module, base: Weights | None, change, magnitude):
    """Returns (B, A) of what a DoRA adds to layers, whose rows are one matrix's in its file."""
    if change.is_meta:
        return full(change)
    weights = []
    for layer in layers:
        own = transformer.get_submodule(layer).weight
        if base is not None:
            weights.append(base.tensor(f"{layer}.weight").float())
        elif own.is_meta or own.dtype.itemsize < 2:
            raise UserError(f"{file}: is a DoRA, whose change depends on the base's own weights; these are not at hand")
        else:
            weights.append(own.detach().float().cpu())
    try:
        return full(decomposed(torch.cat(weights), change, magnitude))
    except ValueError as error:
        raise UserError(f"{file}: {layers[0]}: {error}; it was trained for another model") from None


def lora_parameters(path: str | Path, transformer: nn.Module, pipeline_class: type) -> tuple[int, str]:
    """Counts a LoRA's parameters as load_lora would give them, with one tensor of the file in memory at a time.

    The whole file is in memory only where its layout's conversion depends on values.

    Returns:
        The number, and the name of the file's format, such as "LoKr", with the number of its layers without a change.

    Raises:
        UserError: As load_lora; or the file changes nothing.
    """
    file = lora_file(Path(path))
    try:
        lora = load_lora(path, transformer, pipeline_class, header_only=True)
        zero: dict[str, bool] = {}  # by layer: whether one of its factors is
        with opened(file) as stored:
            for key in stored.keys():  # noqa: SIM118
                value = stored.get_tensor(key)
                check_finite(file, key, value)
                match = FACTOR.fullmatch(key) or CHANGE.fullmatch(key)
                layer = match[1] if match else key.removesuffix(".alpha")
                zero[layer] = zero.get(layer, False) or not value.any()
        if not any(scale for _, _, scale in lora.values()):  # by its configuration's alpha
            zero = dict.fromkeys(zero, True)
    except RuntimeError:
        lora = load_lora(path, transformer, pipeline_class)
        zero = {name: not (a.any() and b.any()) for name, (a, b, _) in lora.items()}
    if all(zero.values()):
        raise UserError(
            f"{file}: changes nothing: in every layer a factor or alpha is zero, as before training; train it first"
        )
    kind, still = kind_of(read_header(file)), sum(zero.values())
    note = f", without a change in {still} of {len(zero)} layers" if still else ""
    return sum(a.numel() + b.numel() for a, b, _ in lora.values()), kind + note


def trained_for(path: str | Path) -> str | None:
    """Says which model a LoRA names as the one that it was trained on; None where it names none.

    Raises:
        UserError: There is no LoRA.
    """
    file = lora_file(Path(path))
    with opened(file) as stored:
        metadata = stored.metadata() or {}
    beside = file.with_name("adapter_config.json")
    if file.name == FILES[0] and beside.is_file():
        try:
            metadata = {**metadata, **parse_object(beside.read_text(encoding="utf-8"))}
        except (OSError, ValueError):
            return None  # said when it is read
    found = (metadata.get(key) for key in BASES)
    return next((str(value) for value in found if value and not Path(str(value)).is_absolute()), None)


def lora_file(path: Path) -> Path:
    """Finds the safetensors file that a path is or holds.

    Raises:
        UserError: There is none, or there are several.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path}: a LoRA must be a safetensors file; files of other kinds may run code when read")
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no LoRA there, neither a safetensors file nor a folder with one{near(path)}")
    files = sorted(path.glob("*.safetensors"))
    files = [f for f in files if f.name in FILES] or files
    if len(files) == 1:
        return files[0]
    deeper = sorted(file for name in FILES for file in path.glob(f"*/{name}"))
    if (path / "model_index.json").exists() or (path / "config.json").exists():
        do = "it is a model's folder: give it as the source's weights"
    elif files:
        do = "name the file itself"
    elif not deeper:
        do = "give a LoRA's file, or the folder that holds it"
    else:
        do = f"its folders have {_first([str(file.relative_to(path)) for file in deeper])}: name one of these"
    found = _first([file.name for file in files]) or "none"
    raise UserError(f"{path}: a LoRA folder holds one safetensors file, found {found}; {do}")


def _read(file: Path, header_only: bool) -> tuple[dict[str, torch.Tensor], dict | None]:
    """Reads (tensors in float32, PEFT's configuration by its own names or None)."""
    with opened(file) as stored:
        read = partial(_described, stored) if header_only else stored.get_tensor
        raw = {key: read(key) for key in stored.keys()}  # noqa: SIM118
        config = (stored.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    for key, value in raw.items() if not header_only else ():
        check_finite(file, key, value)
    if not raw:
        raise UserError(f"{file}: holds no tensors; train or copy it again")
    beside = file.with_name("adapter_config.json")
    try:
        if file.name == FILES[0]:
            config = beside.read_text(encoding="utf-8")
        config = parse_object(config) if config else None
    except FileNotFoundError:
        raise UserError(
            f"{file.parent}: no adapter_config.json beside {file.name}; copy it there, it has the scale"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: its configuration cannot be read as JSON: {error}; copy it again") from error
    if config is not None and any(key.startswith("transformer.") for key in config):
        config = {k.removeprefix("transformer."): v for k, v in config.items() if k.startswith("transformer.")}
    if config is not None and config.get("peft_type", "LORA") not in TAKEN:
        raise UserError(f"{file}: is a {config['peft_type']} of PEFT, of whose kinds {TAKEN} are taken; {CONVERTED}")
    if config is not None and (odd := _odd_setting(config)):
        raise UserError(f"{file}: its configuration {odd}; write it again with PEFT, or copy it again")
    if config is not None and str(config.get("init_lora_weights")).startswith(CHANGES_BASE):
        raise UserError(
            f"{file}: trained with init_lora_weights={config['init_lora_weights']}, which changes the base model; "
            "convert it into a plain LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )
    quantized = [key for key, value in raw.items() if not (value.is_floating_point() or key.endswith(".alpha"))]
    if quantized:
        raise UserError(
            f"{file}: {_first(quantized)}: not floating point; give the file that this quantized one was made from"
        )
    return {key: value.float() for key, value in raw.items()}, config


def _odd_setting(config: dict) -> str | None:
    """Says which of the settings that give a scale is none that PEFT writes; None where all are."""
    for key in ("r", "lora_alpha", "alpha"):
        if not _is_number(config.get(key, 1)):
            return f"has {key} {config[key]!r}, which is no number"
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(_is_number, patterns.values())):
            return f"has in {key} what are no numbers by patterns of names"
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                return f"has in {key} {pattern!r}, which is no pattern ({error})"
    ranks = [config.get("r", 8), *(config.get("rank_pattern") or {}).values()]
    return next((f"gives a rank of {rank}" for rank in ranks if rank <= 0), None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


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
        raise UserError(f"{file}: {_first(alone)}: no number beside a pair of LoRA factors; {INCOMPLETE}")
    if alphas and config is not None:
        raise UserError(f"{file}: has alphas ({_first(alphas)}) and a PEFT configuration too; remove one of them")
    for key in alphas:
        down = downs[key.removesuffix(".alpha")]
        rank = len(raw[down])
        result[down] = raw[down] * (raw[key].item() / rank)
        result[key] = torch.tensor(float(rank))
    return result


def _convert(
    file: Path, raw: dict[str, torch.Tensor], pipeline_class: type, transformer: nn.Module, known: dict
) -> dict[str, torch.Tensor]:
    """Converts by diffusers; a UserError for what it leaves out, found by the gradient that does not come back."""
    with torch.enable_grad():
        leaves = {key: value.detach().requires_grad_() for key, value in raw.items() if not key.endswith(".alpha")}
        # Copies, since some converters multiply in place.
        copies = {key: leaves[key].clone() if key in leaves else value for key, value in raw.items()}
        try:
            converted = _loader(pipeline_class).lora_state_dict(copies)
        except Exception as error:  # of any kind: the converters assume what they expect
            if "meta tensor" in str(error):  # read by its header alone, and the converter asks for values
                raise
            raise _unknown(file, list(leaves), transformer, known) from error
        kept = [value.sum() for value in converted.values() if value.requires_grad]
        gradients = torch.autograd.grad(sum(kept), leaves.values(), allow_unused=True) if kept else [None] * len(leaves)
    lost = [key for (key, leaf), grad in zip(leaves.items(), gradients, strict=True) if grad is None and leaf.any()]
    if lost:
        raise _unknown(file, lost, transformer, known)
    return {key: value.detach() for key, value in converted.items() if not key.endswith(".alpha")}


def _named(key: str, known: dict[str, tuple[str, ...]]) -> tuple[str, tuple[str, ...], str] | None:
    """Returns (name, layers, "A", "B" or "alpha") of a key that names layers of the transformer; None for others."""
    name = next(iter(convert_unet_state_dict_to_peft({key: None})))  # diffusers' own older names
    if name.endswith(".alpha"):
        name, side = name.removesuffix(".alpha"), "alpha"
    elif match := FACTOR.fullmatch(name):
        name, side = match[1], "A" if (match[2] or match[3]) in ("A", "down") else "B"
    else:
        return None
    layers = layers_of(name, known)
    return layers and (layers[0] if len(layers) == 1 else name, layers, side)


def _pairs(file: Path, named: Iterable[tuple]) -> dict[tuple, dict[str, torch.Tensor]]:
    """Collects {(name, layers): {"A" or "B": factor}}; a UserError for one that is there by two names."""
    pairs: dict[tuple, dict[str, torch.Tensor]] = {}
    keys: dict[tuple, str] = {}
    for key, (name, layers, side), value in named:
        if side == "alpha":  # folded in
            continue
        once, value = in_order(layers, value) if side == "B" else (layers[: len(set(layers))], value)
        place = name if once == layers else once[0], once
        if other := keys.get((*place, side)):
            raise UserError(
                f"{file}: {other} and {key} are the same factor of {place[0]}; remove one of them from the file"
            )
        keys[*place, side] = key
        pairs.setdefault(place, {})[side] = value
    return pairs


def _once(key: str) -> str:
    """Returns a key with a prefix that stands there twice once."""
    for prefix in PREFIXES:
        while key.startswith(2 * prefix):
            key = key.removeprefix(prefix)
    return key


def _rows(file: Path, name: str, layers: Sequence[str], transformer: nn.Module, a, b) -> list[int]:
    """Returns the numbers of rows of B that are each layer's; a UserError for factors of other shapes."""
    shapes = [transformer.get_submodule(layer).weight.shape for layer in layers]
    rows, width = [shape[0] for shape in shapes], shapes[0][1]
    if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or a.shape[1] != width or len(b) != sum(rows):
        raise UserError(
            f"{file}: {name} is {width} -> {sum(rows)} in {type(transformer).__name__}, the LoRA's factors are "
            f"{list(a.shape)} and {list(b.shape)}; it was trained for another model"
        )
    return rows


def _split(a: torch.Tensor, b: torch.Tensor, rows: list[int], layers: Sequence[str], scale: float) -> Lora:
    """Gives each layer of a fused one its rows of B, with that part of the rank which changes them.

    Where a file has the ranks of several layers beside each other, these come apart again.
    """
    if len(layers) == 1 or b.is_meta:
        return {layer: (a, part, scale) for layer, part in zip(layers, b.split(rows), strict=True)}
    made = {}
    for layer, part in zip(layers, b.split(rows), strict=True):
        if (used := part.any(0)).any():
            made[layer] = (a, part, scale) if used.all() else (a[used], part[:, used], scale)
    return made


def _add_fused(file: Path, name: str, made: Lora, lora: Lora) -> None:
    """Adds the layers of a fused one; those that a file names themselves too must have the same change there."""
    for layer, (a, b, scale) in made.items():
        if layer in lora and not a.is_meta:
            other_a, other_b, other = lora[layer]
            if not torch.allclose(scale * b @ a, other * other_b @ other_a, rtol=1e-4, atol=1e-6):
                raise UserError(
                    f"{file}: {name} and {layer} are the same layer, and the file changes it in two ways; remove one"
                )
        lora.setdefault(layer, (a, b, scale))


def _configured_scale(file: Path, config: dict | None, name: str, a: torch.Tensor) -> float:
    """Returns alpha / rank, or alpha over its root, as PEFT works it out for a module; 1 without a configuration."""
    if config is None:
        return 1.0
    patterns, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = patterns.get(get_pattern_key(patterns, name), config.get("r", 8))
    if config.get("peft_type", "LORA") != "LORA":  # whose rank is not that of the product
        return alphas.get(get_pattern_key(alphas, name), config.get("alpha", 8)) / rank
    if rank != len(a):
        raise UserError(
            f"{file}: the configuration gives {name} rank {rank}, its factors have {len(a)}; copy both again, of one "
            "training"
        )
    alpha = alphas.get(get_pattern_key(alphas, name), config.get("lora_alpha", 8))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _first(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _unknown(file: Path, keys: Sequence[str], transformer: nn.Module, known: dict, of: Iterable[str] = ()) -> UserError:
    """Returns the error of keys that cannot be taken; `of`: what they were in the file, where that was converted."""
    whole = [key for key in keys if layers_of(key.removesuffix(".weight"), known)]
    if whole and any(FACTOR.fullmatch(key) or CHANGE.fullmatch(key) for key in read_header(file)):
        found = f"{_first(whole)}: whole weights beside its LoRA (PEFT: modules_to_save); train it without, or {MERGED}"
    elif whole:
        found = "it holds weights and no LoRA: give it as the source's weights"
    else:
        found = _odd_ones(keys, [*of], transformer, known)
    hint = found or f"take a LoRA of this model, or {WITHOUT}"
    return UserError(
        f"{file}: cannot take all of this LoRA: {_first(keys)} would be left out, being no LoRA factors of linear "
        f"layers of {type(transformer).__name__}; {hint}"
    )


def _odd_ones(keys: Sequence[str], of: Sequence[str], transformer: nn.Module, known: dict) -> str | None:
    """Says what keys are that name no factors of a linear layer, and what to do; None where that does not show."""
    if all(map(ENCODERS.search, keys)):
        return (
            "they change a text encoder, and prompts are encoded once for all sources, by the model's own; take a LoRA "
            f"that was trained without, or {WITHOUT}"
        )
    if all(key.endswith(BIASES) for key in keys):
        return f"they change biases; train it without (PEFT: lora_bias=False, bias='none'), or {MERGED}"
    stems = [match[1] if (match := FACTOR.fullmatch(key)) else key for key in keys]
    if other := whose(of or stems, transformer):
        return f"{other}. Take a LoRA of this model"
    near = nearest(stems[0], known)
    return near and f"{near}. Take a LoRA of this model, or {WITHOUT}"


def loads_loras(pipeline_class: type) -> bool:
    """Returns whether a pipeline of diffusers loads LoRAs of its transformer, or of its UNet, by itself."""
    if not issubclass(pipeline_class, LoraBaseMixin):
        return False
    if not issubclass(pipeline_class, DiffusionPipeline):  # a modular one, whose parts its blocks name
        return True
    parts = inspect.signature(pipeline_class).parameters
    return ("transformer" in parts and hasattr(pipeline_class, "transformer_name")) or "unet" in parts


def _loader(pipeline_class: type) -> type:
    """Returns the class that reads and writes a pipeline's LoRAs.

    For a pipeline without one that is a plain one, which converts nothing and names layers as all others do, so that
    the transformer's own load_lora_adapter takes its file.
    """
    return pipeline_class if loads_loras(pipeline_class) else CogVideoXLoraLoaderMixin


def save_lora(lora: Lora, folder: Path, pipeline_class: type, metadata: Mapping[str, str] | None = None) -> Path:
    """Writes an adapter as the pipeline's own save_lora_weights does, so that load_lora_weights takes it; atomically.

    Of a pipeline that loads no LoRAs the transformer's load_lora_adapter takes it. The file has this metadata too.

    Raises:
        UserError: It cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILES[1]
    for left in folder.glob(f"{BEING_WRITTEN}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(dir=folder, prefix=BEING_WRITTEN) as temporary:
        try:
            _loader(pipeline_class).save_lora_weights(
                temporary, transformer_lora_layers=named_factors(lora), safe_serialization=True
            )
        except SafetensorError as error:  # a full disk, which for safetensors is no OSError
            raise UserError(f"cannot write {path}: {error}; make room, or give another place") from error
        written = Path(temporary) / FILES[1]
        if metadata:
            add_metadata(written, metadata)
        with open(written, "rb") as file:
            os.fsync(file.fileno())
        os.replace(written, path)
    return path


def add_metadata(file: Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file again, with more metadata."""
    with opened(file) as stored:
        tensors, own = {key: stored.get_tensor(key) for key in stored.keys()}, stored.metadata() or {}  # noqa: SIM118
    save_file(tensors, file, {"format": "pt", **own, **metadata})
