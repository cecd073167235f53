"""Loads parts of a diffusers pipeline's folder: never from the network, whole or not at all; errors name the path."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import wraps
from pathlib import Path

import torch
from torch import nn

from danceopd.core.copies import to_device
from danceopd.models.tensor_files import check_finite, in_its_place, opened, read_header
from danceopd.support.bars import without_library_bars
from danceopd.support.errors import UserError
from danceopd.support.hub import near
from danceopd.support.texts import many, parse_object

INSIDE = "model.diffusion_model."  # in front of a transformer's names where a file holds a VAE and encoders beside it

# The weights' names in a variant, as save_pretrained(variant="fp16") writes them: of one file, of shards, of the index.
VARIANT = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:-\d+-of-\d+)?\.(?:safetensors\.index\.)?([a-z]\w*)(?:-\d+-of-\d+)?"
    r"\.(?:safetensors|json)"
)

PLAIN = re.compile(r"(?:diffusion_pytorch_model|model)(?:-\d+-of-\d+)?\.safetensors|.*\.safetensors\.index\.json")

FACTOR = re.compile(r"\.lora[_.](A|B|down|up)\b")  # of a LoRA

SCALED = re.compile(r"scaled_fp8$|scale_(weight|input)$|(weight|input)_scale$|comfy_quant$")


def read_json(path: Path | str) -> dict:
    """Reads a JSON file of a pipeline; a UserError if it is not there or is damaged."""
    path = Path(path)
    folder = path.parent
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the folder of a whole diffusers pipeline")
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder of a whole diffusers pipeline{near(folder)}")
    if not path.is_file():
        above = f": it is {folder.parent}" if (folder.parent / path.name).is_file() else ""
        raise UserError(f"no {path.name} in {folder}; give the folder of a whole diffusers pipeline{above}")
    try:
        return parse_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} {in_its_place(path) or f'is damaged ({error}); copy it again'}") from None


def names_folder(function: Callable) -> Callable:
    """Lets a function of a model's folder name it where a configuration in it holds what no pipeline writes."""

    @wraps(function)
    def named(folder, *args, **options):
        try:
            return function(folder, *args, **options)
        except UserError:
            raise
        except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{folder}: its configurations cannot be used ({reason}); copy them again") from error

    return named


def pipeline_index(folder: Path | str) -> dict:
    """Reads a pipeline's index: model_index.json, or modular_model_index.json where only that is there.

    Raises:
        UserError: There is none, or it is damaged.
    """
    plain, modular = Path(folder) / "model_index.json", Path(folder) / "modular_model_index.json"
    return read_json(modular if modular.is_file() and not plain.is_file() else plain)


def hub_id(model: Path) -> str | None:
    """Finds the repository that a pipeline's folder came from, by the hub's cache or its own index.

    None where none says.
    """
    cached = [part for part in model.resolve().parts if part.startswith("models--")]
    if cached:
        return cached[-1].removeprefix("models--").replace("--", "/", 1)
    named = str(pipeline_index(model).get("_name_or_path", ""))
    return named if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", named) and not Path(named).exists() else None


def class_name_of(folder: Path | str, served: tuple[str, ...] = ()) -> str:
    """Reads the pipeline's class from a folder's index.

    Raises:
        UserError: There is none, or it is not one of `served`, where these are given.
    """
    name = pipeline_index(folder).get("_class_name")
    if served and name not in served:
        raise UserError(f"{folder} holds a {name}, not one of {', '.join(served)}")
    return str(name)


def load(cls: type, path: Path | str, **options):
    """Calls cls.from_pretrained with a folder; a UserError if it is not there, not whole or cannot be loaded."""
    path = Path(path)
    if not path.is_dir():  # else taken for the name of a repository
        raise UserError(f"there is no folder {path}; give the folder of a whole pipeline or model{near(path)}")
    whole = (path / "model_index.json").is_file()
    if whole:
        _check_parts(path, given=options)
    if options.get("use_safetensors"):
        parts = path.iterdir() if whole else (path,)
        variants = {variant_of(part) for part in parts if part.is_dir()} - {None}
        options |= {"variant": min(variants)} if variants else {}
    try:
        with without_library_bars():
            loaded = cls.from_pretrained(str(path), local_files_only=True, **options)
    except Exception as error:  # on configurations of odd values the libraries raise almost anything
        raise UserError(f"{path}: cannot be loaded as {cls.__name__}: {error}") from error
    for name, part in loaded.components.items() if whole else ():
        if isinstance(part, nn.Module) and name not in options:
            _finite(part, path / name)
    return loaded


