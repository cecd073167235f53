"""Loads a transformer in FP8, layer by layer."""

from pathlib import Path
from types import ModuleType

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from danceopd.models.backbones import transformer_class
from danceopd.models.fp8 import Fp8Linear, to_fp8
from danceopd.models.loading import lacking, read_json, transformer_folder, weight_files
from danceopd.models.lora_algebra import Lora, added
from danceopd.models.tensor_files import opened
from danceopd.support.errors import UserError


@torch.no_grad()
def load_fp8(
    folder: Path | str,
    backbone: ModuleType,
    dtype: torch.dtype,
    device: torch.device | None = None,
    lora: Lora | None = None,
) -> nn.Module:
    """Loads a transformer as to_fp8 would make it, with one file of its weights beside it in memory at most.

    Args:
        folder: A pipeline's, or a transformer's own.
        backbone: The module of the model's family.
        dtype: Of what is not in FP8.
        device: Where it is put; the CPU if not given.
        lora: An adapter that is merged into the weights before they are rounded.

    Returns:
        The transformer, frozen and in eval mode.

    Raises:
        UserError: The folder is missing or damaged, of another family, or lacks weights.
    """
    path, lora = transformer_folder(folder), lora or {}
    cls, device = transformer_class(path, backbone), device or torch.device("cpu")
    try:
        network = _unfilled(cls, path, dtype, device)
        layers = {f"{name}.weight": module for name, module in network.named_modules() if isinstance(module, Fp8Linear)}
        places = network.state_dict()
        missing = {key for key in places if not key.endswith(".weight_scale")}
        for file in weight_files(path):
            with opened(file) as stored:
                for key in missing & set(stored.keys()):
                    value, name = stored.get_tensor(key), key.removesuffix(".weight")
                    if value.shape != places[key].shape:
                        raise UserError(
                            f"{file}: {key} is {list(value.shape)} there and {list(places[key].shape)} in a "
                            f"{cls.__name__} of this configuration; copy the whole folder again"
                        )
                    if key in layers or name in lora:
                        value = value.to(device, dtype)
                    if name in lora:
                        value = added(value, *lora[name])
                    (layers[key].fill if key in layers else places[key].copy_)(value)
                    missing.remove(key)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be loaded as {cls.__name__}: {error}") from error
    if missing:
        raise lacking(path, missing)
    return network.requires_grad_(False).eval()


def _unfilled(cls: type, folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Makes a transformer in FP8 whose tensors have their places on the device, but no values yet.

    All places come first: between what is read and let go again they would scatter over the memory.
    """
    with init_empty_weights():
        network = cls.from_config(read_json(folder / "config.json"))
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    to_fp8(network)
    codes = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, Fp8Linear)}
    for key, value in network.state_dict().items():
        kept = not value.is_floating_point() or key in codes or key.endswith(".weight_scale")
        kind = value.dtype if kept else dtype
        place = torch.empty(value.shape, dtype=kind, device=device)
        set_module_tensor_to_device(network, key, device, value=place, dtype=kind)
    return network
