"""Operation 1: gather each sample's teacher by route, combine guidance, squared error and its gradient, in one pass."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from danceopd_kernels import checks, compiled
from danceopd_kernels.dispatch import GRID, choose, has_triton

if has_triton():
    import triton
    import triton.language as tl

DTYPES = checks.FLOATS
BACKENDS = ("cpu", "cuda", "triton")
MAX_TEACHERS = 8
LARGEST_BLOCK = 4096  # entries of one program of Triton's
REDUCTIONS = ("mean", "none")


# ---------------------------------------------------------------------------------------------- definition


def packed_rows(route: torch.Tensor) -> torch.Tensor:
    """[B] int64: the row of each sample where teacher 0's samples are packed first, then teacher 1's, ..."""
    rows = torch.empty_like(route)
    rows[route.argsort(stable=True)] = torch.arange(len(route), device=route.device)
    return rows


def reference(student, teachers, route, row, uncond, uncond_row, guidance_scale, weight, mask, norms):
    """The operation in plain PyTorch: each sample's loss [B], and its error and norms [3, B] if asked, else None.

    In float32, or float64 for a student in float64. The rest as _loss_and_gradient has it.
    """
    target = _gathered(teachers, route, row)
    if uncond:
        base = _gathered(uncond, route, uncond_row)
        target = base + _wide(guidance_scale, student) * (target - base)
    velocity, count, kept = student.to(target.dtype), student[0].numel(), None
    error = velocity - target
    if mask is not None:
        kept = mask.view(*mask.shape, *(1,) * (student.dim() - mask.dim())).expand_as(student)
        error = torch.where(kept, error, 0.0)  # what is masked does not count, not even where it is NaN
        count = kept.flatten(1).sum(1).clamp(min=1)
    unweighted = error.square().flatten(1).sum(1) / count
    loss = unweighted if weight is None else unweighted * weight
    if not norms:
        return loss, None
    both = [x if kept is None else torch.where(kept, x, 0.0) for x in (velocity.detach(), target)]
    return loss, torch.stack([unweighted.detach(), *(x.square().flatten(1).sum(1).sqrt() for x in both)])


def _wide(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.view(-1, *(1,) * (like.dim() - 1))


def _gathered(tensors: list[torch.Tensor], route: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """[B, ...] float32 or more: each sample's row of the tensor that its route names, or of the only one."""
    if len(tensors) == 1:
        picked = tensors[0].index_select(0, row)
    else:
        sizes = [len(t) for t in tensors]
        before = sum((route > m) * n for m, n in enumerate(sizes))
        known = (row >= 0) & (row < sum((route == m) * n for m, n in enumerate(sizes)))
        picked = torch.cat(tensors).index_select(0, torch.where(known, before + row, sum(sizes)))
    return picked.to(torch.promote_types(picked.dtype, torch.float32))


# -------------------------------------------------------------------------------------------------- Triton

