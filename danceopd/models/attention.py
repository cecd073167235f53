"""Chooses the kernel of attention, by the names of diffusers' dispatcher, before anything is computed."""

from pathlib import Path
from types import ModuleType

import torch
from diffusers.models import attention_dispatch as dispatch

from danceopd.models.backbones import empty_transformer
from danceopd.support.errors import UserError
from danceopd.support.hints import did_you_mean

HOPPER = 9  # compute capability from which flash-attn 3 runs

INSTALLS = {
    "flash": "pip install 'danceopd[flash-attn]'",
    "flash_varlen": "pip install 'danceopd[flash-attn]'",
    "sage": "pip install sageattention",
    "sage_varlen": "pip install sageattention",
    "xformers": "pip install xformers",
}


def attention_backend(name: str, model: Path, half: bool, backbone: ModuleType, device: torch.device) -> str:
    """Finds diffusers' name of the kernel that a model's transformers attend with.

    Args:
        name: The kernel that is wanted, by diffusers' name, or "auto": flash-attn where it is installed, on CUDA, in
            half precision and for a family whose prompts have no mask; on a CPU in half precision plain products,
            because the backward of torch's fused one is ten times slower there than in float32; else torch's own.
        model: The pipeline's folder.
        half: Whether attention's inputs are in half precision.
        backbone: The module of the model's family.
        device: Where the run computes.

    Raises:
        UserError: Diffusers has no kernel of this name, it is not installed, it runs on CUDA or in half precision
            alone, it takes no masks where the family's prompts have one, or the transformer asks no dispatcher.
    """
    masked = backbone.PROMPTS_HAVE_MASKS
    if name == "native" or (name == "auto" and (masked or not half or device.type not in ("cuda", "cpu"))):
        return "native"
    transformer = empty_transformer(model)
    asks = any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in transformer.modules())
    if name == "auto":
        return _best(device) if asks else "native"
    known = [backend.value for backend in dispatch._AttentionBackendRegistry.list_backends()]
    if name not in known:
        raise UserError(f"diffusers has no attention backend {name!r}{did_you_mean(name, ['auto', *known])}")
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


def set_torch_kernels(backbone: ModuleType, device: torch.device) -> None:
    """Leaves cuDNN out of what torch's own attention takes on CUDA, for families whose prompts have masks.

    cuDNN builds a plan for each new shape, on the host, and with such prompts nearly every forward has one of its own.
    torch's flash and memory-efficient kernels build none. It holds for the process.

    Args:
        backbone: The module of the model's family.
        device: Where the run computes.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(not backbone.PROMPTS_HAVE_MASKS)


def _best(device: torch.device) -> str:
    if device.type == "cpu":
        return "_native_math"
    if dispatch._CAN_USE_FLASH_ATTN_3 and torch.cuda.get_device_capability(device)[0] == HOPPER:
        return "_flash_3"
    return "flash" if dispatch._CAN_USE_FLASH_ATTN else "native"
