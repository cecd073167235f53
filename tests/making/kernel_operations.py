"""Every operation of danceopd_kernels: arguments that fit, what it is in float64, how near its backends come to that.

Each is one entry of OPERATIONS, and whoever goes through the list has them all: on every backend, with every argument.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import danceopd_kernels as k
import torch

B, N, C, P = 3, 4, 16, 8  # samples, tokens, channels, outputs
FLOAT8 = torch.float8_e4m3fn
ALL, TRITON = ("torch", "cpu", "cuda", "triton"), ("torch", "triton")

# Relative to the largest entry. Triton's interpreter cuts off for bfloat16 instead of rounding.
ONE_ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1.2e-3}
PRODUCT = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
HALVES = {dtype: PRODUCT[dtype] for dtype in (torch.bfloat16, torch.float16)}  # Triton's alone
CODES = dict.fromkeys(ONE_ROUNDING, 1 / 16)  # three bits


@dataclass(frozen=True)
class Operation:
    """An operation of the package.

    Attributes:
        name: What the package calls it.
        call: call(**arguments, backend) gives what comes out; of what works in place z first.
        make: make(samples, tokens, channels, dtype) gives fresh arguments: tensors, numbers, lists and tuples of them.
        exact: exact(**arguments) gives the same in float64 by plain functions of torch, z not in place.
        tolerance: By dtype, of outputs and gradients; the first is what it is tried in where one will do.
        backends: Those it has; plain PyTorch is its definition.
        gradients: The arguments in which it is differentiable.
        refused: Those whose gradient would be lost, and which are refused; the rest is frozen.
        in_place: Whether z is written over, and all has to be contiguous.
        twice: Whether plain PyTorch is differentiable twice.
        transforms: Whether plain PyTorch runs under torch.func.
    """

    name: str
    call: Callable
    make: Callable[..., dict]
    exact: Callable[..., list[torch.Tensor]]
    tolerance: dict[torch.dtype, float]
    backends: tuple[str, ...] = ALL
    gradients: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    in_place: bool = False
    twice: bool = False
    transforms: bool = True

    def __str__(self) -> str:
        return self.name


# ------------------------------------------------------------------------------------------- arguments as leaves


def leaves(value: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of arguments with their places, such as "student.hidden" or "adapters.0.1"."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, inner in parts(value):
            yield from leaves(inner, f"{name}.{key}" if name else str(key))


def parts(value: dict | list | tuple) -> list[tuple]:
    """Lists what a container holds, by its key, field or place."""
    if isinstance(value, dict):
        return list(value.items())
    return list(zip(getattr(value, "_fields", range(len(value))), value, strict=True))


def mapped(function: Callable[[str, torch.Tensor], object], value: object, name: str = "") -> object:
    """Copies arguments with function(place, tensor) in each tensor's place."""
    if isinstance(value, torch.Tensor):
        return function(name, value)
    if not isinstance(value, dict | list | tuple):
        return value
    made = [(key, mapped(function, inner, f"{name}.{key}" if name else str(key))) for key, inner in parts(value)]
    if isinstance(value, dict):
        return dict(made)
    return type(value)(*(v for _, v in made)) if hasattr(value, "_fields") else type(value)(v for _, v in made)


def is_float(tensor: torch.Tensor) -> bool:
    """Tells whether a tensor holds numbers, not codes, indices or flags."""
    return tensor.is_floating_point() and tensor.dtype != FLOAT8


# ------------------------------------------------------------------------------------------------ the velocity loss


def _routed(samples=B, tokens=N, channels=C, dtype=torch.float32) -> dict:
    held = lambda n: torch.randn(n, tokens, channels).to(dtype)  # noqa: E731
    at = torch.arange(samples)
    return {
        "student": held(samples),
        "teachers": [held(3), held(2)],
        "route": (at + 1) % 2,
        "row": at % 2,
        "uncond": [held(3), held(2)],
        "uncond_row": (at + 1) % 2,
        "guidance_scale": 1 + torch.rand(samples),
        "weight": 0.5 + torch.rand(samples),
        "mask": torch.arange(tokens).expand(samples, -1).contiguous() != 1,
        "reduction": "none",
        "norms": True,
    }


def _exact_routed(student, teachers, route, row, uncond, uncond_row, guidance_scale, weight, mask, **_):
    shape = (-1, *(1,) * (student.dim() - 1))
    held = [[tensors[m][r] for m, r in zip(route.tolist(), rows.tolist(), strict=True)]
            for tensors, rows in ((teachers, row), (uncond, uncond_row))]  # fmt: skip
    target, base = (torch.stack(one).detach() for one in held)
    target = base + guidance_scale.detach().view(shape) * (target - base)
    kept = mask[..., None].expand_as(student)
    error = torch.where(kept, student - target, 0.0)
    each = error.square().flatten(1).sum(1) / kept.flatten(1).sum(1).clamp(min=1)
    norms = [torch.where(kept, x, 0.0).flatten(1).norm(dim=1) for x in (student.detach(), target)]
    return [each * weight.detach(), each.detach(), *norms]


