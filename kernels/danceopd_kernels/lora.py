"""Operation 3: a frozen linear layer plus the low-rank adapter of each sample's route, ranks mixed in one launch.

Both factors lie as rows of one buffer each: A [R, in] and B transposed [R, out], R the sum of the ranks. So
three kernels serve both directions: shrink (tokens x factor), expand (onto a product) and the factor's gradient.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import torch

from danceopd_kernels import checks
from danceopd_kernels.dispatch import choose, has_triton
from danceopd_kernels.fp8 import FLOAT8, fp8_linear, input_gradient

if has_triton():
    import triton
    import triton.language as tl

DTYPES = checks.FLOATS
# On the host, an adapter's products with the tokens over its product with itself, from which that one is quicker.
MERGED = 4


@dataclass(frozen=True)
class Adapters:
    """Adapters packed by pack_adapters. A trainer may keep one and train its a and b, as two parameters."""

    a: torch.Tensor  # [R, in]
    b: torch.Tensor  # [R, out]: the columns of every B
    first: torch.Tensor  # [adapters + 1] int64: where the rows of each begin
    scale: torch.Tensor  # [adapters] float32
    rank: int  # the largest


# ---------------------------------------------------------------------------------------------- definition


def frozen_linear(x, weight, bias, weight_scale=None) -> torch.Tensor:
    """x weight^T + bias, differentiable in x alone; weight_scale: of codes."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if weight_scale is None:
        return torch.nn.functional.linear(x, weight, bias)
    return fp8_linear(x, weight, weight_scale, bias)


def reference(x, weight, bias, adapters: Adapters, route, weight_scale=None) -> torch.Tensor:
    """x [B, N, in]: the frozen product plus scale (x A^T) B^T, by gathering each sample's factors."""
    count = len(adapters.scale)
    known = (route >= 0) & (route < count)
    chosen = torch.where(known, route, 0)
    row = adapters.first[chosen, None] + torch.arange(adapters.rank, device=x.device)
    kept = known[:, None] & (row < adapters.first[chosen + 1, None])
    row = torch.where(kept, row, 0)
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype  # float16 would overflow before the scale
    a, b = (torch.where(kept[..., None], factor[row], 0).to(wide) for factor in (adapters.a, adapters.b))
    h = (x.to(wide) @ a.mT * adapters.scale[chosen, None, None]).to(wide)
    h = torch.where(kept[:, None], h, 0)  # 0 * inf must not reach the samples or the columns that are not there
    return (frozen_linear(x, weight, bias, weight_scale) + h @ b).to(x.dtype)


# ------------------------------------------------------------------------------------------------------ host


def merges(tokens: int, x: torch.Tensor, weight: torch.Tensor, weight_scale, gradient: bool) -> bool:
    """Whether so many tokens are multiplied by the sum of the weight and its adapter, which is dropped at once.

    It takes less than two more products with many tokens. In bfloat16 the sum would lose the small adapter's last bits.
    """
    if gradient or weight_scale is not None or x.dtype != torch.float32:
        return False
    return tokens * sum(weight.shape) > MERGED * weight.numel()


