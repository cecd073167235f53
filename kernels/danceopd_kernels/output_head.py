"""Operation 2: output heads of student and teachers (norm, modulation, projection), guidance, squared error, fused.

A tile's error is made in registers, squared, and turned into the gradient at once: the velocity of neither network is
ever written. The head is affine behind its modulation, so guidance is combined before the projection,
uncond + g (cond - uncond) = W (y_uncond + g (y_cond - y_uncond)) + bias, and each target costs one product.
A part for other trainers: DanceOPD's does not use it (docs/kernels.md says what it saves).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from danceopd_kernels import checks
from danceopd_kernels.dispatch import choose, has_triton

if has_triton():
    import triton
    import triton.language as tl

DTYPES = checks.FLOATS
MAX_TEACHERS = 8
MAX_OUT = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}  # of the kernel, which has them in registers
REDUCTIONS = ("mean", "none")
CHUNK = 512  # tokens that the PyTorch path has in float32 at once


class Head(NamedTuple):
    """The input and the parameters of one network's last layers: norm(hidden) (1 + scale) + shift, then proj_out."""

    hidden: torch.Tensor  # [n, N, C]
    shift: torch.Tensor  # [n, C]
    scale: torch.Tensor  # [n, C]
    weight: torch.Tensor  # [P, C]
    bias: torch.Tensor  # [P]


# ---------------------------------------------------------------------------------------------- definition


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _modulated(hidden, shift, scale, eps) -> torch.Tensor:
    hidden = _wide(hidden)
    hat = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=eps)
    return hat * (1 + _wide(scale)[:, None]) + _wide(shift)[:, None]


def velocity(head: Head, eps: float) -> torch.Tensor:
    """[n, N, P] float32: what the head gives."""
    y = _modulated(head.hidden, head.shift, head.scale, eps)
    return torch.nn.functional.linear(y, _wide(head.weight), _wide(head.bias))


def reference(student, teachers, route, uncond, guidance_scale, weight, mask, eps) -> torch.Tensor:
    """The loss of each sample, in plain PyTorch, every velocity written out: [B] float32."""
    order = route.argsort(stable=True)
    row = torch.empty_like(order)
    row[order] = torch.arange(len(route), device=route.device)
    target = torch.cat([velocity(t, eps) for t in teachers])[row]
    if uncond is not None:
        bases = [velocity(Head(*u, t.weight, t.bias), eps) for u, t in zip(uncond, teachers, strict=True)]
        base = torch.cat(bases)[row]
        target = base + guidance_scale.view(-1, 1, 1) * (target - base)
    error, count = velocity(student, eps) - target, target[0].numel()
    if mask is not None:
        error = torch.where(mask[..., None], error, 0.0)  # what is masked does not count, not even where it is NaN
        count = mask.sum(1).clamp(min=1) * target.shape[2]
    loss = error.square().flatten(1).sum(1) / count
    return loss if weight is None else loss * weight


# ------------------------------------------------------------------------------------------ chunked PyTorch