def parts_of(index: dict) -> list[str]:
    """Lists the parts that a pipeline's index names, each a folder beside it."""
    lists = {part: value[:2] for part, value in index.items() if isinstance(value, list)}  # of a library and a class
    return [part for part, value in lists.items() if len(value) == 2 and all(isinstance(one, str) for one in value)]


def _check_parts(pipeline: Path, given: Iterable[str]) -> None:
    """Raises UserError where a part of a pipeline is not there, or a file of its weights is not whole."""
    for part in (part for part in parts_of(pipeline_index(pipeline)) if part not in given):
        folder = pipeline / part
        if not folder.is_dir() or not any(folder.iterdir()):
            raise UserError(f"no {part} in {pipeline}, whose model_index.json names it; copy the whole pipeline")
        _check_whole(folder)


def _check_whole(folder: Path) -> None:
    """Raises UserError where a file of a part's weights is not whole."""
    variant = variant_of(folder)
    for file in folder.glob("*.safetensors"):
        match = VARIANT.fullmatch(file.name)
        if (match and match[1]) == variant:  # what lies there of other variants is not read
            read_header(file)


def load_model(cls: type, path: Path | str, dtype: torch.dtype) -> nn.Module:
    """Loads a model of diffusers or transformers from its folder, in eval mode on the CPU.

    Raises:
        UserError: As load does; and for weights of another class of diffusers, with some missing or not finite.
    """
    path = Path(path)
    config = read_json(path / "config.json")
    if config.get("_class_name", cls.__name__) != cls.__name__:
        raise UserError(f"{path} holds a {config['_class_name']}, not a {cls.__name__}")
    _check_whole(path)
    model, info = load(cls, path, dtype=dtype, use_safetensors=True, output_loading_info=True)
    if info["missing_keys"]:  # the libraries only warn, and leave them random
        raise lacking(path, info["missing_keys"])
    return _finite(model.eval(), path)


def _finite(network: nn.Module, where: Path | str) -> nn.Module:
    """Returns a network; a UserError where its weights are not finite.

    A file's number beyond the range of float16 is infinite there, which harms the rows alone that meet it: they are
    named where they are encoded.
    """
    for name, parameter in network.named_parameters():
        try:
            check_finite(where, name, parameter.detach())
        except UserError:
            if parameter.dtype == torch.float16 and _stored_finite(Path(where)):
                return network
            raise
    return network


def _stored_finite(where: Path) -> bool:
    """Tells whether a file's numbers, or those of a folder's files, are finite as they are stored."""
    for path in sorted(where.glob("*.safetensors")) if where.is_dir() else [where]:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                try:
                    check_finite(path, name, file.get_tensor(name))
                except UserError:
                    return False
    return True


def load_transformer(cls: type, folder: Path | str, dtype: torch.dtype) -> nn.Module:
    """Loads a pipeline folder's transformer, or a transformer folder itself, as load_model does."""
    return load_model(cls, transformer_folder(folder), dtype)


def transformer_folder(folder: Path | str) -> Path:
    """Returns a pipeline folder's transformer or UNet, or such a folder itself."""
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    return folder / ("unet" if (folder / "unet").is_dir() else "transformer")


def input_dtype(transformer: nn.Module) -> torch.dtype:
    """Returns what a transformer takes its inputs in: its `takes` where it has one, else the dtype of its first
    weights.

    One that is trained has it, since a copy of it for rollouts may hold some of its weights in another dtype.
    """
    return getattr(transformer, "takes", None) or next(transformer.parameters()).dtype


def is_file_name(weights: Path | str) -> bool:
    """Returns whether a transformer's weights are meant to be one file, which may be missing, and not a folder."""
    path = Path(weights)
    return path.suffix == ".safetensors" or path.is_file()