def on_host(x, weight, bias, adapters: Adapters, route: list[int], gradient: bool, weight_scale=None) -> torch.Tensor:
    """The definition where the routes are known: without masks, and equal routes in a row together.

    With a gradient all samples have one route. Not for float16, whose range a product may leave before it is scaled.
    """
    samples, tokens, width = x.shape
    rows, weight, bias = x.reshape(-1, width), weight.detach(), None if bias is None else bias.detach()
    runs = [(m, len(list(run))) for m, run in groupby(route)]
    first, scale, rank = adapters.first.tolist(), adapters.scale.tolist(), adapters.rank
    chosen, shortest = [m for m, _ in runs], tokens * min(length for _, length in runs)
    merge = merges(shortest, x, weight, weight_scale, gradient)
    alike = rank * len(scale) == first[-1] and min(chosen) >= 0 and len({scale[m] for m in chosen}) == 1
    if merge:
        out, end = x.new_empty(len(rows), len(weight)), 0
        for m, length in runs:
            begin, end = end, end + length * tokens
            total = weight
            if m >= 0:
                a, b = (f[first[m] : first[m + 1]].to(x.dtype) for f in (adapters.a, adapters.b))
                total = torch.addmm(weight, b.mT, a, alpha=scale[m])
            if bias is None:
                torch.mm(rows[begin:end], total.mT, out=out[begin:end])
            else:
                torch.addmm(bias, rows[begin:end], total.mT, out=out[begin:end])
    elif alike and len(runs) > 1:
        out = frozen_linear(rows, weight, bias, weight_scale)
        if len({length for _, length in runs}) > 1:
            chosen = route  # sample by sample
        factors = (f.reshape(len(scale), rank, -1) for f in (adapters.a, adapters.b))
        if chosen != list(range(len(scale))):
            index = torch.tensor(chosen)
            factors = (f.index_select(0, index) for f in factors)
        a, b = (f.to(x.dtype) for f in factors)
        parts = [t.view(len(chosen), -1, t.shape[1]) for t in (rows, out)]
        parts[1].baddbmm_(parts[0] @ a.mT, b, alpha=scale[chosen[0]])
    else:
        out, end = frozen_linear(rows, weight, bias, weight_scale), 0
        for m, length in runs:
            begin, end = end, end + length * tokens
            if m >= 0:
                a, b = (f[first[m] : first[m + 1]].to(x.dtype) for f in (adapters.a, adapters.b))
                part = out if len(runs) == 1 else out[begin:end]  # a view would cost its gradient a copy
                part.addmm_(rows[begin:end] @ a.mT, b, alpha=scale[m])
    return out.view(samples, tokens, -1)


# -------------------------------------------------------------------------------------------------- Triton