if has_triton():
    # What changes from call to call is not specialised.
    # Long: one kernel, which nothing may be called from without a price.
    @triton.jit(do_not_specialize=[*(f"{x}{i}" for x in "nk" for i in range(8)), "multiplier", "shift"])
    def _kernel(
        student,
        t0, t1, t2, t3, t4, t5, t6, t7,
        u0, u1, u2, u3, u4, u5, u6, u7,
        n0, n1, n2, n3, n4, n5, n6, n7,  # rows of each teacher's tensor
        k0, k1, k2, k3, k4, k5, k6, k7,  # and of its uncond's
        route,  # [B] int64
        row,  # [B] int64: of the sample in its teacher's tensor
        uncond_row,  # [B] int64: in its uncond's
        guidance_scale,  # [B] float32
        factor,  # [B] float32: 2 * weight / count, the gradient's factor
        mask,  # [B, n // inner] bool
        gradient,
        partial,  # [1 or 3, B, chunks] float32: sums of squared errors; of velocity's and target's squares
        n,  # elements of a sample
        inner,  # elements that one entry of the mask covers
        multiplier, shift,  # that divide by inner, as `division` has it
        chunks,
        TEACHERS: tl.constexpr,
        GUIDED: tl.constexpr,
        MASKED: tl.constexpr,
        MULTIPLIED: tl.constexpr,  # whether elements are divided by a product, which pays where each is
        NORMS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        sample = tl.program_id(0).to(tl.int64)
        chunk = tl.program_id(1)
        m = tl.load(route + sample)
        teacher, uncond, rows, uncond_rows = t0, u0, n0, k0
        for i in tl.static_range(1, TEACHERS):
            teacher = tl.where(m == i, (t1, t2, t3, t4, t5, t6, t7)[i - 1], teacher)
            rows = tl.where(m == i, (n1, n2, n3, n4, n5, n6, n7)[i - 1], rows)
            if GUIDED:
                uncond = tl.where(m == i, (u1, u2, u3, u4, u5, u6, u7)[i - 1], uncond)
                uncond_rows = tl.where(m == i, (k1, k2, k3, k4, k5, k6, k7)[i - 1], uncond_rows)
        offset = chunk * BLOCK + tl.arange(0, BLOCK)  # in 32 bits, which `limit` keeps a sample's elements in
        inside = offset < n
        here, there = sample * n, tl.load(row + sample)
        # A row that is not there is not read, and its sample's loss and gradient are NaN.
        known = (m >= 0) & (m < TEACHERS) & (there >= 0) & (there < rows)
        if GUIDED:
            uncond_there = tl.load(uncond_row + sample)
            known = known & (uncond_there >= 0) & (uncond_there < uncond_rows)
        readable = offset < tl.where(known, n, 0)
        v = tl.load(student + here + offset, inside, other=0.0).to(tl.float32)
        target = tl.load(teacher + there * n + offset, readable, other=0.0).to(tl.float32)
        if GUIDED:
            base = tl.load(uncond + uncond_there * n + offset, readable, other=0.0).to(tl.float32)
            target = base + tl.load(guidance_scale + sample) * (target - base)
        target = tl.where(known, target, float("nan"))
        error = v - target
        if MASKED:
            if MULTIPLIED:
                entry = tl.umulhi(offset.to(tl.uint32), multiplier.to(tl.uint32, bitcast=True)) >> shift
            else:
                entry = offset // inner
            kept = tl.load(mask + sample * (n // inner) + entry, inside, other=0) != 0
            error = tl.where(kept, error, 0.0)
        at = partial + sample * chunks + chunk
        tl.store(at, tl.sum(error * error))
        if NORMS:
            if MASKED:
                v = tl.where(kept, v, 0.0)
                target = tl.where(kept, target, 0.0)
            plane = tl.num_programs(0).to(tl.int64) * chunks
            tl.store(at + plane, tl.sum(v * v))
            tl.store(at + 2 * plane, tl.sum(target * target))
        scaled = error * tl.load(factor + sample)
        if MASKED:
            scaled = tl.where(kept, scaled, 0.0)  # not 0 times a weight that is not finite
        tl.store(gradient + here + offset, scaled.to(gradient.dtype.element_ty), inside)

    @triton.jit
    def _rescale_kernel(gradient, upstream, n, BLOCK: tl.constexpr):
        sample = tl.program_id(0).to(tl.int64)
        factor = tl.load(upstream + sample)
        if factor == 1.0:  # a plain loss.backward(): nothing is read or written
            return
        offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = offset < n
        value = tl.load(gradient + sample * n + offset, inside, other=0.0).to(tl.float32)
        tl.store(gradient + sample * n + offset, (value * factor).to(gradient.dtype.element_ty), inside)


def division(divisor: int) -> tuple[int, int]:
    """What x // divisor is made of for a divisor of 2 or more and x in 31 bits: (x * multiplier >> 32) >> shift.

    Returns:
        The multiplier, which has 32 bits, as a signed number; and the shift.
    """
    bits = (divisor - 1).bit_length()
    return -(-(2 ** (31 + bits)) // divisor) - 2**32, bits - 1


def block_of(elements: int) -> tuple[int, int]:
    """Elements of one program and its warps: 8 loads of 16 bytes a thread at most, less for small samples."""
    block = min(LARGEST_BLOCK, max(256, 1 << (elements - 1).bit_length()))
    return block, 4 if block >= 1024 else 2


def limit(backend: str, samples: torch.Tensor) -> str | None:
    """Why a backend's grid is too small for samples [B, ...], in chunks of a block or of the compiled kernels'."""
    if backend == "cuda" and samples.shape[0] > GRID:
        return f"{samples.shape[0]} samples, {GRID} at most"
    if backend == "triton" and samples.numel() > samples.shape[0] * GRID * LARGEST_BLOCK:
        return f"samples of {samples.numel() // samples.shape[0]} entries, {GRID * LARGEST_BLOCK} at most"
    return None


def run_triton(
    student, teachers, route, row, uncond, uncond_row, guidance_scale, factor, mask, norms, gradient
) -> torch.Tensor:
    """Fill gradient; return each sample's sum of squared errors [B]; with norms [3, B], of velocity and target too."""
    b, n = len(student), student[0].numel()
    block, warps = block_of(n)
    chunks, inner = triton.cdiv(n, block), 1 if mask is None else n // mask[0].numel()
    divided = inner > 1 and inner % 16 != 0  # else there is nothing to divide, or Triton divides once for 8 elements
    partial = torch.empty(*[3] * norms, b, chunks, dtype=torch.float32, device=student.device)
    sides = [teachers + [student] * (MAX_TEACHERS - len(teachers)), uncond + [student] * (MAX_TEACHERS - len(uncond))]
    sizes = [[len(t) for t in side] + [0] * (MAX_TEACHERS - len(side)) for side in (teachers, uncond)]
    _kernel[(b, chunks)](
        student,
        *sides[0],
        *sides[1],
        *sizes[0],
        *sizes[1],
        route,
        row,
        uncond_row if uncond else row,
        factor if guidance_scale is None else guidance_scale,
        factor,
        factor if mask is None else mask.view(torch.uint8),
        gradient,
        partial,
        n,
        inner,
        *(division(inner) if divided else (-1, 0)),
        chunks,
        TEACHERS=len(teachers),
        GUIDED=bool(uncond),
        MASKED=mask is not None,
        MULTIPLIED=divided,
        NORMS=norms,
        BLOCK=block,
        num_warps=warps,
    )
    return partial.sum(2 if norms else 1)


def configurations() -> list:
    """What resources.py compiles: the launcher's choice for a 1024 px latent, by dtype, teachers, guidance and mask."""
    from danceopd_kernels.resources import Configuration

    pointers = dict.fromkeys(("guidance_scale", "factor", "partial"), "*fp32")
    pointers |= {"route": "*i64", "row": "*i64", "uncond_row": "*i64", "mask": "*i8"}
    pointers |= dict.fromkeys(("n", "inner", "multiplier", "shift", "chunks"), "i32")
    rows = [f"{x}{i}" for x in "nk" for i in range(8)]
    pointers |= dict.fromkeys(rows, "i32")
    result = []
    block, warps = block_of(16 * 128 * 128)
    for dtype in ("bf16", "fp16", "fp32"):
        data = dict.fromkeys(("student", *(f"{x}{i}" for x in "tu" for i in range(8))), f"*{dtype}")
        data["gradient"] = "*fp32" if dtype == "fp16" else f"*{dtype}"
        for teachers, guided, masked, norms in (
            (1, False, False, False),
            (1, True, False, True),
            (2, True, False, False),
            (8, True, True, True),
        ):
            name = f"routed_velocity_mse {dtype}, {teachers} teacher" + "s" * (teachers > 1)
            name += ", guided" * guided + ", masked" * masked + ", norms" * norms
            flags = {"GUIDED": guided, "MASKED": masked, "MULTIPLIED": False, "NORMS": norms}
            constants, types = {"TEACHERS": teachers, **flags, "BLOCK": block}, data | pointers
            odd = frozenset({*rows, "multiplier", "shift"})
            result.append(Configuration(name, _kernel, types, constants, warps, 128, streaming=True, odd=odd))
            if masked and dtype == "bf16":  # Triton compiles other code for 1, for multiples of 16, and for the rest
                each, rest = {**constants, "inner": 1}, {**constants, "MULTIPLIED": True}
                result.append(replace(result[-1], name=f"{name}, a mask of elements", constants=each))
                result.append(
                    replace(result[-2], name=f"{name}, any elements an entry", constants=rest, odd=odd | {"inner"})
                )
        if dtype == "fp16":  # kept in float32, and scaled by PyTorch
            continue
        types = {"gradient": f"*{dtype}", "upstream": "*fp32", "n": "i32"}
        name = f"routed_velocity_mse {dtype}, gradient rescaled"
        result.append(Configuration(name, _rescale_kernel, types, {"BLOCK": block}, warps, 64, streaming=True))
    return result


# ------------------------------------------------------------------------------------------------- compiled


def run_compiled(
    backend, student, teachers, route, row, uncond, uncond_row, guidance_scale, factor, mask, norms, gradient
) -> torch.Tensor:
    """As run_triton, by the compiled kernels of the host or the device."""
    b, n = student.shape[0], student.numel() // student.shape[0]
    sums = torch.empty(*[3] * norms, b, compiled.chunks(backend, n), dtype=torch.float32, device=student.device)
    compiled.call(
        backend,
        "routed_velocity_mse",
        student.dtype,
        student.device,
        student=student,
        teachers=teachers,
        uncond=uncond,
        rows=[t.shape[0] for t in teachers],
        uncond_rows=[t.shape[0] for t in uncond],
        guided=bool(uncond),
        norms=norms,
        route=route,
        row=row,
        uncond_row=uncond_row,
        guidance_scale=guidance_scale,
        factor=factor,
        mask=mask,
        inner=1 if mask is None else n // mask[0].numel(),
        gradient=gradient,
        sums=sums,
        samples=b,
        elements=n,
    )
    return sums.sum(2 if norms else 1)


# ---------------------------------------------------------------------------------------------- operation


class Matched(NamedTuple):
    """What routed_velocity_mse returns with norms; each [B] float32 (float64 for a student in float64)."""

    loss: torch.Tensor  # or a number, by reduction
    error: torch.Tensor  # the mean squared error, not weighted
    velocity_norm: torch.Tensor  # Euclidean, of what the mask keeps
    target_norm: torch.Tensor  # of the guided target


def packed_index(route: torch.Tensor, teachers: int) -> torch.Tensor:
    """[B] int64: the row of each sample in its own teacher's tensor, found without a host sync; -1 for other routes."""
    if teachers == 1:
        return torch.arange(route.shape[0], device=route.device)
    hot = route[:, None] == torch.arange(teachers, device=route.device)
    return (hot.long().cumsum(0) * hot).sum(1) - 1


def _check_rows(teachers, route, row, uncond, uncond_row) -> None:
    """Raise ValueError for a sample whose row is not there, as csrc/arguments.h does: reads the values, on the host."""
    low, high = route.aminmax()
    if low < 0 or high >= len(teachers):
        i = int(((route < 0) | (route >= len(teachers))).nonzero()[0])
        raise ValueError(f"route of sample {i} is {int(route[i])}, of {len(teachers)} teachers")
    for name, tensors, rows in (("row", teachers, row), ("uncond_row", uncond, uncond_row)):
        if not tensors:
            continue
        held = len(tensors[0]) if len(tensors) == 1 else torch.tensor([len(t) for t in tensors])[route]
        wrong = (rows < 0) | (rows >= held)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            m = int(route[i]) if len(tensors) > 1 else 0
            raise ValueError(f"{name} of sample {i} is {int(rows[i])}, of a tensor that holds {len(tensors[m])} rows")


def _loss_and_gradient(
    student, teachers, route, row, uncond, uncond_row, guidance_scale, weight, mask, share, norms, backend
):
    """Each sample's loss times share [B]; its gradient with respect to the student; error and norms [3, B], or None.

    teachers, uncond: lists; an uncond of one tensor is every teacher's. row None: the host counts. The gradient is in
    the student's dtype, or in float32 for float16, which would lose one as small as a mean's.
    """
    if backend == "triton" and student.device.type == "cpu":  # interpreted; the compiled kernels check for themselves
        _check_rows(teachers, route, row, uncond, uncond_row)
    if len(uncond) == 1:
        uncond = uncond * len(teachers)
    elements = student.numel() // student.shape[0]
    if mask is None:
        count = elements
    else:
        count = mask.flatten(1).sum(1).clamp(min=1) * float(elements // mask[0].numel())
    if weight is None and mask is None:
        each = torch.full((student.shape[0],), share / count, device=student.device)
    else:
        each = share / count if weight is None else weight * (share / count)
    gradient = torch.empty_like(student, dtype=torch.float32 if student.dtype == torch.float16 else None)
    args = (student, teachers, route, row, uncond, uncond_row, guidance_scale, 2 * each, mask, norms, gradient)
    sums = run_triton(*args) if backend == "triton" else run_compiled(backend, *args)
    watched = torch.stack([sums[0] / count, *sums[1:].sqrt()]) if norms else None
    return (sums[0] if norms else sums) * each, gradient, watched


def _scaled(gradient: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gradient times upstream [B] in dtype; in place where it is that, untouched where upstream is 1."""
    wide = upstream.view(-1, *(1,) * (gradient.dim() - 1))
    if gradient.dtype != dtype:
        narrow = torch.empty_like(gradient, dtype=dtype)
        if gradient.device.type != "cpu":
            return torch.mul(gradient, wide, out=narrow)
        for into, sample, factor in zip(narrow, gradient, upstream.tolist(), strict=True):
            into.copy_(sample if factor == 1 else sample * factor)  # five times as fast as a product of both dtypes
        return narrow
    if gradient.is_cuda and has_triton():
        n, (block, warps) = gradient[0].numel(), block_of(gradient[0].numel())
        grid = (len(gradient), triton.cdiv(n, block))
        _rescale_kernel[grid](gradient, upstream.contiguous(), n, BLOCK=block, num_warps=warps)
    elif gradient.is_cuda:
        gradient.mul_(wide)
    else:
        factors = upstream.tolist()
        if all(factor == 1 for factor in factors):  # as after a plain loss.backward()
            return gradient
        for sample, factor in zip(gradient, factors, strict=True):  # numbers: in float32, without a copy
            sample.mul_(factor)
    torch.autograd.graph.increment_version(gradient)  # so that another backward through it is refused
    return gradient


class _Eager(torch.autograd.Function):
    """Without torch.compile: a tenth of a millisecond less than the operator below takes."""

    @staticmethod
    def forward(ctx, student, *rest):
        loss, gradient, watched = _loss_and_gradient(student, *rest)
        ctx.save_for_backward(gradient)
        if watched is not None:
            ctx.mark_non_differentiable(watched)
        ctx.dtype = student.dtype
        return loss, watched

    @staticmethod
    @checks.once
    def backward(ctx, upstream, _):
        return _scaled(*ctx.saved_tensors, upstream, ctx.dtype), *[None] * 11


@torch.library.custom_op("danceopd_kernels::routed_velocity_mse", mutates_args=())
def _operation(
    student: torch.Tensor,
    teachers: Sequence[torch.Tensor],
    route: torch.Tensor,
    row: torch.Tensor | None,
    uncond: Sequence[torch.Tensor],
    uncond_row: torch.Tensor | None,
    guidance_scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    share: float,
    norms: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """_loss_and_gradient as an operator, for torch.compile."""
    loss, gradient, watched = _loss_and_gradient(
        student, teachers, route, row, uncond, uncond_row, guidance_scale, weight, mask, share, norms, backend
    )
    return loss, gradient, loss.new_empty(0) if watched is None else watched


@_operation.register_fake
def _(student, teachers, route, row, uncond, uncond_row, guidance_scale, weight, mask, share, norms, backend):
    gradient = torch.empty_like(student, dtype=torch.float32 if student.dtype == torch.float16 else None)
    watched = student.new_empty((3, len(student)) if norms else 0, dtype=torch.float32)
    return student.new_empty(len(student), dtype=torch.float32), gradient, watched


def _keep(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no tensor of zeros for the gradient's own gradient
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype
    ctx.rest = ([None] * len(inputs[1]), None, None, [None] * len(inputs[4]), *[None] * 7)


def _backward(ctx, upstream, *_):
    checks.first_derivative_alone()
    (gradient,) = ctx.saved_tensors  # out of place: the compiler joins the product to what comes next
    return (gradient * upstream.view(-1, *(1,) * (gradient.dim() - 1))).to(ctx.dtype), *ctx.rest


_operation.register_autograd(_backward, setup_context=_keep)


# Long: half of it says what the arguments are.
def routed_velocity_mse(
    student: torch.Tensor,
    teachers: torch.Tensor | Sequence[torch.Tensor],
    route: torch.Tensor | None = None,
    *,
    row: torch.Tensor | None = None,
    uncond: torch.Tensor | Sequence[torch.Tensor] | None = None,
    uncond_row: torch.Tensor | None = None,
    guidance_scale: torch.Tensor | float | None = None,
    weight: torch.Tensor | float | None = None,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
    norms: bool = False,
    backend: str | None = None,
) -> torch.Tensor | Matched:
    """Mean squared error of each sample's velocity against its own teacher's guided one, with the student's gradient.

    Gathers, guides, squares and differentiates in one pass; the target is never written:

        target_i = u_i + s_i (t_i - u_i),  loss_i = w_i / n sum (v_i - target_i)^2,  t_i = teachers[route_i][row_i]

    Sums are in float32, in a fixed order. The gradient is made along with the loss and, but for float16, scaled in
    place: a second backward through one loss is then refused by torch. Nothing waits for a GPU.

    Args:
        student: Velocities v [B, ...] in float32, bfloat16 or float16; float64 in plain PyTorch.
        teachers: Their velocities, of student's dtype and device; copied if not contiguous. Either a list of 1 to 8
            tensors [n_m, ...], or one tensor.
        route: [B] int64: which tensor of the list each sample takes; None if there is one.
        row: [B] int64: which row of it each sample takes; the tensors may then hold any rows, in any order, and a
            sample's more than once. None: a list holds each teacher's samples in their order, n_m = (route ==
            m).sum(); one tensor [B, ...] holds the first teacher's, then the second's, ..., or, without a route, the
            samples in their order.
        uncond: Unconditional velocities u in the form of teachers; or, beside a list of teachers, one tensor [B, ...]
            in the samples' order. May be the very tensors of teachers.
        uncond_row: [B] int64: the row of uncond each sample takes, of its own teacher's tensor where uncond is a list.
            None: as row; in the samples' order where one tensor goes with a list. A sample that points at its own row
            of teachers, with a scale of 1, is not guided: its target is exactly that row.
        guidance_scale: s, a number or [B]; goes with uncond.
        weight: w, a number or [B]; 1 if not given.
        mask: Bool [B, ...], at least two of the first axes of student's shape: what counts. n is how much does. What
            is masked may be anything, and gets no gradient; a sample of which nothing counts has loss 0.
        reduction: "mean" over samples, or "none".
        norms: Whether to return Matched, with what a trainer watches, found in the same pass.
        backend: "torch", "cpu", "cuda" or "triton"; the fastest that can if not given.

    Returns:
        The mean, or each sample's loss [B], float32 (float64 for float64); differentiable in student alone. With norms
        a Matched of it.

    Raises:
        ValueError: An argument's type, shape, dtype or device does not fit, or the backend cannot run. On the CPU also
            where a sample's row is not there; a GPU does not read it, and gives NaN (in plain PyTorch a device-side
            assertion).

    Example:
        >>> answers = torch.randn(6, 16, 32, 32)  # rows 0 to 3 with their prompts, 4 and 5 without
        >>> v = torch.randn(2, 16, 32, 32, requires_grad=True)
        >>> row, uncond_row = torch.tensor([1, 3]), torch.tensor([4, 3])  # the second is not guided
        >>> scale = torch.tensor([3.5, 1.0])
        >>> loss = routed_velocity_mse(
        ...     v, answers, row=row, uncond=answers, uncond_row=uncond_row, guidance_scale=scale
        ... )
        >>> loss.backward()
    """
    checks.tensor("student", student, dtype=(*DTYPES, torch.float64))
    if student.dim() < 1 or not student.numel():
        raise ValueError(f"student holds no sample or no entry: {list(student.shape)}")
    teachers, route, row, uncond, uncond_row = _as_lists(student, teachers, route, row, uncond, uncond_row)
    guidance_scale = checks.per_sample("guidance_scale", guidance_scale, student)
    weight, mask = checks.per_sample("weight", weight, student), _checked_mask(mask, student)
    if bool(uncond) != (guidance_scale is not None):
        raise ValueError("guidance needs both uncond and guidance_scale")
    checks.choice("reduction", reduction, REDUCTIONS)
    backend = choose(student, backend, DTYPES, BACKENDS, lambda backend: limit(backend, student))
    if backend != "cpu":  # the host counts by itself
        row = packed_index(route, len(teachers)) if row is None else row
        uncond_row = row if uncond_row is None else uncond_row
    args = (teachers, route, row, uncond, uncond_row, guidance_scale, weight, mask)
    if backend == "torch":
        if student.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_rows(*args[:5])
        loss, watched = reference(student, *args, checks.flag("norms", norms))
        loss = loss.mean() if reduction == "mean" else loss
    else:
        share = 1 / len(student) if reduction == "mean" else 1.0
        args = (student.contiguous(), *args, share, checks.flag("norms", norms), backend)
        if torch.compiler.is_compiling():
            loss, _, watched = _operation(*args)
        else:
            loss, watched = _Eager.apply(*args)
        loss = loss.sum() if reduction == "mean" else loss
    return Matched(loss, *watched.unbind()) if norms else loss


def _as_lists(student, teachers, route, row, uncond, uncond_row):
    """Teachers and uncond as lists, contiguous, none for no uncond; route; rows, None where the host is to count."""
    b, packed, alone = student.shape[0], isinstance(teachers, torch.Tensor), isinstance(uncond, torch.Tensor)
    teachers = checks.rows("teachers", teachers, student, MAX_TEACHERS)
    held = [t.shape[0] for t in teachers]
    route, row, uncond_row = (
        None if value is None else checks.index(name, value, b, student)
        for name, value in (("route", route), ("row", row), ("uncond_row", uncond_row))
    )
    if packed and route is not None:
        if row is not None:
            raise ValueError("a route is for a list of teachers; of one tensor row alone says what each sample takes")
        if route.device.type == "cpu" and not torch.compiler.is_compiling() and route.min() < 0:
            raise ValueError(f"route must not be negative, got {int(route.min())}")
    if route is None and len(teachers) > 1:
        raise ValueError(f"a list of {len(teachers)} teachers needs a route")
    if row is None and sum(held) != b:
        raise ValueError(f"the teachers hold {held} samples, the student {b}; or say by row which each sample takes")
    if uncond is None:
        if uncond_row is not None:
            raise ValueError("uncond_row needs uncond")
        uncond = []
    else:
        uncond = checks.rows("uncond", uncond, student, MAX_TEACHERS)
        free = [t.shape[0] for t in uncond]
        if not alone and (packed or len(uncond) != len(teachers)):
            raise ValueError(f"a list of {len(uncond)} uncond needs a list of as many teachers")
        if uncond_row is None and alone and not packed:
            if free != [b]:
                raise ValueError(f"uncond holds {free} samples, the student {b}; or say by uncond_row which each takes")
            uncond_row = torch.arange(b, device=student.device)
        elif uncond_row is None and row is None and free != held:
            raise ValueError(f"uncond hold {free} samples, the teachers {held}")
    if packed and row is None and route is not None:
        row = packed_rows(route)
    if packed or route is None:
        route = torch.zeros(b, dtype=torch.int64, device=student.device)
    return teachers, route, row, uncond, uncond_row


def _checked_mask(mask: torch.Tensor | None, student: torch.Tensor) -> torch.Tensor | None:
    if mask is None:
        return None
    checks.tensor("mask", mask, dtype=torch.bool, like=student)
    if mask.dim() < 2 or mask.shape != student.shape[: mask.dim()]:
        raise ValueError(f"mask must be two or more of the first axes of {list(student.shape)}, got {list(mask.shape)}")
    return mask.contiguous()
