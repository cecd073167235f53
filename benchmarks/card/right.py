"""Every operation of danceopd_kernels on each backend that a device has, against the same operation in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from danceopd_kernels import (
    Head,
    adaln_modulate,
    euler_step_,
    fp8_linear,
    fp8_quantize_rowwise,
    fused_output_head_mse,
    heun_step_,
    pack_adapters,
    routed_lora_linear,
    routed_velocity_mse,
    sde_step_,
)
from danceopd_kernels.dispatch import refusal

BOUND = {"float32": 3e-5, "bfloat16": 2e-2, "float16": 4e-3}  # relative to the largest entry


@dataclass(frozen=True)
class Case:
    """run(inputs, backend) gives what the operation gives and its gradients; inputs: tensors of the dtype, by name."""

    name: str
    backends: tuple[str, ...]
    inputs: dict[str, torch.Tensor]
    run: Callable[[dict, str | None], list[torch.Tensor]]


# Long: a list of operations, each with the inputs it takes.
def cases(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> list[Case]:
    """The operations that have a definition in float64; latents have tokens x width entries a sample."""
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
    route = torch.tensor([0, 1, 1, 0], device=device)
    sigma, after = torch.tensor([1.0, 0.8, 0.5, 0.2], device=device), torch.tensor([0.9, 0.6, 0.3, 0.0], device=device)
    sigmas, scale = torch.tensor([1.0, 0.9, 0.0], device=device), torch.tensor([1.0, 2.0, 3.5, 4.5], device=device)
    active, ranks = torch.tensor([True, True, False, True], device=device), (4, 64)
    state = {name: new(4, tokens, width) for name in ("z", "velocity", "other", "noise")}
    latents = {"student": new(4, tokens, width), **{f"{k}{m}": new(2, tokens, width) for k in "tu" for m in (0, 1)}}
    lora = {"x": new(4, tokens, width), "weight": new(width, width) / width**0.5, "bias": new(width)}
    lora |= {f"a{m}": new(r, width) / width**0.5 for m, r in enumerate(ranks)}
    lora |= {f"b{m}": new(width, r) for m, r in enumerate(ranks)}
    heads = {"hidden": new(4, tokens, width), "shift": new(4, width) / 2, "scale": new(4, width) / 2}
    heads |= {"weight": new(64, width) / width**0.5, "bias": new(64)}
    heads |= {
        f"{name}{m}": value[:2] for m in (0, 1) for name, value in heads.items() if name[0] == "h" or name[0] == "s"
    }
    norm = {"x": new(4, tokens, width), "residual": new(4, tokens, width)}
    norm |= {name: new(4, width) / 2 for name in ("shift", "scale", "gate")}

    def gradients(outputs: list, leaves: list) -> list[torch.Tensor]:
        total = sum(
            (o.double() * torch.linspace(-1, 2, o.numel(), device=device).double().view(o.shape)).sum() for o in outputs
        )
        return [*(o.detach() for o in outputs), *torch.autograd.grad(total, leaves)]

    def loss(v, backend):
        student = v["student"].detach().requires_grad_()
        found = routed_velocity_mse(
            student, [v["t0"], v["t1"]], route, uncond=[v["u0"], v["u1"]], guidance_scale=scale, reduction="none",
            backend=backend,
        )  # fmt: skip
        return [found.detach(), *torch.autograd.grad(found.sum() * student[0].numel(), student)]

    def head(v, backend):
        names = ("hidden", "shift", "scale", "weight", "bias")
        student = Head(*(v[name].detach().requires_grad_() for name in names))
        teachers = [Head(*(v[f"{name}{m}"] for name in names[:3]), v["weight"], v["bias"] + 1) for m in (0, 1)]
        found = fused_output_head_mse(student, teachers, route, reduction="none", backend=backend)
        # Scaled to what float16 holds: the loss is a mean over as many entries.
        return [found.detach(), *torch.autograd.grad(found.sum() * 64 * tokens, student)]

    def linear(v, backend):
        leaves = [v["x"].detach().requires_grad_(), *(v[k].detach().requires_grad_() for k in ("a0", "b0", "a1", "b1"))]
        adapters = pack_adapters([(leaves[1], leaves[2]), (leaves[3], leaves[4])], [1.0, 0.5])
        out = routed_lora_linear(leaves[0], v["weight"], v["bias"], adapters, route, backend=backend)
        return gradients([out], leaves)

    def modulated(v, backend):
        leaves = {name: value.detach().requires_grad_() for name, value in v.items()}
        x, shift, gain = leaves["x"], leaves["shift"], leaves["scale"]
        out = adaln_modulate(x, shift, gain, residual=leaves["residual"], gate=leaves["gate"], backend=backend)
        return gradients(list(out), list(leaves.values()))

    def euler(v, backend):
        guidance = {"uncond": v["other"], "guidance_scale": scale}
        return [euler_step_(v["z"].clone(), v["velocity"], sigma, after, active=active, **guidance, backend=backend)]

    def heun(v, backend):
        return [heun_step_(v["z"].clone(), v["velocity"], v["other"], sigma, after, backend=backend)]

    def sde(v, backend):
        z = v["z"].clone()
        return [z, sde_step_(z, v["velocity"], sigma, after, v["noise"], sigmas, backend=backend)]

    every, triton = ("torch", "cpu", "cuda", "triton"), ("torch", "triton")
    return [
        Case("routed_velocity_mse, guided", every, latents, loss),
        Case("euler_step_, guided, masked", every, state, euler),
        Case("heun_step_", every, state, heun),
        Case("sde_step_", every, state, sde),
        Case("routed_lora_linear", triton, lora, linear),
        Case("fused_output_head_mse", triton, heads, head),
        Case("adaln_modulate, gated", triton, norm, modulated),
    ]


def runs_here(case: Case, backend: str, tensor: torch.Tensor) -> bool:
    """Whether a backend takes the tensor on this machine."""
    return backend in case.backends and refusal(backend, case.backends, tensor, (tensor.dtype,)) is None


def errors(case: Case) -> Iterator[tuple[str, float]]:
    """(backend, the largest error relative to the largest entry of its tensor) for each backend there is."""
    like = next(iter(case.inputs.values()))
    exact = case.run({name: value.double() for name, value in case.inputs.items()}, "torch")
    for backend in case.backends:
        if runs_here(case, backend, like):
            found = case.run(case.inputs, backend)
            yield backend, max(_error(a, b) for a, b in zip(found, exact, strict=True))


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    if not bool(found.isfinite().all()):
        return float("inf")
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-12))


def fp8_errors(
    device: torch.device, dtype: torch.dtype, rows: int, width: int
) -> Iterator[tuple[str, str, float, float]]:
    """(what, backend, error, bound) of the FP8 operations: codes unlike the host's; products against float64."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, width, device=device).to(dtype), torch.randn(width, width, device=device)
    host = fp8_quantize_rowwise(x.cpu(), backend="torch")
    quantizer = Case("", ("torch", "cpu", "triton"), {}, lambda *_: [])
    for backend in quantizer.backends:
        if runs_here(quantizer, backend, x):
            codes, scale = fp8_quantize_rowwise(x, backend=backend)
            same = codes.view(torch.uint8).cpu() == host[0].view(torch.uint8)
            differ = float((~same).float().mean()) + float((scale.cpu() != host[1]).float().mean())
            yield "fp8_quantize_rowwise, codes unlike the host's", backend, differ, 0.0
    codes, scale = fp8_quantize_rowwise(weight)
    x_codes, x_scale = fp8_quantize_rowwise(x)
    numbers, exact_x = codes.double() * scale, x_codes.double() * x_scale
    product = Case("", ("torch", "triton"), {}, lambda *_: [])
    for backend in product.backends:
        if not runs_here(product, backend, x):
            continue
        for only in (False, True):
            if only and dtype == torch.float32 and backend == "triton":
                continue
            found = fp8_linear(x, codes, scale, weight_only=only, backend=backend)
            exact = (x.double() if only else exact_x) @ numbers.T
            bound = BOUND["bfloat16"] if device.type != "cpu" else BOUND[str(dtype).removeprefix("torch.")]
            yield f"fp8_linear{', weight only' * only}", backend, _error(found, exact), bound
