"""Operation 6: layer norm without weights, modulated per sample; before it, if asked, a gated residual.

A part for other trainers: DanceOPD's does not use it (docs/kernels.md says what it saves).
"""

import torch

from danceopd_kernels import checks
from danceopd_kernels.dispatch import GRID, choose, has_triton, rows_of

if has_triton():
    import triton
    import triton.language as tl

DTYPES = checks.FLOATS
MAX_WIDTH = 4096  # a program has a whole row in registers
ROWS = 16  # tokens of one program of the backward pass, whose sums over tokens are kept


# ---------------------------------------------------------------------------------------------- definition


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def reference(x, shift, scale, residual, gate, eps):
    """(h, norm(h) (1 + scale) + shift) with h = residual + gate x, or x itself without a residual."""
    h = x
    if residual is not None:  # h is written out in the dtype of x, and that is what is normalised
        h = (_wide(residual) + _wide(gate)[:, None] * _wide(x)).to(x.dtype)
    out = torch.nn.functional.layer_norm(_wide(h), h.shape[-1:], eps=eps)
    out = out * (1 + _wide(scale)[:, None]) + _wide(shift)[:, None]
    return h, out.to(x.dtype)


# -------------------------------------------------------------------------------------------------- Triton

if has_triton():

    @triton.jit
    def _forward_kernel(
        x, shift, scale, residual, gate, h, out, mean, rstd,
        tokens, blocks, width, eps, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        sample = (tl.program_id(0) // blocks).to(tl.int64)
        token = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS))[:, None]
        column = tl.arange(0, BLOCK)[None, :]
        inside = (token < tokens) & (column < width)
        row, own = sample * tokens + token, sample * width + column
        at = row * width + column
        value = tl.load(x + at, inside, other=0.0).to(tl.float32)
        if GATED:
            g = tl.load(gate + own, column < width, other=0.0).to(tl.float32)
            value = tl.load(residual + at, inside, other=0.0).to(tl.float32) + g * value
            value = value.to(h.dtype.element_ty)
            tl.store(h + at, value, inside)
            value = value.to(tl.float32)
        m = tl.sum(value, 1, keep_dims=True) / width
        centred = tl.where(inside, value - m, 0.0)
        r = 1 / tl.sqrt(tl.sum(centred * centred, 1, keep_dims=True) / width + eps)
        s = tl.load(scale + own, column < width, other=0.0).to(tl.float32)
        b = tl.load(shift + own, column < width, other=0.0).to(tl.float32)
        tl.store(out + at, (centred * r * (1 + s) + b).to(out.dtype.element_ty), inside)
        tl.store(mean + row, m, token < tokens)
        tl.store(rstd + row, r, token < tokens)

    @triton.jit
    def _backward_kernel(
        grad_out, grad_h, x, h, scale, gate, mean, rstd,
        grad_x, grad_residual, sum_shift, sum_scale, sum_gate,
        tokens, width, blocks, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        sample, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
        column = tl.arange(0, BLOCK)
        inside = column < width
        s = tl.load(scale + sample * width + column, inside, other=0.0).to(tl.float32)
        total_shift = tl.zeros([BLOCK], tl.float32)
        total_scale = tl.zeros([BLOCK], tl.float32)
        total_gate = tl.zeros([BLOCK], tl.float32)
        for i in range(ROWS):
            token = block * ROWS + i
            if token < tokens:
                row = sample * tokens + token
                at = row * width + column
                dy = tl.load(grad_out + at, inside, other=0.0).to(tl.float32)
                value = tl.load(h + at, inside, other=0.0).to(tl.float32)
                r = tl.load(rstd + row)
                hat = tl.where(inside, (value - tl.load(mean + row)) * r, 0.0)
                total_shift += dy
                total_scale += dy * hat
                inner = tl.where(inside, dy * (1 + s), 0.0)
                dh = r * (inner - tl.sum(inner, 0) / width - hat * (tl.sum(inner * hat, 0) / width))
                if GATED:
                    dh += tl.load(grad_h + at, inside, other=0.0).to(tl.float32)
                    g = tl.load(gate + sample * width + column, inside, other=0.0).to(tl.float32)
                    total_gate += dh * tl.load(x + at, inside, other=0.0).to(tl.float32)
                    tl.store(grad_residual + at, dh.to(grad_residual.dtype.element_ty), inside)
                    dh = dh * g
                tl.store(grad_x + at, dh.to(grad_x.dtype.element_ty), inside)
        part = (sample * blocks + block) * width + column
        tl.store(sum_shift + part, total_shift, inside)
        tl.store(sum_scale + part, total_scale, inside)
        if GATED:
            tl.store(sum_gate + part, total_gate, inside)


def block_of(width: int) -> dict[str, int]:
    """A row's columns, rounded up, and the warps that share them: 16 entries a thread at most."""
    block = max(32, 1 << (width - 1).bit_length())
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 256))}


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, residual, gate, eps):
        b, tokens, width = x.shape
        rows, block, warps = rows_of(width)
        blocks = triton.cdiv(tokens, rows)
        gated = residual is not None
        out, h = torch.empty_like(x), torch.empty_like(x) if gated else x
        mean, rstd = (torch.empty(b * tokens, dtype=torch.float32, device=x.device) for _ in range(2))
        _forward_kernel[(b * blocks,)](
            x, shift, scale, residual if gated else x, gate if gated else shift, h, out, mean, rstd,
            tokens, blocks, width, eps, GATED=gated, ROWS=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        ctx.save_for_backward(x, h, scale, gate, mean, rstd)
        return (h, out) if gated else out

    @staticmethod
    @checks.once
    def backward(ctx, *upstream):
        grad_h, grad_out = (upstream[0].contiguous(), upstream[-1].contiguous())  # one and the same without a residual
        x, h, scale, gate, mean, rstd = ctx.saved_tensors
        b, tokens, width = x.shape
        gated, blocks = gate is not None, triton.cdiv(tokens, ROWS)
        grad_x, grad_residual = torch.empty_like(x), torch.empty_like(x) if gated else None
        sums = [torch.empty(b, blocks, width, dtype=torch.float32, device=x.device) for _ in range(3 if gated else 2)]
        _backward_kernel[(b, blocks)](
            grad_out, grad_h, x, h, scale, gate if gated else scale, mean, rstd,
            grad_x, grad_residual if gated else grad_x, *sums, *sums[: 3 - len(sums)],
            tokens, width, blocks, GATED=gated, ROWS=ROWS, **block_of(width),
        )  # fmt: skip
        shift, scale, *rest = (total.sum(1).to(x.dtype) for total in sums)
        return grad_x, shift, scale, grad_residual, *(rest or [None]), None


def configurations() -> list:
    """What resources.py compiles: the widths of SD3, Flux and the widest, by dtype, with and without a residual."""
    from danceopd_kernels.resources import Configuration

    pointers = dict.fromkeys(("mean", "rstd", "sum_shift", "sum_scale", "sum_gate"), "*fp32")
    pointers |= {"tokens": "i32", "width": "i32", "blocks": "i32", "eps": "fp32"}
    data = ("x", "shift", "scale", "residual", "gate", "h", "out", "grad_out", "grad_h", "grad_x", "grad_residual")
    result = []
    for dtype, widths in (("bf16", (1536, 3072, MAX_WIDTH)), ("fp16", (MAX_WIDTH,)), ("fp32", (MAX_WIDTH,))):
        for width in widths:
            for gated in (False, True):
                rows, block, warps = rows_of(width)
                forward = {"ROWS": rows, "BLOCK": block, "num_warps": warps}
                for direction, kernel, sizes, registers in (
                    ("forward", _forward_kernel, forward, 64),
                    ("backward", _backward_kernel, {"ROWS": ROWS} | block_of(width), 192 if dtype == "fp32" else 128),
                ):
                    warps = sizes.pop("num_warps")
                    name = f"adaln {dtype}, width {width}, {direction}" + ", gated" * gated
                    types = dict.fromkeys(data, f"*{dtype}") | pointers
                    odd = frozenset({"tokens", "blocks"})
                    result.append(
                        Configuration(
                            name, kernel, types, {"GATED": gated} | sizes, warps, registers, streaming=True, odd=odd
                        )
                    )
    return result


# ---------------------------------------------------------------------------------------------- operation


def adaln_modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalises rows and modulates them per sample: norm(x) (1 + scale) + shift, after a gated residual if asked.

    With a residual, h = residual + gate x comes first, and the rest is of h. The norm is over C, without weights, in
    float32. It is what diffusers' AdaLayerNormZero and AdaLayerNormContinuous do behind their linear layer, and, with a
    residual, what its blocks do between attention and feed-forward. Sums are in a fixed order, nothing waits for a GPU.

    Args:
        x: [B, N, C] in float32, bfloat16 or float16 (float64 in plain PyTorch).
        shift: [B, C], as the rest in x's dtype; a slice of a linear layer's output will do.
        scale: [B, C].
        residual: [B, N, C]; goes with gate.
        gate: [B, C].
        eps: Added to the variance.
        backend: "torch" or "triton"; the fastest that can if not given. Rows wider than 4096 are PyTorch's.

    Returns:
        The modulated rows, as x is; with a residual (h, modulated rows). Differentiable in every tensor, once.

    Raises:
        ValueError: An argument's type, shape, dtype or device does not fit, or the backend cannot run.

    Example:
        >>> x, modulation = torch.randn(2, 10, 32), torch.randn(2, 64)
        >>> out = adaln_modulate(x, *modulation.chunk(2, 1))
    """
    checks.tensor("x", x, dtype=(*DTYPES, torch.float64), shape=("B", "N", "C"))
    if (residual is None) != (gate is None):
        raise ValueError("a residual needs a gate, and a gate a residual")
    per_sample = (x.shape[0], x.shape[2])
    for name, tensor, shape in (
        ("shift", shift, per_sample),
        ("scale", scale, per_sample),
        ("residual", residual, tuple(x.shape)),
        ("gate", gate, per_sample),
    ):
        if tensor is not None or name in ("shift", "scale"):
            checks.tensor(name, tensor, dtype=x.dtype, shape=shape, like=x)
    eps = checks.number("eps", eps)
    if not x.shape[2]:
        raise ValueError(f"x holds no entry in a row: {list(x.shape)}")
    if choose(x, backend, DTYPES, limit=lambda _: _limit(x)) == "triton" and x.numel():
        return _Triton.apply(*(None if t is None else t.contiguous() for t in (x, shift, scale, residual, gate)), eps)
    h, out = reference(x, shift, scale, residual, gate, eps)
    return out if residual is None else (h, out)


def _limit(x: torch.Tensor) -> str | None:
    if x.shape[2] > MAX_WIDTH:
        return f"rows of {x.shape[2]}, {MAX_WIDTH} at most"
    return f"{x.shape[1]} rows a sample, {GRID * ROWS} at most" if x.shape[1] > GRID * ROWS else None
