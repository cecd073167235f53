"""Which kernel attends: the names of diffusers' own dispatcher, checked before anything is computed."""

import difflib
from types import ModuleType

import torch
from diffusers.models import attention_dispatch as dispatch

from danceopd.config.sections import Config
from danceopd.models.backbones import empty_transformer
from danceopd.support.errors import UserError

HOPPER = 9  # compute capability from which flash-attn 3 runs

INSTALLS = {
    "flash": "pip install 'danceopd[flash-attn]'",
    "flash_varlen": "pip install 'danceopd[flash-attn]'",
    "sage": "pip install sageattention",
    "sage_varlen": "pip install sageattention",
    "xformers": "pip install xformers",
}


def attention_backend(config: Config, backbone: ModuleType, device: torch.device) -> str:
    """diffusers' name of the backend that a model's run attends with, by training.attention_backend.

    auto is flash-attn where it is installed, on CUDA, for an adapter on bf16 weights of a family whose prompts have no
    mask, else torch's own. Raises UserError for a name that is none, a backend that is not installed, of CUDA alone,
    for half precision alone or that takes no masks where the family's prompts have one, and for a transformer that asks
    no dispatcher.
    """
    name, masked = config.training.attention_backend, backbone.PROMPTS_HAVE_MASKS
    # A student of all weights is in float32: autocast casts for torch's attention, and for no other.
    half = config.training.precision == "bf16" and config.student.lora is not None
    if name == "native" or (name == "auto" and (masked or device.type != "cuda" or not half)):
        return "native"
    transformer = empty_transformer(config.model)
    asks = any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in transformer.modules())
    if name == "auto":
        return _best(device) if asks else "native"
    known = [backend.value for backend in dispatch._AttentionBackendRegistry.list_backends()]
    if name not in known:
        near = difflib.get_close_matches(name, ["auto", *known], n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are auto, {', '.join(known)}"
        raise UserError(f"diffusers has no attention backend {name!r}; {hint}")
    if not asks:
        raise UserError(f"{type(transformer).__name__} attends by torch's own kernels alone; give auto or native")
    of_cuda = any(part in name for part in ("flash", "sage", "aiter"))
    if of_cuda and masked:
        raise UserError(
            f"prompts of this family have masks, which {name} refuses or, as flash_varlen, takes to end where the "
            "pictures begin; give auto, native or another of torch's own"
        )
    try:
        dispatch._check_attention_backend_requirements(dispatch.AttentionBackendName(name))
    except RuntimeError as error:
        install = INSTALLS.get(name)
        raise UserError(f"{error}" + (f" Here: {install}" if install else "")) from None
    if of_cuda and device.type != "cuda":
        raise UserError(f"{name} runs on CUDA alone, and this run is on the {device.type}; give auto or native")
    if of_cuda and not half:
        raise UserError(f"{name} attends in half precision alone: for student.lora with training.precision: bf16")
    return name


def _best(device: torch.device) -> str:
    if dispatch._CAN_USE_FLASH_ATTN_3 and torch.cuda.get_device_capability(device)[0] == HOPPER:
        return "_flash_3"
    return "flash" if dispatch._CAN_USE_FLASH_ATTN else "native"