# ------------------------------------------------------------------------------------------------- the output head


def _head(samples: int, tokens: int, channels: int, dtype: torch.dtype) -> k.Head:
    shapes = ((samples, tokens, channels), (samples, channels), (samples, channels), (P, channels), (P,))
    return k.Head(*(torch.randn(shape).to(dtype) for shape in shapes))


def _heads(samples=B, tokens=N, channels=C, dtype=torch.float32) -> dict:
    route = (torch.arange(samples) + 1) % 2
    counts = [int((route == m).sum()) for m in (0, 1)]
    return {
        "student": _head(samples, tokens, channels, dtype),
        "teachers": [_head(n, tokens, channels, dtype) for n in counts],
        "route": route,
        "uncond": [tuple(_head(n, tokens, channels, dtype)[:3]) for n in counts],
        "guidance_scale": 1 + torch.rand(samples),
        "weight": 0.5 + torch.rand(samples),
        "mask": torch.arange(tokens).expand(samples, -1).contiguous() != 1,
        "eps": 1e-6,
        "reduction": "none",
    }


def _velocity(hidden, shift, scale, weight, bias, eps):
    normed = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=eps)
    return torch.nn.functional.linear(normed * (1 + scale[:, None]) + shift[:, None], weight, bias)


def _exact_heads(student, teachers, route, uncond, guidance_scale, weight, mask, eps, **_):
    target = student.hidden.new_empty(*student.hidden.shape[:2], P)
    with torch.no_grad():
        for m, (teacher, branch) in enumerate(zip(teachers, uncond, strict=True)):
            base = _velocity(*branch, *teacher[3:], eps)
            scale = guidance_scale[route == m].view(-1, 1, 1)
            target[route == m] = base + scale * (_velocity(*teacher, eps) - base)
    kept = mask[..., None].expand_as(target)
    error = torch.where(kept, _velocity(*student, eps) - target, 0.0)
    return [error.square().flatten(1).sum(1) / kept.flatten(1).sum(1).clamp(min=1) * weight.detach()]


# --------------------------------------------------------------------------------------------------- linear layers


def _lora(samples=B, tokens=N, channels=C, dtype=torch.float32) -> dict:
    new = lambda *shape: torch.randn(shape).to(dtype)  # noqa: E731
    return {
        "x": new(samples, tokens, channels),
        "weight": new(P, channels),
        "bias": new(P),
        "adapters": [(new(rank, channels), new(P, rank)) for rank in (2, 3)],
        "route": torch.arange(samples) % 3 - 1,
        "scale": torch.tensor([0.5, 2.0]),
    }


def _exact_lora(x, weight, bias, adapters, route, scale):
    base = torch.nn.functional.linear(x, weight.detach(), bias.detach())
    added = []
    for sample, m in zip(x, route.tolist(), strict=True):
        zero = torch.zeros_like(base[0])
        added.append(zero if m < 0 else scale[m].detach() * (sample @ adapters[m][0].mT) @ adapters[m][1].mT)
    return [base + torch.stack(added)]


def _codes(samples=B, tokens=N, channels=C, dtype=torch.float32, weight_only=False) -> dict:
    weight, weight_scale = k.fp8_quantize_rowwise(torch.randn(P, max(1, channels)), backend="torch")
    made = {"x": torch.randn(samples, tokens, channels).to(dtype), "weight": weight[:, :channels]}
    made |= {"weight_scale": weight_scale, "bias": torch.randn(P).to(dtype)}
    return made | {"x_scale": None, "out_dtype": dtype, "weight_only": weight_only}


def _exact_codes(x, weight, weight_scale, bias, weight_only, **_):
    number = weight.double() * weight_scale
    seen = x
    if not weight_only:  # the gradient takes no notice of the rounding
        codes, scale = k.fp8_quantize_rowwise(x.detach().float(), backend="torch")
        seen = x + (codes.double() * scale - x).detach()
    return [seen @ number.mT + bias]


def _numbers(*args, **kwargs) -> list[torch.Tensor]:
    """What rows of codes stand for."""
    codes, scale = k.fp8_quantize_rowwise(*args, **kwargs)
    return [codes.float() * scale]


def _rows(samples=B, tokens=N, channels=C, dtype=torch.float32) -> dict:
    made = {name: torch.randn(samples, channels).to(dtype) for name in ("scale", "shift")}
    return {"x": torch.randn(samples, tokens, channels).to(dtype), "norm": True, **made, "eps": 1e-6}


def _exact_rows(x, scale, shift, eps, norm):
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    return [normed * (1 + scale[:, None]) + shift[:, None]]


def _modulated(samples=B, tokens=N, channels=C, dtype=torch.float32) -> dict:
    made = {name: torch.randn(samples, tokens, channels).to(dtype) for name in ("x", "residual")}
    per_sample = {name: torch.randn(samples, channels).to(dtype) for name in ("shift", "scale", "gate")}
    return made | per_sample | {"eps": 1e-6}