if has_triton():

    @triton.jit
    def _product(left, right, total, PRECISION: tl.constexpr):
        if PRECISION == "interpreted":  # the interpreter multiplies bfloat16's bits as if they were integers
            return tl.dot(left.to(tl.float32), right.to(tl.float32), total)
        return tl.dot(left, right, total, input_precision=PRECISION)

    @triton.jit
    def _shrink_kernel(
        v,  # [B, tokens, width]
        factor,  # [R, width]
        h,  # [B, tokens, padded]: scale v factor^T
        route,  # [B] int64
        first,
        scale,
        tokens,
        width,
        padded,
        adapters,
        blocks,  # of tokens, in a sample
        PRECISION: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        sample, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
        adapter = tl.load(route + sample)
        if (adapter < 0) | (adapter >= adapters):
            return
        start = tl.load(first + adapter)
        rank = (tl.load(first + adapter + 1) - start).to(tl.int32)
        r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        if tl.program_id(1) * BLOCK_R >= rank:
            return
        t = tl.arange(0, BLOCK_T)
        there = t < tokens - block * BLOCK_T
        base = sample.to(tl.int64) * tokens + block * BLOCK_T
        v += base * width
        factor += start * width
        total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        for c in range(0, width, BLOCK_C):
            column = c + tl.arange(0, BLOCK_C)
            inside = column < width
            left = tl.load(v + t[:, None] * width + column, there[:, None] & inside, other=0.0)
            right = tl.load(factor + r[:, None] * width + column, (r < rank)[:, None] & inside, other=0.0)
            total = _product(left, tl.trans(right.to(left.dtype)), total, PRECISION)
        # The columns beyond the rank are zero by the mask, but 0 * inf is not.
        total = tl.where(r < rank, total * tl.load(scale + adapter), 0.0)
        at = h + base * padded + t[:, None] * padded + r
        tl.store(at, total.to(h.dtype.element_ty), there[:, None])

    @triton.jit
    def _expand_kernel(
        h,  # [B, tokens, padded]
        factor,  # [R, width]
        out,  # [B, tokens, width]: h factor is added to it
        route,
        first,
        tokens,
        width,
        padded,
        adapters,
        blocks,
        PRECISION: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        sample, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
        adapter = tl.load(route + sample)
        if (adapter < 0) | (adapter >= adapters):
            return
        start = tl.load(first + adapter)
        rank = (tl.load(first + adapter + 1) - start).to(tl.int32)
        t = tl.arange(0, BLOCK_T)
        there = t < tokens - block * BLOCK_T
        column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = column < width
        base = sample.to(tl.int64) * tokens + block * BLOCK_T
        h += base * padded
        factor += start * width
        total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for begin in range(0, rank, BLOCK_R):
            r = begin + tl.arange(0, BLOCK_R)
            left = tl.load(h + t[:, None] * padded + r, there[:, None], other=0.0)
            right = tl.load(factor + r[:, None] * width + column, (r < rank)[:, None] & inside, other=0.0)
            total = _product(left, right.to(left.dtype), total, PRECISION)
        at = out + base * width + t[:, None] * width + column
        mask = there[:, None] & inside
        total += tl.load(at, mask, other=0.0).to(tl.float32)
        tl.store(at, total.to(out.dtype.element_ty), mask)

    @triton.jit
    def _factor_kernel(
        h,  # [B, tokens, padded]
        v,  # [B, tokens, width]
        partial,  # [splits, R, width] float32: sums over tokens of h^T v, of each adapter's own samples
        order,  # [B] int64: samples, those of adapter 0 first
        bounds,  # [adapters + 1] int64: where those of each begin
        first,
        tokens,
        width,
        padded,
        total_rank,
        blocks,
        splits,
        PRECISION: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        adapter, split = tl.program_id(2) // splits, tl.program_id(2) % splits
        start = tl.load(first + adapter)
        rank = (tl.load(first + adapter + 1) - start).to(tl.int32)
        r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        if tl.program_id(1) * BLOCK_R >= rank:
            return
        column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = column < width
        begin = tl.load(bounds + adapter)
        steps = (tl.load(bounds + adapter + 1) - begin).to(tl.int32) * blocks
        each = tl.cdiv(steps, splits)
        total = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
        for i in range(split * each, min((split + 1) * each, steps)):
            block = i % blocks
            t = tl.arange(0, BLOCK_T)
            there = (t < tokens - block * BLOCK_T)[:, None]
            base = tl.load(order + begin + i // blocks) * tokens + block * BLOCK_T
            left = tl.load(v + base * width + t[:, None] * width + column, there & inside, other=0.0)
            right = tl.load(h + base * padded + t[:, None] * padded + r, there, other=0.0)
            total = _product(tl.trans(left), right, total, PRECISION)
        at = partial + (split.to(tl.int64) * total_rank + start) * width + r * width + column[:, None]
        tl.store(at, total, (r < rank) & inside[:, None])


def blocks_of(rank: int, dtype: torch.dtype, factor: bool = False) -> dict[str, int]:
    """Block sizes for the largest rank. Hopper's tensor cores want 64 rows: tokens, or columns of a factor's gradient.

    In float32, where a product takes three, larger blocks of the rest would spill.
    """
    wide = dtype != torch.float32
    rows, others = 64, 64 if wide else 32
    sizes = {"BLOCK_R": min(others, max(16, 1 << (rank - 1).bit_length()))}
    return sizes | ({"BLOCK_T": others, "BLOCK_C": rows} if factor else {"BLOCK_T": rows, "BLOCK_C": others})


def precision_of(dtype: torch.dtype) -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreted"
    return "tf32x3" if dtype == torch.float32 else "ieee"  # three tf32 products make one of nearly float32


def shrink(v: torch.Tensor, factor: torch.Tensor, adapters: Adapters, route: torch.Tensor) -> torch.Tensor:
    """[B, tokens, rank padded to blocks]: scale v factor^T. Only the blocks of ranks that are there are filled."""
    (b, tokens, width), sizes = v.shape, blocks_of(adapters.rank, v.dtype)
    rank_blocks, blocks = triton.cdiv(adapters.rank, sizes["BLOCK_R"]), triton.cdiv(tokens, sizes["BLOCK_T"])
    h = v.new_empty(b, tokens, rank_blocks * sizes["BLOCK_R"])
    _shrink_kernel[(b * blocks, rank_blocks)](
        v, factor, h, route, adapters.first, adapters.scale, tokens, width, h.shape[2], len(adapters.scale), blocks,
        PRECISION=precision_of(v.dtype), **sizes, num_warps=4,
    )  # fmt: skip
    return h


def expand_(out: torch.Tensor, h: torch.Tensor, factor: torch.Tensor, adapters: Adapters, route: torch.Tensor) -> None:
    """out += h factor, each sample with its own adapter's rows."""
    (b, tokens, width), sizes = out.shape, blocks_of(adapters.rank, out.dtype)
    blocks = triton.cdiv(tokens, sizes["BLOCK_T"])
    _expand_kernel[(b * blocks, triton.cdiv(width, sizes["BLOCK_C"]))](
        h, factor, out, route, adapters.first, tokens, width, h.shape[2], len(adapters.scale), blocks,
        PRECISION=precision_of(out.dtype), **sizes, num_warps=4,
    )  # fmt: skip


def factor_gradient(h: torch.Tensor, v: torch.Tensor, adapters: Adapters, order, bounds) -> torch.Tensor:
    """[R, width] float32: h^T v summed over the tokens of each adapter's samples, in a fixed order."""
    (b, tokens, width), count = v.shape, len(adapters.scale)
    sizes = blocks_of(adapters.rank, v.dtype, factor=True)
    blocks, rank_blocks = triton.cdiv(tokens, sizes["BLOCK_T"]), triton.cdiv(adapters.rank, sizes["BLOCK_R"])
    columns = triton.cdiv(width, sizes["BLOCK_C"])
    splits = max(1, min(16, b * blocks, 1024 // (columns * rank_blocks * count)))  # enough programs for a large GPU
    partial = torch.empty(splits, len(adapters.a), width, dtype=torch.float32, device=v.device)
    _factor_kernel[(columns, rank_blocks, count * splits)](
        h, v, partial, order, bounds, adapters.first, tokens, width, h.shape[2], len(adapters.a), blocks, splits,
        PRECISION=precision_of(v.dtype), **sizes, num_warps=4,
    )  # fmt: skip
    return partial.sum(0)


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, weight_scale, a, b, first, scale, rank, route):
        adapters = Adapters(a, b, first, scale, rank)
        with checks.own_precision(x.device):
            out = frozen_linear(x, weight, bias, weight_scale)
        h = shrink(x, a, adapters, route)
        expand_(out, h, b, adapters, route)
        ctx.save_for_backward(x, weight, weight_scale, a, b, first, scale, route, h)
        ctx.rank = rank
        return out

    @staticmethod
    @checks.once
    def backward(ctx, grad):
        x, weight, weight_scale, a, b, first, scale, route, h = ctx.saved_tensors
        adapters, grad = Adapters(a, b, first, scale, ctx.rank), grad.contiguous()
        needs_x, _, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = None
        if needs_x or needs_a:
            grad_h = shrink(grad, b, adapters, route)
        if needs_x:
            with checks.own_precision(x.device):
                coded = weight_scale is not None
                grad_x = input_gradient(grad, weight, weight_scale, grad.dtype) if coded else grad @ weight
            expand_(grad_x, grad_h, a, adapters, route)
        if needs_a or needs_b:
            ordered, order = route.sort(stable=True)
            bounds = torch.searchsorted(ordered, torch.arange(len(scale) + 1, device=route.device))
        if needs_a:
            grad_a = factor_gradient(grad_h, x, adapters, order, bounds).to(a.dtype)
        if needs_b:
            grad_b = factor_gradient(h, grad, adapters, order, bounds).to(b.dtype)
        return grad_x, None, None, None, grad_a, grad_b, None, None, None, None


def configurations() -> list:
    """What resources.py compiles: the three kernels for a layer 3072 wide, by dtype and largest rank."""
    from danceopd_kernels.resources import Configuration

    integers = dict.fromkeys(("route", "first", "order", "bounds"), "*i64")
    integers |= dict.fromkeys(("tokens", "width", "padded", "adapters", "total_rank", "blocks", "splits"), "i32")
    odd = frozenset({"adapters", "blocks", "splits"})
    result = []
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        types = integers | {"scale": "*fp32", "partial": "*fp32"}
        types |= dict.fromkeys(("v", "factor", "h", "out"), f"*{short}")
        for rank in (16, 64):
            for name, kernel in (("shrink", _shrink_kernel), ("expand", _expand_kernel), ("factor", _factor_kernel)):
                constants = blocks_of(rank, dtype, name == "factor") | {"PRECISION": precision_of(dtype)}
                name, limit = f"routed_lora_linear {name} {short}, rank {rank}", 200 if short == "fp32" else 144
                result.append(Configuration(name, kernel, types, constants, 4, limit, product=True, odd=odd))
    return result


# ---------------------------------------------------------------------------------------------- operation


@cache
def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A small tensor copied to the device once, so that later calls may be captured in a graph."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def pack_adapters(
    adapters: Sequence[tuple[torch.Tensor, torch.Tensor]], scale: torch.Tensor | Sequence[float] | float | None = None
) -> Adapters:
    """Packs low-rank adapters, of any ranks, in one buffer a side.

    To train the buffers themselves, pack detached factors once and let the optimiser have .a and .b after
    requires_grad_().

    Args:
        adapters: Pairs (A [rank, in], B [out, rank]) of one floating-point dtype; a rank may be 0, but not all.
        scale: A number, or one of each adapter as numbers or a floating-point tensor; 1 if not given. PEFT's
            lora_alpha / r.

    Returns:
        The Adapters, differentiable in every A and B.

    Raises:
        ValueError: A type, shape, dtype or device does not fit.

    Example:
        >>> adapters = pack_adapters([(torch.randn(r, 32), torch.randn(24, r)) for r in (4, 8)], scale=[1.0, 0.5])
    """
    if not isinstance(adapters, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in adapters):
        raise ValueError("adapters must be a list of pairs (A [rank, in], B [out, rank]), or what pack_adapters made")
    for i, (a, b) in enumerate(adapters):
        if i == 0:
            checks.tensor("adapter 0: A", a, dtype=(*DTYPES, torch.float64), shape=("rank", "in"))
            checks.tensor("adapter 0: B", b, dtype=a.dtype, shape=("out", len(a)), like=a)
            a0, b0 = a, b
        checks.tensor(f"adapter {i}: A", a, dtype=a0.dtype, shape=("rank", a0.shape[1]), like=a0)
        checks.tensor(f"adapter {i}: B", b, dtype=a0.dtype, shape=(len(b0), len(a)), like=a0)
    if not any(a.numel() for a, _ in adapters):
        raise ValueError("no adapter of a rank above 0 was given")
    first = [0]
    for a, _ in adapters:
        first.append(first[-1] + len(a))
    if not isinstance(scale, torch.Tensor):
        numbers = scale if isinstance(scale, list | tuple) else [1.0 if scale is None else scale] * len(adapters)
        scale = _constant(tuple(checks.number("scale", number) for number in numbers), torch.float32, a0.device)
    checks.tensor("scale", scale, dtype=(*DTYPES, torch.float64), shape=(len(adapters),), like=a0)
    return Adapters(
        torch.cat([a for a, _ in adapters]),
        torch.cat([b.mT for _, b in adapters]),
        _constant(tuple(first), torch.int64, a0.device),
        scale.detach().float(),
        max(len(a) for a, _ in adapters),
    )


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Applies a frozen linear layer and one adapter for all rows, as routed_lora_linear does: without a route to read.

    Args:
        x: [..., in], not empty.
        weight: W [out, in], frozen, in x's dtype or in codes.
        bias: [out], frozen; or None.
        a: A [rank, in].
        b: B [out, rank].
        scale: Of what the adapter adds.
        weight_scale: [out, 1] float32, of codes.

    Returns:
        [..., out] in x's dtype. Differentiable in x, A and B.
    """
    plain = x.device.type == "cpu" and x.dtype != torch.float16 and choose(x, None, DTYPES) != "triton"
    if not plain or torch.compiler.is_compiling():
        first, alone = (_constant(values, torch.int64, x.device) for values in ((0, len(a)), (0,)))
        adapters = Adapters(a, b.mT, first, _constant((scale,), torch.float32, x.device), len(a))
        rows = x.reshape(1, -1, x.shape[-1])
        out = routed_lora_linear(rows, weight, bias, adapters, alone, weight_scale=weight_scale)
    else:
        rows, a, b = x.reshape(-1, x.shape[-1]), a.to(x.dtype), b.to(x.dtype)
        gradient = torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad)
        with checks.own_precision(x.device):
            if merges(len(rows), x, weight, weight_scale, gradient):
                out = frozen_linear(rows, torch.addmm(weight, b, a, alpha=scale), bias)
            else:
                out = frozen_linear(rows, weight, bias, weight_scale).addmm_(rows @ a.mT, b.mT, alpha=scale)
    return out.reshape(*x.shape[:-1], len(weight))


def routed_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: Adapters | Sequence[tuple[torch.Tensor, torch.Tensor]],
    route: torch.Tensor,
    scale: torch.Tensor | Sequence[float] | float | None = None,
    *,
    weight_scale: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Applies a frozen linear layer and each sample's own low-rank adapter: x W^T + bias + scale_m (x A_m^T) B_m^T.

    m is the sample's route. Accumulates in float32, gradients over samples in a fixed order; autocast does not reach
    inside. Nothing waits for a GPU; to capture it in a graph, run it once before, for the small constant tensors are
    copied then.

    Args:
        x: [B, N, in] or [B, in] in float32, bfloat16 or float16 (float64 in plain PyTorch), not empty.
        weight: W [out, in] in x's dtype, frozen; or float8_e4m3fn codes with weight_scale, whose product is
            fp8_linear's.
        bias: [out] in x's dtype, frozen; or None.
        adapters: Pairs A [rank, in], B [out, rank] of different ranks, or what pack_adapters made of them; in x's dtype
            or float32, in which their gradients come back.
        route: [B] int64; -1 is no adapter, and on a GPU, where it is not checked, so is any other number that no
            adapter has.
        scale: As in pack_adapters; part of packed adapters.
        weight_scale: [out, 1] float32, of codes.
        backend: "torch" or "triton"; the fastest that can if not given.

    Returns:
        [B, N, out] or [B, out] in x's dtype. Differentiable in x and every A and B.

    Raises:
        ValueError: An argument's type, shape, dtype or device does not fit, or the backend cannot run.

    Example:
        >>> adapters = pack_adapters([(torch.randn(r, 32), torch.randn(24, r)) for r in (4, 8)])
        >>> x, weight, route = torch.randn(3, 10, 32), torch.randn(24, 32), torch.tensor([0, 1, -1])
        >>> out = routed_lora_linear(x, weight, None, adapters, route)
    """
    if isinstance(adapters, Adapters):
        if scale is not None:
            raise ValueError("packed adapters hold their scale; give it to pack_adapters")
    else:
        adapters = pack_adapters(adapters, scale)
    routes = _check(x, weight, bias, weight_scale, adapters, route)
    flat = x if x.dim() == 3 else x[:, None]
    if choose(x, backend, DTYPES) == "triton":
        fixed = [None if t is None else t.detach().contiguous() for t in (weight, bias, weight_scale)]
        rest = (adapters.first.contiguous(), adapters.scale.contiguous(), adapters.rank, route.contiguous())
        out = _Triton.apply(flat.contiguous(), *fixed, adapters.a.contiguous(), adapters.b.contiguous(), *rest)
    else:
        gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x, adapters.a, adapters.b))
        with checks.own_precision(x.device):
            if routes and x.dtype != torch.float16 and (not gradient or len(set(routes)) == 1):
                out = on_host(flat, weight, bias, adapters, routes, gradient, weight_scale)
            else:
                out = reference(flat, weight, bias, adapters, route, weight_scale)
    return out if x.dim() == 3 else out[:, 0]


def _check(x, weight, bias, weight_scale, adapters, route) -> list[int] | None:
    """The routes, where they can be read without waiting: on the host."""
    checks.tensor("x", x, dtype=(*DTYPES, torch.float64))
    if x.dim() not in (2, 3) or not x.numel():
        raise ValueError(f"x must be [B, N, in] or [B, in] and not empty, got {list(x.shape)}")
    checks.tensor("weight", weight, dtype=(x.dtype, FLOAT8), shape=("out", x.shape[-1]), like=x)
    out, width = weight.shape
    if (weight_scale is None) != (weight.dtype != FLOAT8):
        raise ValueError("weight_scale goes with a weight in codes, float8_e4m3fn, and codes need it")
    if weight_scale is not None:
        checks.tensor("weight_scale", weight_scale, dtype=torch.float32, shape=(out, 1), like=x)
    if bias is not None:
        checks.tensor("bias", bias, dtype=x.dtype, shape=(out,), like=x)
    kinds = (x.dtype, torch.float32)
    rows = checks.tensor("the adapters' A", adapters.a, dtype=kinds, shape=("ranks", width), like=x).shape[0]
    checks.tensor("the adapters' B, transposed,", adapters.b, dtype=adapters.a.dtype, shape=(rows, out), like=x)
    count = checks.tensor(
        "the adapters' scale", adapters.scale, dtype=torch.float32, shape=("adapters",), like=x
    ).shape[0]
    checks.tensor("the adapters' first", adapters.first, dtype=torch.int64, shape=(count + 1,), like=x)
    checks.tensor("route", route, dtype=torch.int64, shape=x.shape[:1], like=x)
    if route.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    routes = route.tolist()
    if not -1 <= min(routes) <= max(routes) < count:
        raise ValueError(f"route must name one of {count} adapters, or -1 for none, got {min(routes)} to {max(routes)}")
    return routes
