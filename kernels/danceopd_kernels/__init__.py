"""Fused kernels for flow-matching trainers: routed velocity losses, output heads, LoRA teachers, solver steps, FP8."""

from danceopd_kernels.adaln import adaln_modulate
from danceopd_kernels.dispatch import info
from danceopd_kernels.fp8 import fp8_linear, fp8_quantize_rowwise
from danceopd_kernels.lora import pack_adapters, routed_lora_linear
from danceopd_kernels.output_head import Head, fused_output_head_mse
from danceopd_kernels.routed_velocity_mse import Matched, routed_velocity_mse
from danceopd_kernels.steps import euler_step_, heun_step_, sde_step_

__all__ = [
    "Head",
    "Matched",
    "adaln_modulate",
    "euler_step_",
    "fp8_linear",
    "fp8_quantize_rowwise",
    "fused_output_head_mse",
    "heun_step_",
    "info",
    "pack_adapters",
    "routed_lora_linear",
    "routed_velocity_mse",
    "sde_step_",
]