def _exact_modulated(x, residual, shift, scale, gate, eps):
    h = residual + gate[:, None] * x
    return [h, *_exact_rows(h, scale, shift, eps, norm=True)]


# ------------------------------------------------------------------------------------------------------ solvers


def _step(*names: str, **more: object) -> Callable[..., dict]:
    def make(samples=B, tokens=N, channels=C, dtype=torch.float32) -> dict:
        made = {name: torch.randn(samples, tokens, channels).to(dtype) for name in ("z", *names)}
        sigma = torch.linspace(1, 0.5, samples)
        made |= {"sigma": sigma, "next_sigma": sigma - 0.25, "active": torch.arange(samples) != 1}
        if "uncond" in names:
            made["guidance_scale"] = 1 + torch.rand(samples)
        return made | {name: value.clone() if name == "sigmas" else value for name, value in more.items()}

    return make


def _where(active, moved, z):
    return torch.where(active.view(-1, 1, 1), moved, z)


def _exact_euler(z, velocity, sigma, next_sigma, active, uncond, guidance_scale):
    scale = guidance_scale.view(-1, 1, 1)
    moved = z + (next_sigma - sigma).view(-1, 1, 1) * (uncond + scale * (velocity - uncond))
    return [_where(active, moved, z)]


def _exact_heun(z, first, second, sigma, next_sigma, active, uncond, second_uncond, guidance_scale):
    scale = guidance_scale.view(-1, 1, 1)
    mean = (uncond + scale * (first - uncond) + second_uncond + scale * (second - second_uncond)) / 2
    return [_where(active, z + (next_sigma - sigma).view(-1, 1, 1) * mean, z)]


def _exact_sde(z, velocity, noise, sigma, next_sigma, active, sigmas, noise_level):
    level = noise_level * (sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))).sqrt()
    s, dt, spread = (x.view(-1, 1, 1) for x in (sigma, next_sigma - sigma, level.square() / (2 * sigma)))
    mean = z + (velocity + spread * (z + (1 - s) * velocity)) * dt
    deviation = level.view(-1, 1, 1) * (-dt).sqrt()
    normal = torch.distributions.Normal(torch.zeros_like(mean), deviation.expand_as(mean), validate_args=False)
    return [_where(active, mean + deviation * noise, z), normal.log_prob(deviation * noise).flatten(1).mean(1)]


def _sde(**arguments) -> list[torch.Tensor]:
    return [arguments["z"], k.sde_step_(**arguments)]


SIGMAS = torch.linspace(1, 0, 5)
STEP = ("z", "sigma", "next_sigma")  # whose gradient would be lost, besides velocities

OPERATIONS = [
    Operation("routed_velocity_mse", lambda **a: list(k.routed_velocity_mse(**a)), _routed, _exact_routed,
              {**ONE_ROUNDING, torch.float32: 1e-5}, gradients=("student",), twice=True),
    Operation("fused_output_head_mse", lambda **a: [k.fused_output_head_mse(**a)], _heads, _exact_heads,
              PRODUCT, TRITON, gradients=("student",), transforms=False),
    Operation("routed_lora_linear", lambda **a: [k.routed_lora_linear(**a)], _lora, _exact_lora,
              PRODUCT, TRITON, gradients=("x", "adapters"), twice=True),
    Operation("euler_step_", lambda **a: [k.euler_step_(**a)], _step("velocity", "uncond"), _exact_euler,
              ONE_ROUNDING, refused=(*STEP, "velocity", "uncond", "guidance_scale"), in_place=True),
    Operation("heun_step_", lambda **a: [k.heun_step_(**a)], _step("first", "second", "uncond", "second_uncond"),
              _exact_heun, ONE_ROUNDING, in_place=True,
              refused=(*STEP, "first", "second", "uncond", "second_uncond", "guidance_scale")),
    Operation("sde_step_", _sde, _step("velocity", "noise", sigmas=SIGMAS, noise_level=0.7), _exact_sde,
              {**ONE_ROUNDING, torch.float32: 1e-5}, in_place=True, refused=(*STEP, "velocity", "noise", "sigmas")),
    Operation("fp8_quantize_rowwise", _numbers, _rows, _exact_rows, CODES, ("torch", "cpu", "triton"),
              refused=("x", "scale", "shift")),
    Operation("fp8_linear", lambda **a: [k.fp8_linear(**a)], _codes, _exact_codes,
              PRODUCT, TRITON, gradients=("x",), refused=("weight_scale", "bias"), transforms=False),
    Operation("fp8_linear, weight only", lambda **a: [k.fp8_linear(**a)], partial(_codes, weight_only=True),
              _exact_codes, HALVES, TRITON, gradients=("x",), refused=("weight_scale", "bias"), transforms=False),
    Operation("adaln_modulate", lambda **a: list(k.adaln_modulate(**a)), _modulated, _exact_modulated,
              PRODUCT, TRITON, gradients=("x", "residual", "shift", "scale", "gate"), twice=True),
]  # fmt: skip