def check_transformer_file(path: Path | str, transformer: nn.Module) -> None:
    """Checks by a file's header alone that a transformer of the same architecture lies in it, with every name and
    shape.

    Args:
        path: A safetensors file under diffusers' names, or in a layout that it converts for the transformer's class.
        transformer: On any device.

    Raises:
        UserError: The file is missing, corrupt, quantized or incomplete, is of another model, or holds anything that
            would be left out.
    """
    path, name = Path(path), type(transformer).__name__
    raw = _tensors(path, header_only=True)
    expected = {key: tensor.shape for key, tensor in transformer.state_dict().items()}
    found, left = raw, {}
    if raw.keys() != expected.keys():
        rest = dict(raw)  # the converters take out what they use
        converted = _converted(path, rest, transformer)
        if len(expected.keys() & converted.keys()) > len(expected.keys() & raw.keys()):
            found, left = converted, rest
    missing = [key for key in expected if key not in found]
    if missing:
        what = "it is incomplete, of another model, or in a layout that diffusers does not convert"
        if any(map(FACTOR.search, raw)):
            what = "it is a LoRA: give it as the source's lora"
        raise UserError(
            f"{path}: lacks {len(missing)} of {len(expected)} tensors of this {name}, such as {missing[0]}; {what}"
        )
    left = [*left, *(key for key in found if key not in expected)]
    if left:
        raise UserError(
            f"{path}: {many(len(left), 'tensor')} would be left out, such as {left[0]}; it is of another model"
        )
    for key, shape in expected.items():
        if found[key].shape != shape:
            raise UserError(
                f"{path}: {key} is {list(found[key].shape)} there and {list(shape)} in the model; it is of another one"
            )


def load_transformer_file(path: Path | str, like: nn.Module, folder: Path | str, dtype: torch.dtype) -> nn.Module:
    """Loads the transformer of one file in eval mode on the CPU.

    Args:
        path: As check_transformer_file takes it.
        like: A transformer of the same architecture.
        folder: Its pipeline's or its own, for the configuration.
        dtype: Of the weights.

    Raises:
        UserError: As check_transformer_file does; or they are not finite.
    """
    check_transformer_file(path, like)
    config, tensors = str(transformer_folder(folder)), _tensors(Path(path), header_only=False)
    return _finite(type(like).from_single_file(tensors, config=config, local_files_only=True, dtype=dtype), path)


def _tensors(path: Path, header_only: bool) -> dict[str, torch.Tensor]:
    """Reads a file's tensors, those of the transformer alone where it holds other parts.

    Header_only: on the meta device.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a transformer's folder or its safetensors file{near(path)}")
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: weights must be a safetensors file; files of other kinds may run code when read")
    header = read_header(path)
    inside = [key for key in header if key.startswith(INSIDE)] or list(header)
    odd = [key for key in inside if SCALED.search(key) or not header[key][0].startswith(("F", "BF"))]
    if odd:
        raise UserError(
            f"{path}: is quantized ({odd[0]}), and diffusers would read its numbers without their scales; take "
            "the file in bf16 or fp16"
        )
    if header_only:
        read = {key: torch.empty(header[key][1], device="meta") for key in inside}
    else:
        with opened(path) as file:
            read = {key: file.get_tensor(key) for key in inside}
    return {key.removeprefix(INSIDE): value for key, value in read.items()}


def _converted(path: Path, tensors: dict[str, torch.Tensor], transformer: nn.Module) -> dict[str, torch.Tensor]:
    """Converts tensors from the original layout by diffusers, nothing where it fails.

    What it uses is taken out of them.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    name = type(transformer).__name__
    if name not in SINGLE_FILE_LOADABLE_CLASSES:
        raise UserError(f"{path}: diffusers reads no single file as a {name}; give a folder of save_pretrained")
    try:
        convert = SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
        return dict(convert(checkpoint=tensors, config=dict(transformer.config)))
    except Exception:  # of any kind: the converters assume the names that they expect
        return {}