def run_chunked(student, teachers, order, uncond, guidance_scale, factor, mask, eps, sums, grads) -> None:
    """Fill sums [B] (squared errors of a sample) and grads (of student's tensors, times factor [B], or empty).

    grads: hidden [B, N, C], shift [B, C], scale [B, C], and, if not empty, each sample's weight [B, P, C], bias [B, P].
    """
    n = student.hidden.shape[1]
    samples, tokens = max(1, CHUNK // n), min(n, CHUNK)
    w, bias = _wide(student.weight), _wide(student.bias)
    first = 0
    for m, teacher in enumerate(teachers):
        t_w, t_bias = _wide(teacher.weight), _wide(teacher.bias)
        for i in range(0, len(teacher.hidden), samples):
            here = slice(i, min(i + samples, len(teacher.hidden)))
            at = order[first + here.start : first + here.stop]  # of these samples, in the student's tensors
            shift, scale, f = _wide(student.shift[at])[:, None], _wide(student.scale[at])[:, None], factor[at]
            total = {}
            for a in range(0, n, tokens):
                part = slice(a, a + tokens)
                kept = None if mask is None else mask[:, part].index_select(0, at)[..., None]
                y = _modulated(teacher.hidden[here, part], teacher.shift[here], teacher.scale[here], eps)
                if uncond is not None:
                    base = _modulated(uncond[m][0][here, part], uncond[m][1][here], uncond[m][2][here], eps)
                    y = base + guidance_scale[at].to(y.dtype).view(-1, 1, 1) * (y - base)
                error = torch.nn.functional.linear(y, t_w, t_bias)
                x = _wide(student.hidden[:, part].index_select(0, at))
                if kept is not None:
                    x = torch.where(kept, x, 0.0)
                variance, mean = torch.var_mean(x, 2, correction=0, keepdim=True)
                rstd = (variance + eps).rsqrt()
                hat = (x - mean) * rstd
                y = hat * (1 + scale) + shift
                error = torch.nn.functional.linear(y, w, bias) - error
                if kept is not None:
                    error = torch.where(kept, error, 0.0)
                found = [error.square().sum((1, 2))]
                if len(grads[0]):
                    error = error * f.to(error.dtype).view(-1, 1, 1)
                    dy = error @ w
                    found += [dy.sum(1), (dy * hat).sum(1)]
                    if len(grads[3]):
                        found += [error.transpose(1, 2) @ y, error.sum(1)]
                    dy *= 1 + scale
                    dy -= dy.mean(2, keepdim=True) + hat * (dy * hat).mean(2, keepdim=True)
                    dy *= rstd
                    if kept is not None:
                        dy = torch.where(kept, dy, 0.0)  # not 0 times a parameter that is not finite
                    grads[0][:, part].index_copy_(0, at, dy.to(grads[0].dtype))
                for k, value in enumerate(found):
                    total[k] = total[k] + value if k in total else value
            for k, value in total.items():
                (sums if k == 0 else grads[k]).index_copy_(0, at, value.to(sums.dtype))
        first += len(teacher.hidden)


# -------------------------------------------------------------------------------------------------- Triton

if has_triton():

    @triton.jit
    def _moments(x, token, kept, width, eps, ROWS: tl.constexpr, K: tl.constexpr):
        """Mean and 1 / standard deviation of each row, in one sweep: blocks merged as Chan et al. do."""
        mean = tl.zeros([ROWS], tl.float32)
        square = tl.zeros([ROWS], tl.float32)
        for k in range(0, width, K):
            column = k + tl.arange(0, K)
            inside = column < width
            value = tl.load(x + token[:, None] * width + column, kept[:, None] & inside, other=0.0).to(tl.float32)
            size = tl.minimum(width - k, K).to(tl.float32)
            m = tl.sum(value, 1) / size
            centred = tl.where(inside, value - m[:, None], 0.0)
            away = m - mean
            share = size / (k + size)
            mean += away * share
            square += tl.sum(centred * centred, 1) + away * away * share * k
        return mean, 1 / tl.sqrt(square / width + eps)

    @triton.jit
    def _normalised(x, token, kept, column, width, mean, rstd):
        mask = kept[:, None] & (column < width)
        value = tl.load(x + token[:, None] * width + column, mask, other=0.0).to(tl.float32)
        return (value - mean[:, None]) * rstd[:, None]

    @triton.jit
    def _per_sample(x, sample, column, width):
        return tl.load(x + sample * width + column, column < width, other=0.0).to(tl.float32)

    @triton.jit
    def _matrix(weight, output, column, outputs, width):
        inside = (output < outputs)[:, None] & (column < width)
        return tl.load(weight + output[:, None] * width + column, inside, other=0.0)

    @triton.jit
    def _product(a, b, total, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
        if INTERPRETED:  # the interpreter multiplies bf16's bits as integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, total, input_precision=PRECISION)

    @triton.jit
    def _largest(tile, dtype: tl.constexpr):
        """What a tile is divided by before it goes into a product in dtype: 1 but for float16, which has no room."""
        size = 1.0
        if dtype == tl.float16:
            size = tl.max(tl.max(tl.abs(tile), 1), 0)
            size = tl.where((size > 1e-30) & (size < 1e30), size, 1.0)
        return size

    # Long: one kernel, which nothing may be called from without a price.
    @triton.jit
    def _kernel(
        hidden, shift, scale, weight, bias,  # student
        t_hidden, t_shift, t_scale, t_weight, t_bias,  # one teacher
        u_hidden, u_shift, u_scale,  # its unconditional branch
        samples,  # [n_m] int64: of the teacher's samples, in the student's tensors
        guidance_scale, factor,  # [B] float32
        mask,  # [B, N] bool
        fold_shift, fold_scale,  # [B, P] float32: W shift + bias and W (1 + scale) of the student
        partial,  # [B, tiles] float32: sums of squared errors
        d_hidden,  # [B, N, C]
        d_shift, d_scale,  # [B, tiles, C] float32
        d_weight, d_bias,  # [B, programs, P, C] and [B, tiles, P] float32
        tokens, width, t_width, outputs, tiles, programs, eps,
        GUIDED: tl.constexpr, MASKED: tl.constexpr, GRADIENT: tl.constexpr, TO_WEIGHT: tl.constexpr,
        ROWS: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr,
        PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    ):  # fmt: skip
        teacher_sample = tl.program_id(0).to(tl.int64)
        sample = tl.load(samples + teacher_sample)
        # whole samples are skipped in 64 bits; within one, offsets of 32 bits save registers
        hidden += sample * tokens * width
        d_hidden += sample * tokens * width
        t_hidden += teacher_sample * tokens * t_width
        if GUIDED:
            u_hidden += teacher_sample * tokens * t_width
        if TO_WEIGHT:
            d_weight += (sample * programs + tl.program_id(1)) * outputs * width
        dtype = weight.dtype.element_ty
        output = tl.arange(0, OUT)
        lane = tl.arange(0, K)
        for tile in range(tl.program_id(1), tiles, programs):
            token = tile * ROWS + tl.arange(0, ROWS)
            inside = token < tokens
            kept = inside
            if MASKED:
                kept = inside & (tl.load(mask + sample * tokens + token, inside, other=0) != 0)
            mean, rstd = _moments(t_hidden, token, kept, t_width, eps, ROWS, K)
            if GUIDED:
                u_mean, u_rstd = _moments(u_hidden, token, kept, t_width, eps, ROWS, K)
                g = tl.load(guidance_scale + sample)
            target = tl.zeros([ROWS, OUT], tl.float32)
            for k in range(0, t_width, K):
                column = k + lane
                y = _normalised(t_hidden, token, kept, column, t_width, mean, rstd)
                y = y * (1 + _per_sample(t_scale, teacher_sample, column, t_width))
                y += _per_sample(t_shift, teacher_sample, column, t_width)
                if GUIDED:
                    base = _normalised(u_hidden, token, kept, column, t_width, u_mean, u_rstd)
                    base = base * (1 + _per_sample(u_scale, teacher_sample, column, t_width))
                    base += _per_sample(u_shift, teacher_sample, column, t_width)
                    y = base + g * (y - base)
                w = _matrix(t_weight, output, column, outputs, t_width)
                if dtype == tl.float16:
                    size = _largest(y, dtype)
                    part = _product((y / size).to(dtype), tl.trans(w), tl.zeros_like(target), PRECISION, INTERPRETED)
                    target += size * part
                else:
                    target = _product(y.to(dtype), tl.trans(w), target, PRECISION, INTERPRETED)
            target += tl.load(t_bias + output, output < outputs, other=0.0).to(tl.float32)

            mean, rstd = _moments(hidden, token, kept, width, eps, ROWS, K)
            v = tl.zeros([ROWS, OUT], tl.float32)
            for k in range(0, width, K):
                column = k + lane
                y = _normalised(hidden, token, kept, column, width, mean, rstd)
                y = y * (1 + _per_sample(scale, sample, column, width)) + _per_sample(shift, sample, column, width)
                w = _matrix(weight, output, column, outputs, width)
                if dtype == tl.float16:
                    size = _largest(y, dtype)
                    v += size * _product((y / size).to(dtype), tl.trans(w), tl.zeros_like(v), PRECISION, INTERPRETED)
                else:
                    v = _product(y.to(dtype), tl.trans(w), v, PRECISION, INTERPRETED)
            v += tl.load(bias + output, output < outputs, other=0.0).to(tl.float32)
            error = tl.where(kept[:, None], v - target, 0.0)
            tl.store(partial + sample * tiles + tile, tl.sum(error * error))

            if GRADIENT:
                # The two row sums of the norm's gradient, over C of W^T error (1 + scale) and of that times hat, are
                # products of the error with what is known: W (1 + scale), and v without shift and bias.
                f = tl.load(factor + sample)
                one = tl.load(fold_scale + sample * outputs + output, output < outputs, other=0.0)
                zero = tl.load(fold_shift + sample * outputs + output, output < outputs, other=0.0)
                first = tl.sum(error * one, 1) / width
                second = tl.sum(error * (v - zero), 1) / width
                if TO_WEIGHT:
                    part = (sample * tiles + tile) * outputs + output
                    tl.store(d_bias + part, f * tl.sum(error, 0), output < outputs)
                # the error goes into the products without the factor, which would underflow in fp16
                away = _largest(error, dtype)
                e = (error / away).to(dtype)
                for k in range(0, width, K):
                    column = k + lane
                    hat = _normalised(hidden, token, kept, column, width, mean, rstd)
                    s = 1 + _per_sample(scale, sample, column, width)
                    w = _matrix(weight, output, column, outputs, width)
                    dy = away * _product(e, w, tl.zeros([ROWS, K], tl.float32), PRECISION, INTERPRETED)
                    dx = (f * rstd)[:, None] * (dy * s - first[:, None] - hat * second[:, None])
                    dx = tl.where(kept[:, None], dx, 0.0)  # not 0 times a parameter that is not finite
                    at = token[:, None] * width + column
                    tl.store(d_hidden + at, dx.to(d_hidden.dtype.element_ty), inside[:, None] & (column < width))
                    sums = (sample * tiles + tile) * width + column
                    tl.store(d_shift + sums, f * tl.sum(dy, 0), column < width)
                    tl.store(d_scale + sums, f * tl.sum(dy * hat, 0), column < width)
                    if TO_WEIGHT:
                        y = hat * s + _per_sample(shift, sample, column, width)
                        dw = tl.zeros([OUT, K], tl.float32)
                        size = _largest(y, dtype)
                        dw = f * away * size * _product(tl.trans(e), (y / size).to(dtype), dw, PRECISION, INTERPRETED)
                        there = (output < outputs)[:, None] & (column < width)
                        at = output[:, None] * width + column
                        before = output < tl.where(tile < programs, 0, outputs)  # nothing before its first tile
                        dw += tl.load(d_weight + at, there & before[:, None], other=0.0)
                        tl.store(d_weight + at, dw, there)
                if TO_WEIGHT:
                    tl.debug_barrier()  # the next tile's threads read what other threads of this program wrote


def blocks_of(outputs: int, dtype: torch.dtype, to_weight: bool) -> dict[str, int]:
    """Tokens and outputs of a tile, columns of a step, warps and stages: the most that no register is spilled with."""
    out = max(64, 1 << (outputs - 1).bit_length())  # 64 rows in every product, which wgmma asks for
    if dtype == torch.float32:  # three tf32 products for one: smaller tiles, and no more than 64 outputs
        return {"ROWS": 32, "OUT": out, "K": 16, "num_warps": 4, "num_stages": 2 if to_weight else 3}
    return {"ROWS": 64, "OUT": out, "K": 32, "num_warps": 8 if to_weight or out > 64 else 4, "num_stages": 2}


def run_triton(student, teachers, order, uncond, guidance_scale, factor, mask, eps, sums, grads) -> None:
    """As run_chunked."""
    b, n, width = student.hidden.shape
    outputs, device, gradient, to_weight = len(student.bias), sums.device, len(grads[0]) > 0, len(grads[3]) > 0
    blocks = blocks_of(outputs, student.hidden.dtype, to_weight)
    tiles = programs = triton.cdiv(n, blocks["ROWS"])
    if to_weight:  # a program adds up its tiles, so that the sums of all programs stay small: one program or so an SM
        sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        programs = min(tiles, triton.cdiv(sms, b))
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=device)  # noqa: E731
    partial, w = new(b, tiles), student.weight.float()
    parts = [new(b, tiles, width), new(b, tiles, width)] if gradient else [partial] * 2
    parts += [new(b, programs, outputs, width), new(b, tiles, outputs)] if to_weight else [partial] * 2
    fold_shift = torch.addmm(student.bias.float(), student.shift.float(), w.T) if gradient else partial
    fold_scale = (1 + student.scale.float()) @ w.T if gradient else partial
    first = 0
    for m, teacher in enumerate(teachers):
        count = len(teacher.hidden)
        if not count:
            continue
        _kernel[(count, programs)](
            *student,
            *teacher,
            *(uncond[m] if uncond else teacher[:3]),
            order[first : first + count],
            factor if guidance_scale is None else guidance_scale,
            factor,
            factor if mask is None else mask.view(torch.uint8),
            fold_shift,
            fold_scale,
            partial,
            grads[0] if gradient else student.hidden,
            *parts,
            n,
            width,
            teacher.hidden.shape[2],
            outputs,
            tiles,
            programs,
            eps,
            GUIDED=bool(uncond),
            MASKED=mask is not None,
            GRADIENT=gradient,
            TO_WEIGHT=to_weight,
            PRECISION="tf32x3",
            INTERPRETED=device.type == "cpu",
            **blocks,
        )
        first += count
    torch.sum(partial, 1, out=sums)
    for part, gradient_of in zip(parts, grads[1:], strict=True):
        if len(gradient_of):
            torch.sum(part, 1, out=gradient_of)


def configurations() -> list:
    """What resources.py compiles: SD3.5's head (2432 to 64), by dtype, guidance, mask and gradient; and 128 outputs."""
    from danceopd_kernels.resources import Configuration

    floats = ("guidance_scale", "factor", "fold_shift", "fold_scale", "partial")
    types = dict.fromkeys((*floats, "d_shift", "d_scale", "d_weight", "d_bias"), "*fp32")
    types |= dict.fromkeys(("tokens", "width", "t_width", "outputs", "tiles", "programs"), "i32")
    types |= {"samples": "*i64", "mask": "*i8", "eps": "fp32"}
    data = ("hidden", "shift", "scale", "weight", "bias")
    data = (*data, *(f"t_{name}" for name in data), "u_hidden", "u_shift", "u_scale")
    forms = {
        "loss": (False, False, False, False),
        "gradient": (False, False, True, False),
        "gradient with weight": (False, False, True, True),
        "gradient, guided, masked": (True, True, True, False),
        "gradient with weight, guided, masked": (True, True, True, True),
    }
    result = []
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for outputs in (64, 128):
            for form, flags in forms.items():
                if outputs > 64 and (dtype == torch.float32 or form != "gradient with weight, guided, masked"):
                    continue
                blocks = blocks_of(outputs, dtype, flags[-1])
                warps, stages = blocks.pop("num_warps"), blocks.pop("num_stages")
                constants = dict(zip(("GUIDED", "MASKED", "GRADIENT", "TO_WEIGHT"), flags, strict=True))
                result.append(
                    Configuration(
                        f"output_head {short}, {outputs} outputs, {form}",
                        _kernel,
                        dict.fromkeys(data, f"*{short}")
                        | types
                        | {"d_hidden": "*bf16" if short == "bf16" else "*fp32"},
                        constants | blocks | {"PRECISION": "tf32x3", "INTERPRETED": False},
                        warps,
                        255,
                        stages,
                        product=short != "fp32",
                        odd=frozenset({"tokens", "tiles", "programs"}),
                    )
                )
    return result


# ---------------------------------------------------------------------------------------------- operation


@torch.library.custom_op("danceopd_kernels::output_head_mse", mutates_args=())
def _operation(
    hidden: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    projection: torch.Tensor,
    bias: torch.Tensor,
    teachers: Sequence[torch.Tensor],
    order: torch.Tensor,
    uncond: Sequence[torch.Tensor],
    guidance_scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    eps: float,
    gradient: bool,
    to_weight: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each sample's loss [B], and its gradients by sample, in float32 but for hidden's in bfloat16."""
    student = Head(hidden, shift, scale, projection, bias)
    sums, *grads = _outputs(hidden, projection, gradient, to_weight)
    n, outputs = hidden.shape[1], len(bias)
    if mask is None:
        count = torch.full_like(sums, n * outputs)
    else:
        count = mask.sum(1).clamp(min=1) * float(outputs)
    each = 1 / count if weight is None else weight / count
    heads = [Head(*teachers[i : i + 5]) for i in range(0, len(teachers), 5)]
    branches = [uncond[i : i + 3] for i in range(0, len(uncond), 3)] or None
    run = run_triton if backend == "triton" else run_chunked
    with checks.own_precision(hidden.device):  # autocast would run the products of float32 in bf16
        run(student, heads, order, branches, guidance_scale, 2 * each, mask, eps, sums, grads)
    return sums * each, *grads


def _outputs(hidden, projection, gradient, to_weight):
    b, _, width = hidden.shape
    wide, outputs = torch.promote_types(hidden.dtype, torch.float32), len(projection)
    kept = (
        wide if hidden.dtype == torch.float16 else hidden.dtype
    )  # before the loss is scaled float16 may be too narrow
    small = [hidden.new_empty(*shape, dtype=wide) for shape in ((b,), (b if gradient else 0, width))]
    some = b if to_weight else 0
    return (
        small[0],
        torch.empty_like(hidden, dtype=kept) if gradient else hidden.new_empty(0, dtype=kept),
        small[1],
        torch.empty_like(small[1]),
        hidden.new_empty(some, outputs, width, dtype=wide),
        hidden.new_empty(some, outputs, dtype=wide),
    )


@_operation.register_fake
def _(hidden, shift, scale, projection, bias, teachers, order, uncond, guidance_scale, weight, mask, eps, gradient,
      to_weight, backend):  # fmt: skip
    return _outputs(hidden, projection, gradient, to_weight)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[0].dtype
    ctx.rest = ([None] * len(inputs[5]), None, [None] * len(inputs[7]), *[None] * 7)


def _backward(ctx, upstream, *_):
    checks.first_derivative_alone()
    hidden, shift, scale, weight, bias = ctx.saved_tensors
    dx = torch.mul(hidden, upstream.view(-1, 1, 1), out=torch.empty_like(hidden, dtype=ctx.dtype))  # rounded at the end
    small = [(upstream[:, None] * shift).to(ctx.dtype), (upstream[:, None] * scale).to(ctx.dtype)]
    if len(bias):
        small += [(upstream @ weight.flatten(1)).view(weight.shape[1:]).to(ctx.dtype), (upstream @ bias).to(ctx.dtype)]
    else:
        small += [None, None]
    return dx, *small, *ctx.rest


_operation.register_autograd(_backward, setup_context=_keep)


# Long: half of it says what the arguments are.
def fused_output_head_mse(
    student: Head,
    teachers: Head | Sequence[Head],
    route: torch.Tensor | None = None,
    *,
    uncond: Sequence[torch.Tensor] | Sequence[Sequence[torch.Tensor]] | None = None,
    guidance_scale: torch.Tensor | float | None = None,
    weight: torch.Tensor | float | None = None,
    mask: torch.Tensor | None = None,
    eps: float = 1e-6,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """Mean squared error of velocities from what enters the output heads; neither network's velocity is ever written.

        v = W y + b,  y = norm(hidden) (1 + scale) + shift,  loss_i = w_i / n sum (v_i - target_i)^2

    the target as in routed_velocity_mse, guidance combined before the projection. Products run on tiles (Triton; fp32
    by three tf32 products each, which is nearly fp32) or on CHUNK tokens at a time in float32 (PyTorch). Sums are in a
    fixed order; nothing waits for a GPU.

    Args:
        student: A Head, whose tensors are in one of float32, bfloat16 and float16 (float64 in plain PyTorch). shift and
            scale are what AdaLayerNormContinuous's linear layer gives, weight and bias proj_out's.
        teachers: A Head, or a list of 1 to 8, each of which holds its samples in their order, hidden [n_m, N, C_m],
            n_m = (route == m).sum(), which may be 0; C_m may differ, N and P may not. Of the student's dtype. A teacher
            that packs its patches in another order has the rows of weight and bias in the student's:
            head._replace(weight=head.weight[order], bias=head.bias[order]).
        route: [B] int64; None for one teacher.
        uncond: (hidden, shift, scale) of the unconditional branch, as the teacher's are; of each teacher of a list.
        guidance_scale: A number or [B]; goes with uncond.
        weight: w, a number or [B]; 1 if not given.
        mask: [B, N] bool: the tokens that count; what is masked may be anything, and gets no gradient; a sample of
            which nothing counts has loss 0.
        eps: Added to the norm's variance.
        reduction: "mean" over samples, or "none".
        backend: "torch" or "triton"; the fastest that can if not given.

    Returns:
        The mean, or each sample's loss [B], float32 (float64 for float64). Differentiable in the five tensors of
        student, once; the gradients are made along with the loss, and take hidden's size until they are used.

    Raises:
        ValueError: An argument's type, shape, dtype or device does not fit, or the backend cannot run. That the route
            has as many samples for each teacher as it holds is only checked on the CPU.

    Example:
        >>> hidden, modulation = torch.randn(2, 10, 32), torch.randn(2, 64)
        >>> head = Head(hidden, *modulation.chunk(2, 1), torch.randn(16, 32), torch.randn(16))
        >>> loss = fused_output_head_mse(head, head._replace(hidden=torch.randn(2, 10, 32)))
    """
    checks.no_transform("fused_output_head_mse")
    student, teachers, order, uncond = _checked(student, teachers, route, uncond)
    guidance_scale = checks.per_sample("guidance_scale", guidance_scale, student.hidden)
    weight = checks.per_sample("weight", weight, student.hidden)
    if (uncond is None) != (guidance_scale is None):
        raise ValueError("guidance needs both uncond and guidance_scale")
    b, n, _ = student.hidden.shape
    if mask is not None:
        mask = checks.tensor("mask", mask, dtype=torch.bool, shape=(b, n), like=student.hidden).contiguous()
    eps = checks.number("eps", eps)
    checks.choice("reduction", reduction, REDUCTIONS)
    backend = _chosen(student, teachers, backend)
    grad = torch.is_grad_enabled()
    needed = [grad and tensor.requires_grad for tensor in student]
    args = [tensor for head in teachers for tensor in head], order, [x for branch in uncond or [] for x in branch]
    args = *student, *args, guidance_scale, weight, mask, eps, any(needed), any(needed[3:]), backend
    loss = _operation(*args)[0]
    return loss.mean() if reduction == "mean" else loss


def _chosen(student: Head, teachers: list[Head], backend: str | None) -> str:
    def limit(_: str) -> str | None:
        outputs, most = len(student.bias), MAX_OUT[student.hidden.dtype]
        if max(head.hidden.shape[1] * head.hidden.shape[2] for head in (student, *teachers)) >= 1 << 31:
            return "a sample of 2^31 entries or more"
        return f"{outputs} outputs, {most} at most in {student.hidden.dtype}" if outputs > most else None

    return choose(student.hidden, backend, DTYPES, limit=limit)


def _checked(student, teachers, route, uncond):
    """Heads and branches in lists, contiguous; and the student's samples in the order of the teachers'."""
    _check_head("student", student, student)
    b = len(student.hidden)
    if not student.hidden.numel():
        raise ValueError(f"student holds no token: {list(student.hidden.shape)}")
    if isinstance(teachers, Head):
        teachers, uncond = [teachers], None if uncond is None else [uncond]
    if not isinstance(teachers, list | tuple):
        raise ValueError(f"teachers must be a Head or a list of them, got a {type(teachers).__name__}")
    if not 1 <= len(teachers) <= MAX_TEACHERS or (route is None and len(teachers) > 1):
        raise ValueError(f"1 to {MAX_TEACHERS} teachers, and a route for more than one, got {len(teachers)}")
    if route is None:
        route = torch.zeros(b, dtype=torch.int64, device=student.hidden.device)
    route = checks.index("route", route, b, student.hidden)
    for m, teacher in enumerate(teachers):
        _check_head(f"teacher {m}", teacher, student)
    counts = [len(t.hidden) for t in teachers]
    if sum(counts) != b:
        raise ValueError(f"the teachers hold {sum(counts)} samples, the student {b}")
    if route.device.type == "cpu":
        asked = torch.bincount(route, minlength=len(counts)).tolist() if route.min() >= 0 else None
        if asked != counts:
            raise ValueError(f"the teachers hold {counts} samples, the route asks for {asked}")
    if uncond is not None:
        if not isinstance(uncond, list | tuple) or len(uncond) != len(teachers):
            count = len(uncond) if isinstance(uncond, list | tuple) else 1
            raise ValueError(f"uncond: {count} branches for {len(teachers)} teachers")
        for m, (branch, teacher) in enumerate(zip(uncond, teachers, strict=True)):
            if not isinstance(branch, list | tuple) or len(branch) != 3:
                raise ValueError(f"uncond {m} must be (hidden, shift, scale)")
            for name, x, like in zip(("hidden", "shift", "scale"), branch, teacher[:3], strict=True):
                checks.tensor(f"uncond {m}: {name}", x, dtype=like.dtype, shape=tuple(like.shape), like=like)
        uncond = [[x.detach().contiguous() for x in branch] for branch in uncond]
    teachers = [Head(*(x.detach().contiguous() for x in teacher)) for teacher in teachers]
    return Head(*(x.contiguous() for x in student)), teachers, route.argsort(stable=True), uncond


def _check_head(name: str, head: Head, student: Head) -> None:
    if not isinstance(head, Head):
        raise ValueError(f"{name} must be a Head, got a {type(head).__name__}")
    like = checks.tensor("student: hidden", student.hidden, dtype=(*DTYPES, torch.float64), shape=("n", "N", "C"))
    shape = ("n", like.shape[1], "C")
    n, _, width = checks.tensor(f"{name}: hidden", head.hidden, dtype=like.dtype, shape=shape, like=like).shape
    outputs = checks.tensor("student: weight", student.weight, shape=("P", "C")).shape[0]
    for part, shape in (
        ("shift", (n, width)),
        ("scale", (n, width)),
        ("weight", (outputs, width)),
        ("bias", (outputs,)),
    ):
        checks.tensor(f"{name}: {part}", getattr(head, part), dtype=like.dtype, shape=shape, like=like)
    if not outputs or not width:
        raise ValueError(f"{name}: weight must not be empty, got {[outputs, width]}")
