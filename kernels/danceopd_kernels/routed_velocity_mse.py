"""Operation 1: gather each sample's teacher by route, combine guidance, squared error and its gradient, in one pass."""

from collections.abc import Sequence

import torch

from danceopd_kernels import compiled
from danceopd_kernels.dispatch import choose, has_triton

if has_triton():
    import triton
    import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "cuda", "triton")
MAX_TEACHERS = 8
REDUCTIONS = ("mean", "none")


# ---------------------------------------------------------------------------------------------- definition


def packed_rows(route: torch.Tensor) -> torch.Tensor:
    """[B] int64: the row of each sample where teacher 0's samples are packed first, then teacher 1's, ..."""
    rows = torch.empty_like(route)
    rows[route.argsort(stable=True)] = torch.arange(len(route), device=route.device)
    return rows


def reference(student, teachers, route, row, uncond, guidance_scale, weight, mask) -> torch.Tensor:
    """The loss of each sample, in plain PyTorch: [B] float32 (float64 for a student in float64).

    row: of the sample in its teacher's tensor.
    """
    target = _gathered(teachers, route, row)
    if uncond is not None:
        base = _gathered(uncond, route, row)
        target = base + guidance_scale.view(-1, *(1,) * (student.dim() - 1)) * (target - base)
    error, count = student.to(target.dtype) - target, student[0].numel()
    if mask is not None:
        wide = mask.view(*mask.shape, *(1,) * (student.dim() - mask.dim())).expand_as(student)
        error = torch.where(wide, error, 0.0)  # what is masked does not count, not even where it is NaN
        count = wide.flatten(1).sum(1).clamp(min=1)
    loss = error.square().flatten(1).sum(1) / count
    return loss if weight is None else loss * weight