def mask_of(prompt: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor | None:
    """Returns the mask of a prompt's tokens [B, L] on a device; None where all are of one length."""
    mask = prompt.get("prompt_mask", prompt.get("prompt_keep"))
    return None if mask is None else to_device(mask, device)


def stream_blocks(network: nn.Module, device: torch.device) -> nn.Module:
    """Keeps a network in host memory; its forward brings one block after another to the device, and takes it back.

    On CUDA the next block is copied from pinned memory while one computes, and the host waits for each block, such that
    two of them and what lies outside the blocks are there at a time. The same velocity comes out. Returns the network.
    """
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        network.cpu(),
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device.type == "cuda",
    )
    return network


def check_weights(folder: Path | str, network: nn.Module | None = None) -> None:
    """Checks by their headers alone that a transformer's or VAE's weights are all there, and whole.

    Args:
        folder: A pipeline's, of whose transformer the weights are looked at, or a part's own.
        network: The transformer, on any device: then each of its tensors must be there, in its shape.

    Raises:
        UserError: A file is missing, cut off or no safetensors file, or the weights are not the network's.
    """
    shapes, files = {}, weight_files(folder)
    for file in files:
        shapes |= {name: shape for name, (_, shape) in read_header(file).items()}
    if network is None:
        return
    folder = transformer_folder(folder)
    missing = network.state_dict().keys() - shapes.keys()
    others = sorted(path.name for path in folder.glob("*-of-*.safetensors") if path not in files)
    if missing and others:  # of shards that an index of another download does not name
        raise UserError(
            f"{folder}: the weights lack {many(len(missing), 'tensor')}, such as {min(missing)}, and the index does "
            f"not name {others[0]}, which lies there; copy the index and all shards of one download again"
        )
    check_shapes(shapes, network, folder)


def lacking(where: Path | str, missing: Collection[str]) -> UserError:
    """Says that weights lack some tensors."""
    tensors = many(len(missing), "tensor")
    return UserError(f"{where}: the weights lack {tensors}, such as {min(missing)}; copy them again")


def check_shapes(shapes: Mapping[str, torch.Size], network: nn.Module, where: Path | str) -> None:
    """Raises UserError where tensors of these shapes are not those of a network (which may be on the meta device)."""
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if missing := expected.keys() - shapes.keys():
        raise lacking(where, missing)
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UserError(
                f"{where}: {name} is {list(shapes[name])} in the file and {list(shape)} by config.json; copy "
                "the folder again"
            )


def variant_of(folder: Path | str) -> str | None:
    """Returns the variant that a part's weights are saved as, such as "fp16"; None where they have their plain names.

    Raises:
        UserError: There are several variants, and no plain weights.
    """
    names = [path.name for path in Path(folder).glob("*.safetensors*")]
    found = {match[1] for match in map(VARIANT.fullmatch, names) if match}
    if any(map(PLAIN.fullmatch, names)) or not found:
        return None
    if len(found) > 1:
        raise UserError(f"{folder} has its weights as {' and '.join(sorted(found))}; leave one of these variants there")
    return found.pop()


