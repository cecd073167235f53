"""Bytes moved: of PyTorch's operators as they run, and of a Triton kernel by its own loads and stores.

`python -m danceopd_kernels.traffic` prints both beside the least possible, for the streaming operations.
"""

import math
import os
import sys
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class EagerTraffic(TorchDispatchMode):
    """Counts what every operator reads and writes, each tensor once an operator; views move nothing.

    read, written: bytes so far.
    """

    def __init__(self):
        super().__init__()
        self.read = self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        if func.is_view or "empty" in schema.name:
            return result
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        seen = {x.untyped_storage().data_ptr() for x in inputs}
        fresh = [x for x in outputs if x.untyped_storage().data_ptr() not in seen]
        if outputs and not fresh and not schema.is_mutable:
            return result  # an alias that is not declared a view, as `reshape` and `detach` give
        overwritten = schema.name in ("aten::copy_", "aten::fill_", "aten::zero_")
        self.read += sum(map(size, inputs[1:] if overwritten else inputs))
        self.written += sum(map(size, fresh if fresh else outputs))
        return result


def size(tensor: torch.Tensor) -> int:
    """Bytes of the memory behind a tensor that it covers: an expanded one's are counted once."""
    real = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(real) * tensor.element_size() if tensor.numel() else 0


@contextmanager
def triton_traffic():
    """Counts the bytes that Triton kernels load and store inside the block, masked lanes left out.

    Needs TRITON_INTERPRET=1. Gives {"read": bytes, "written": bytes}.
    """
    from triton.runtime import interpreter

    builder, moved = interpreter.interpreter_builder, {"read": 0, "written": 0}
    load, store = builder.create_masked_load, builder.create_masked_store

    def bytes_of(pointers, mask):
        return int(mask.data.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)

    def counted_load(pointers, mask, *rest):
        moved["read"] += bytes_of(pointers, mask)
        return load(pointers, mask, *rest)

    def counted_store(pointers, value, mask, *rest):
        moved["written"] += bytes_of(pointers, mask)
        return store(pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield moved
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


# Long: a case for each operation, one after the other.
def account(samples: int = 4, shape: tuple[int, ...] = (16, 64, 64), dtype=torch.bfloat16) -> list[tuple]:
    """Counts the bytes that operations move in Triton's interpreter and in eager PyTorch.

    Args:
        samples: Of a batch.
        shape: Of a sample's latents; the operations on tokens take 64 of 1024.
        dtype: Of both.

    Returns:
        (operation, bytes of its Triton kernels, least possible, eager PyTorch's) each. Least possible: every input read
        once and every output written once. The losses and adaln_modulate with a residual are with their gradients.
        Norms with modulation read scale and shift again for each program, the output head its weights for each tile;
        on a GPU these come from its cache.

    Raises:
        RuntimeError: Triton is not interpreted.

    Example:
        >>> account(samples=2)  # under TRITON_INTERPRET=1
    """
    from danceopd_kernels import (
        adaln_modulate,
        euler_step_,
        fp8_quantize_rowwise,
        fused_output_head_mse,
        heun_step_,
        output_head,
        routed_velocity_mse,
        sde_step_,
    )

    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("the bytes are counted in Triton's interpreter: set TRITON_INTERPRET=1 before importing it")
    randn = lambda *size: torch.randn(*size).to(dtype)  # noqa: E731
    route = torch.arange(samples) % 2
    counts = [int((route == m).sum()) for m in range(2)]
    student = randn(samples, *shape).requires_grad_()
    teachers, uncond = ([randn(n, *shape) for n in counts] for _ in range(2))
    scale = torch.full((samples,), 3.0)
    sigma, next_sigma = torch.full((samples,), 0.8), torch.full((samples,), 0.7)
    z, velocity, other, end, end_other = (randn(samples, *shape) for _ in range(5))
    x, modulation = randn(samples, 64, 1024), randn(samples, 1024)
    parts = [x.clone().requires_grad_(), modulation, modulation, randn(samples, 64, 1024).requires_grad_(), modulation]
    heads = [
        output_head.Head(randn(samples, 64, 1024), modulation, modulation, randn(64, 1024), randn(64)) for _ in range(2)
    ]
    learner = heads[0]._replace(hidden=heads[0].hidden.requires_grad_())
    branch = (randn(samples, 64, 1024), modulation, modulation)
    state, tokens = student.numel() * student.element_size(), size(x)
    guided = {"uncond": other, "guidance_scale": scale}

    def loss(backend):
        value = routed_velocity_mse(student, teachers, route, uncond=uncond, guidance_scale=scale, backend=backend)
        torch.autograd.grad(value, student)

    def step(backend):
        euler_step_(z, velocity, sigma, next_sigma, **guided, backend=backend)

    def heun(backend):
        heun_step_(z, velocity, end, sigma, next_sigma, second_uncond=end_other, **guided, backend=backend)

    def sde(backend):
        sde_step_(z, velocity, sigma, next_sigma, other, torch.tensor([1.0, 0.9, 0.0]), backend=backend)

    def quantize(backend):
        fp8_quantize_rowwise(x, norm=True, scale=modulation, shift=modulation, backend=backend)

    def modulate(backend):
        tokens, shift, scale, residual, gate = parts
        outputs = adaln_modulate(tokens, shift, scale, residual=residual, gate=gate, backend=backend)
        torch.autograd.grad(outputs, (tokens, residual), [y.detach() for y in outputs])

    def head_loss(backend):
        if backend == "torch":  # the composition, every velocity written; the operation's own PyTorch works in pieces
            rest = (route * 0, [branch], scale, None, None, 1e-6)
            value = output_head.reference(learner, [heads[1]], *rest).mean()
        else:
            value = fused_output_head_mse(learner, heads[1], uncond=branch, guidance_scale=scale, backend=backend)
        torch.autograd.grad(value, learner.hidden)

    rows = []
    for name, run, least in (
        ("routed_velocity_mse", loss, 4 * state),
        ("euler_step_", step, 4 * state),
        ("fp8_quantize_rowwise", quantize, tokens + tokens // x.element_size()),
        ("heun_step_", heun, 6 * state),
        ("sde_step_", sde, 4 * state),
        ("adaln_modulate", modulate, 10 * tokens),
        ("fused_output_head_mse", head_loss, 4 * tokens),
    ):
        with triton_traffic() as moved:
            run("triton")
        with EagerTraffic() as eager:
            run("torch")
        rows.append((name, moved["read"] + moved["written"], least, eager.read + eager.written))
    return rows


def main() -> None:
    print(f"{'operation':<24}{'Triton kernel':>16}{'least':>12}{'ratio':>8}{'eager PyTorch':>16}{'ratio':>8}")
    for name, moved, least, eager in account():
        print(f"{name:<24}{moved:>16,}{least:>12,}{moved / least:>8.3f}{eager:>16,}{eager / least:>8.2f}")
    print(
        "Norms with modulation read scale and shift again for each program, the output head its weights for each tile;"
    )
    print("on a GPU these come from its cache.")


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":  # too late to set now: the kernels are there already
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "danceopd_kernels.traffic"])
    main()