def _gathered(teachers: list[torch.Tensor], route: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """[B, ...] float32 or more: each sample's row of its own teacher."""
    first = torch.tensor([0, *(len(t) for t in teachers[:-1])], device=route.device).cumsum(0)
    gathered = torch.cat(teachers)[first[route] + row]
    return gathered.to(torch.promote_types(gathered.dtype, torch.float32))


# -------------------------------------------------------------------------------------------------- Triton

if has_triton():

    @triton.jit
    def _kernel(
        student,
        t0, t1, t2, t3, t4, t5, t6, t7,
        u0, u1, u2, u3, u4, u5, u6, u7,
        route,  # [B] int64
        row,  # [B] int64: of the sample in its teacher's packed tensor
        guidance_scale,  # [B] float32
        factor,  # [B] float32: 2 * weight / count, the gradient's factor
        mask,  # [B, n // inner] bool
        gradient,
        partial,  # [B, chunks] float32: sums of squared errors
        n,  # elements of a sample
        inner,  # elements that one entry of the mask covers
        chunks,
        TEACHERS: tl.constexpr,
        GUIDED: tl.constexpr,
        MASKED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        sample = tl.program_id(0).to(tl.int64)
        chunk = tl.program_id(1)
        m = tl.load(route + sample)
        teacher, uncond = t0, u0
        for i in tl.static_range(1, TEACHERS):
            teacher = tl.where(m == i, (t1, t2, t3, t4, t5, t6, t7)[i - 1], teacher)
            if GUIDED:
                uncond = tl.where(m == i, (u1, u2, u3, u4, u5, u6, u7)[i - 1], uncond)
        offset = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offset < n
        here, there = sample * n, tl.load(row + sample) * n
        v = tl.load(student + here + offset, inside, other=0.0).to(tl.float32)
        target = tl.load(teacher + there + offset, inside, other=0.0).to(tl.float32)
        if GUIDED:
            base = tl.load(uncond + there + offset, inside, other=0.0).to(tl.float32)
            target = base + tl.load(guidance_scale + sample) * (target - base)
        error = v - target
        if MASKED:
            kept = tl.load(mask + sample * (n // inner) + offset // inner, inside, other=0)
            error = tl.where(kept != 0, error, 0.0)
        tl.store(partial + sample * chunks + chunk, tl.sum(error * error))
        scaled = error * tl.load(factor + sample)
        tl.store(gradient + here + offset, scaled.to(gradient.dtype.element_ty), inside)

    @triton.jit
    def _rescale_kernel(gradient, upstream, n, BLOCK: tl.constexpr):
        sample = tl.program_id(0).to(tl.int64)
        factor = tl.load(upstream + sample)
        if factor == 1.0:  # a plain loss.backward(): nothing is read or written
            return
        offset = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offset < n
        value = tl.load(gradient + sample * n + offset, inside, other=0.0).to(tl.float32)
        tl.store(gradient + sample * n + offset, (value * factor).to(gradient.dtype.element_ty), inside)


def block_of(elements: int) -> tuple[int, int]:
    """Elements of one program and its warps: 8 loads of 16 bytes a thread at most, less for small samples."""
    block = min(4096, max(256, 1 << (elements - 1).bit_length()))
    return block, 4 if block >= 1024 else 2


def run_triton(student, teachers, route, row, uncond, guidance_scale, factor, mask, gradient) -> torch.Tensor:
    """Fill gradient; return each sample's sum of squared errors [B] float32."""
    b, n = len(student), student[0].numel()
    block, warps = block_of(n)
    chunks = triton.cdiv(n, block)
    partial = torch.empty(b, chunks, dtype=torch.float32, device=student.device)
    filled = [*teachers, *[student] * (MAX_TEACHERS - len(teachers))]
    bases = [*(uncond or []), *[student] * (MAX_TEACHERS - len(uncond or []))]
    _kernel[(b, chunks)](
        student,
        *filled,
        *bases,
        route,
        row,
        factor if guidance_scale is None else guidance_scale,
        factor,
        factor if mask is None else mask.view(torch.uint8),
        gradient,
        partial,
        n,
        1 if mask is None else n // mask[0].numel(),
        chunks,
        TEACHERS=len(teachers),
        GUIDED=bool(uncond),
        MASKED=mask is not None,
        BLOCK=block,
        num_warps=warps,
    )
    return partial.sum(1)


def configurations() -> list:
    """What resources.py compiles: the launcher's choice for a 1024 px latent, by dtype, teachers, guidance and mask."""
    from danceopd_kernels.resources import Configuration

    pointers = dict.fromkeys(("guidance_scale", "factor", "partial"), "*fp32")
    pointers |= {"route": "*i64", "row": "*i64", "mask": "*i8", "n": "i32", "inner": "i32", "chunks": "i32"}
    result = []
    block, warps = block_of(16 * 128 * 128)
    for dtype in ("bf16", "fp16", "fp32"):
        data = dict.fromkeys(("student", "gradient", *(f"{x}{i}" for x in "tu" for i in range(8))), f"*{dtype}")
        for teachers, guided, masked in ((1, False, False), (2, True, False), (8, True, True)):
            name = f"routed_velocity_mse {dtype}, {teachers} teacher" + "s" * (teachers > 1)
            name += ", guided" * guided + ", masked" * masked
            constants = {"TEACHERS": teachers, "GUIDED": guided, "MASKED": masked, "BLOCK": block}
            result.append(Configuration(name, _kernel, data | pointers, constants, warps, 128, streaming=True))
        types = {"gradient": f"*{dtype}", "upstream": "*fp32", "n": "i32"}
        name = f"routed_velocity_mse {dtype}, gradient rescaled"
        result.append(Configuration(name, _rescale_kernel, types, {"BLOCK": block}, warps, 64, streaming=True))
    return result


# ------------------------------------------------------------------------------------------------- compiled


def run_compiled(
    backend, student, teachers, route, row, uncond, guidance_scale, factor, mask, gradient
) -> torch.Tensor:
    """As run_triton, by the compiled kernels of the host or the device."""
    b, n = len(student), student[0].numel()
    sums = torch.empty(b, compiled.chunks(backend, n), dtype=torch.float32, device=student.device)
    compiled.call(
        backend,
        "routed_velocity_mse",
        student.dtype,
        student.device,
        student=student,
        teachers=teachers,
        uncond=uncond,
        guided=bool(uncond),
        route=route,
        row=row,
        guidance_scale=guidance_scale,
        factor=factor,
        mask=mask,
        inner=1 if mask is None else n // mask[0].numel(),
        gradient=gradient,
        sums=sums,
        samples=b,
        elements=n,
    )
    return sums.sum(1)


# ---------------------------------------------------------------------------------------------- operation


def packed_index(route: torch.Tensor, teachers: int) -> torch.Tensor:
    """[B] int64: the row of each sample in its own teacher's tensor, found without a host sync."""
    hot = route[:, None] == torch.arange(teachers, device=route.device)
    return (hot.long().cumsum(0) - 1)[torch.arange(len(route), device=route.device), route]


def _boost(student: torch.Tensor, share: float) -> float:
    """What a gradient is kept multiplied by until backward: fp16 would lose one as small as a mean's."""
    return student[0].numel() / share if student.dtype == torch.float16 else 1.0


def _loss_and_gradient(student, teachers, route, row, uncond, guidance_scale, weight, mask, share, backend):
    """Each sample's loss times share [B] float32, and _boost times its gradient with respect to the student."""
    elements = student[0].numel()
    if mask is None:
        count = elements
    else:
        count = mask.flatten(1).sum(1).clamp(min=1) * float(elements // mask[0].numel())
    if weight is None and mask is None:
        each = torch.full((len(student),), share / count, device=student.device)
    else:
        each = share / count if weight is None else weight * (share / count)
    gradient = torch.empty_like(student)
    args = (student, teachers, route, row, uncond, guidance_scale, 2 * _boost(student, share) * each, mask, gradient)
    sums = run_triton(*args) if backend == "triton" else run_compiled(backend, *args)
    return sums * each, gradient


def _scaled(gradient: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """The gradient times upstream [B], in place; untouched where upstream is 1, as after a plain loss.backward()."""
    if gradient.is_cuda and has_triton():
        n, (block, warps) = gradient[0].numel(), block_of(gradient[0].numel())
        grid = (len(gradient), triton.cdiv(n, block))
        _rescale_kernel[grid](gradient, upstream.contiguous(), n, BLOCK=block, num_warps=warps)
    elif gradient.is_cuda:
        gradient.mul_(upstream.view(-1, *(1,) * (gradient.dim() - 1)))
    else:
        factors = upstream.tolist()
        if all(factor == 1 for factor in factors):
            return gradient
        for sample, factor in zip(gradient, factors, strict=True):  # numbers: in float32, without a copy
            sample.mul_(factor)
    torch.autograd.graph.increment_version(gradient)  # so that another backward through it is refused
    return gradient


class _Eager(torch.autograd.Function):
    """Without torch.compile: a tenth of a millisecond less than the operator below takes."""

    @staticmethod
    def forward(ctx, student, *rest):
        loss, gradient = _loss_and_gradient(student, *rest)
        ctx.save_for_backward(gradient)
        ctx.boost = _boost(student, rest[-2])
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        return _scaled(*ctx.saved_tensors, upstream / ctx.boost if ctx.boost != 1 else upstream), *[None] * 9


@torch.library.custom_op("danceopd_kernels::routed_velocity_mse", mutates_args=())
def _operation(
    student: torch.Tensor,
    teachers: Sequence[torch.Tensor],
    route: torch.Tensor,
    row: torch.Tensor | None,
    uncond: Sequence[torch.Tensor],
    guidance_scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    share: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """_loss_and_gradient as an operator, for torch.compile."""
    return _loss_and_gradient(student, teachers, route, row, uncond, guidance_scale, weight, mask, share, backend)


@_operation.register_fake
def _(student, teachers, route, row, uncond, guidance_scale, weight, mask, share, backend):
    return student.new_empty(len(student), dtype=torch.float32), torch.empty_like(student)


def _keep(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no tensor of zeros for the gradient's own gradient
    ctx.save_for_backward(output[1])
    ctx.boost = _boost(inputs[0], inputs[-2])
    ctx.rest = ([None] * len(inputs[1]), None, None, [None] * len(inputs[4]), None, None, None, None, None)


def _backward(ctx, upstream, _):
    (gradient,) = ctx.saved_tensors  # out of place: the compiler joins the product to what comes next
    factor = (upstream / ctx.boost).view(-1, *(1,) * (gradient.dim() - 1))
    return (gradient * factor).to(gradient.dtype), *ctx.rest


_operation.register_autograd(_backward, setup_context=_keep)


def routed_velocity_mse(
    student: torch.Tensor,
    teachers: torch.Tensor | Sequence[torch.Tensor],
    route: torch.Tensor | None = None,
    *,
    uncond: torch.Tensor | Sequence[torch.Tensor] | None = None,
    guidance_scale: torch.Tensor | float | None = None,
    weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """Mean squared error of each sample's velocity against its own teacher's, with guidance; differentiable in student.

    student [B, ...], fp32, bf16 or fp16. teachers: one tensor [n_m, ...] a teacher, at most 8, that holds its samples
    in their order, n_m = (route == m).sum(); or one tensor [B, ...], which holds them packed one teacher after the
    other, or in the order of the samples if route is None. route [B] int64. uncond: unconditional velocities in the
    same form; the target is then uncond + guidance_scale (teacher - uncond), guidance_scale [B] or a number.
    weight [B]: of each sample's loss. mask [B, ...] bool, a prefix of student's shape: what counts; what is masked may
    be anything, and gets no gradient; a sample of which nothing counts has loss 0. Returns the mean over samples, or
    each sample's loss [B] float32.
    Accumulates in float32; no gradient reaches anything but student; nothing waits for the device. The gradient is
    made in the same pass and scaled in place, so that a second backward through one loss is refused by torch.
    Raises ValueError for shapes, dtypes or devices that do not fit, or a backend that cannot run.
    """
    teachers, route, row, uncond = _as_lists(student, teachers, route, uncond)
    guidance_scale = _per_sample("guidance_scale", guidance_scale, student)
    weight, mask = _per_sample("weight", weight, student), _checked_mask(mask, student)
    if (uncond is None) != (guidance_scale is None):
        raise ValueError("guidance needs both uncond and guidance_scale")
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; use one of {', '.join(REDUCTIONS)}")
    backend = choose(student, backend, DTYPES, BACKENDS)
    if row is None and backend != "cpu":  # the host counts by itself
        row = packed_index(route, len(teachers))
    if backend == "torch":
        loss = reference(student, teachers, route, row, uncond, guidance_scale, weight, mask)
        return loss.mean() if reduction == "mean" else loss
    share = 1 / len(student) if reduction == "mean" else 1.0
    args = (student.contiguous(), teachers, route, row, uncond or [], guidance_scale, weight, mask, share, backend)
    loss = _operation(*args)[0] if torch.compiler.is_compiling() else _Eager.apply(*args)
    return loss.sum() if reduction == "mean" else loss


def _as_lists(student, teachers, route, uncond):
    """Teachers and unconditional velocities as lists; the route; where each sample's row lies, None if in its order."""
    b, shape = len(student), student.shape[1:]
    if not b:
        raise ValueError("student holds no sample")
    several = not isinstance(teachers, torch.Tensor)
    if several and (route is None or not 1 <= len(teachers) <= MAX_TEACHERS):
        raise ValueError(f"a list of teachers needs a route and 1 to {MAX_TEACHERS} of them, got {len(teachers)}")
    if route is not None and (route.shape != (b,) or route.dtype != torch.int64):
        raise ValueError(f"route must be int64 [{b}], got {route.dtype} {list(route.shape)}")
    if several and route.device.type == "cpu" and not torch.compiler.is_compiling():
        counts = torch.bincount(route, minlength=len(teachers)).tolist() if route.min() >= 0 else None
        if counts != [len(t) for t in teachers]:
            raise ValueError(f"the teachers hold {[len(t) for t in teachers]} samples, the route asks for {counts}")
    lists = []
    for name, given in (("teachers", teachers), ("uncond", uncond)):
        given = given if given is None or not isinstance(given, torch.Tensor) else [given]
        for tensor in given or ():
            if tensor.shape[1:] != shape or tensor.dtype != student.dtype or tensor.device != student.device:
                raise ValueError(
                    f"{name}: {tensor.dtype} {list(tensor.shape)} on {tensor.device} does not go with the student's "
                    f"{student.dtype} {list(student.shape)} on {student.device}"
                )
        if given is not None and sum(len(t) for t in given) != b:
            raise ValueError(f"{name} hold {sum(len(t) for t in given)} samples, the student {b}")
        lists.append(None if given is None else [t.detach().contiguous() for t in given])
    route = None if route is None else route.contiguous()
    if several:
        return lists[0], route, None, lists[1]
    row = torch.arange(b, device=student.device) if route is None else packed_rows(route)
    return lists[0], torch.zeros(b, dtype=torch.int64, device=student.device), row, lists[1]


def _per_sample(name: str, value: torch.Tensor | float | None, student: torch.Tensor) -> torch.Tensor | None:
    if value is None:
        return None
    if not isinstance(value, torch.Tensor):  # filled on the device: nothing to copy there
        return torch.full((len(student),), float(value), dtype=torch.float32, device=student.device)
    if value.numel() not in (1, len(student)) or value.device != student.device:
        raise ValueError(
            f"{name} must be a number or [{len(student)}] on {student.device}, "
            f"got {list(value.shape)} on {value.device}"
        )
    return value.detach().float().flatten().expand(len(student)).contiguous()


def _checked_mask(mask: torch.Tensor | None, student: torch.Tensor) -> torch.Tensor | None:
    if mask is not None and (mask.dtype != torch.bool or mask.shape != student.shape[: mask.dim()] or mask.dim() < 2):
        raise ValueError(
            f"mask must be bool and a prefix of {list(student.shape)}, got {mask.dtype} {list(mask.shape)}"
        )
    return None if mask is None else mask.contiguous()