def weight_files(folder: Path | str) -> list[Path]:
    """Returns the files of a transformer's or VAE's weights, which are all there; a UserError names missing ones."""
    from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME

    folder = transformer_folder(folder)
    variant = variant_of(folder)
    index, names = folder / SAFE_WEIGHTS_INDEX_NAME, [SAFETENSORS_WEIGHTS_NAME]
    if variant:
        index = folder / SAFE_WEIGHTS_INDEX_NAME.replace(".json", f".{variant}.json")
        names = [SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", f".{variant}.safetensors")]
    if index.is_file():
        try:
            names = sorted(set(parse_object(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if any(Path(name).name != name for name in names):
                raise ValueError("it names files outside its folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} {in_its_place(index) or f'is damaged ({error}); copy it again'}") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        other = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".gguf"))
        beside = f" (there is {other[0]}, which is not read: get the weights as safetensors)" if other else ""
        raise UserError(f"no weights {', '.join(missing[:3])}{more} in {folder}{beside}; copy the folder again")
    return [folder / name for name in names]


def picture_codec(folder: Path | str, device: torch.device | str, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """Loads a pipeline's AutoencoderKL.

    Returns:
        encode(pictures [n, 3, H, W] in [-1, 1]) -> latents [n, C, h, w], the mode of the posterior, shifted and scaled,
        and its inverse, on `device` in `dtype`, without gradient.

    Raises:
        UserError: The VAE is missing.
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


def film_codec(
    cls: type, folder: Path | str, device: torch.device | str, dtype: torch.dtype
) -> tuple[Callable, Callable]:
    """Loads a pipeline's VAE of films, to which a picture is a film of one frame.

    Args:
        cls: The VAE's class, whose configuration has latents_mean and latents_std.
        folder: The pipeline's.
        device, dtype: Of the VAE.

    Returns:
        encode(pictures [n, c, H, W]) -> latents [n, C, h, w], the mode of the posterior, normalised, and its inverse,
        on `device` in `dtype`, without gradient.

    Raises:
        UserError: The VAE is missing.
    """
    vae = load_model(cls, Path(folder) / "vae", dtype).to(device)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(device, dtype)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(device, dtype)

    @torch.no_grad()
    def encode(pictures: torch.Tensor) -> torch.Tensor:
        return ((vae.encode(pictures.to(device, dtype)[:, :, None]).latent_dist.mode() - mean) / std)[:, :, 0]

    @torch.no_grad()
    def decode(latents: torch.Tensor) -> torch.Tensor:
        return vae.decode(latents.to(device, dtype)[:, :, None] * std + mean).sample[:, :, 0]

    return encode, decode


def latent_shape(folder: Path | str, height: int, width: int, patch: int = 1) -> tuple[int, int, int]:
    """Works out the shape of a picture's latents by the configuration of a pipeline's AutoencoderKL.

    Args:
        folder: The pipeline's.
        height, width: In pixels.
        patch: Side of the transformer's patches, in latents.

    Returns:
        (C, h, w).

    Raises:
        UserError: The sides are no multiples of a patch's, or the VAE is missing.
    """
    config = read_json(Path(folder) / "vae" / "config.json")
    scale = 2 ** (len(config["block_out_channels"]) - 1)
    check_size(height, width, patch * scale)
    return config["latent_channels"], height // scale, width // scale


def check_size(height: int, width: int, multiple: int) -> None:
    """Raises UserError if height or width is no positive multiple of a number of pixels."""
    if height < 1 or width < 1 or height % multiple or width % multiple:
        raise UserError(f"height and width must be multiples of {multiple}, got {height} x {width}")


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Packs latents [B, C, h, w] as tokens [B, h w / 4, 4 C] of 2 x 2 patches."""
    batch, channels, height, width = latents.shape  # not by pixel_unshuffle, which gets an empty batch wrong
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height * width // 4, 4 * channels)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Inverts pack, for latents of this height and width."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, height, width)


def load_tokenizer(cls: type, path: Path | str):
    """Loads a tokenizer from its folder; a UserError as from load, and for missing files, which would make it empty."""
    path = Path(path)
    files = {kind: (path / file).is_file() for kind, file in cls.vocab_files_names.items()}
    if path.is_dir() and not files.pop("tokenizer_file", False) and not all(files.values()):
        raise UserError(f"{path}: lacks {' or '.join(cls.vocab_files_names.values())}; copy the whole folder")
    return load(cls, path)


def length_of_prompts(length: int | None, backbone, model: Path) -> int:
    """Returns the tokens of a prompt; a UserError for a length that the pipeline would not take."""
    most = backbone.MAX_SEQUENCE_LENGTH
    if length is None:
        return most
    if not 1 <= length <= most:
        raise UserError(f"max_sequence_length must be from 1 to {most} for {model}, got {length}")
    if all(reader.limit is None for reader in backbone.prompt_readers(model, length)):
        raise UserError(
            f"{model} is a {class_name_of(model)}, which does not cut prompts; leave max_sequence_length out"
        )
    return length


def multiple_of(backbone, model: Path) -> int:
    """Returns what heights and widths are multiples of: the side of the smallest picture that the model takes."""
    for step in (8, 16, 32):
        try:
            backbone.latent_shape(model, step, step)
        except UserError:
            continue
        return step
    backbone.latent_shape(model, 64, 64)  # says what is wrong, if it is not the size
    return 64
