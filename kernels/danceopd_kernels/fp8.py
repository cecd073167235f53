"""Operation 5: rows to float8 e4m3, after a layer norm and its modulation if asked, and products with such weights.

Codes are made and read by bit arithmetic: sm_80 has no instruction for it, and so every device runs the same code.
"""

import os
import threading
import weakref

import torch

from danceopd_kernels import checks, compiled
from danceopd_kernels.dispatch import VARIABLE, choose, has_triton, rows_of

if has_triton():
    import triton
    import triton.language as tl

DTYPES = checks.FLOATS
BACKENDS = ("cpu", "triton")  # of the quantiser
FLOAT8 = torch.float8_e4m3fn
WEIGHT_ONLY = (torch.bfloat16, torch.float16)  # of tokens that are multiplied as they are, by Triton
LARGEST = 448.0  # of float8 e4m3
SMALLEST_SCALE = 2.0**-126  # so that neither a row's scale nor its inverse leaves float32


# ---------------------------------------------------------------------------------------------- definition


def reference(x, norm: bool, scale, shift, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, row scale) of x [..., C], in float32 until the codes."""
    value = x.float()
    if norm:
        value = torch.nn.functional.layer_norm(value, value.shape[-1:], eps=eps)
    if scale is not None:
        value = value * (1 + scale.float()[:, None]) + shift.float()[:, None]
    largest = value.abs().amax(-1, keepdim=True)
    # Over a tensor: over a number CUDA multiplies by its inverse, which rounds otherwise.
    share = largest / torch.full((), LARGEST, device=value.device)
    row_scale = torch.where(largest == 0, 1.0, share.clamp(min=SMALLEST_SCALE))
    return (value * (1 / row_scale)).clamp(-LARGEST, LARGEST).to(FLOAT8), row_scale


def reference_linear(codes, x_scale, weight, weight_scale, bias, out_dtype) -> torch.Tensor:
    """codes [T, in], weight [out, in]: the product in float32, then the scales and the bias."""
    out = (codes.float() @ weight.float().mT) * x_scale * weight_scale.mT
    return (out if bias is None else out + bias.float()).to(out_dtype)


def reference_weight_linear(x, weight, weight_scale, bias, out_dtype) -> torch.Tensor:
    """x [T, in], codes of the weight [out, in]: the product in x's dtype with what they stand for.

    In float32 for float16, whose range those numbers may leave.
    """
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype
    number = (weight.float() * weight_scale).to(wide)
    bias = None if bias is None else bias.to(wide)
    return torch.nn.functional.linear(x.to(wide), number, bias).to(out_dtype)


# -------------------------------------------------------------------------------------------------- Triton

if has_triton():

    @triton.jit
    def _encode(value):
        """float32 to the nearest e4m3, ties to even, no further than 448; as int32."""
        bits = value.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # 20 of the 23 bits go; what is added rounds the rest up, at a tie if the last that stays is 1. The exponent's
        # bias falls from 127 to 7.
        normal = (size + 0x7FFFF + ((size >> 20) & 1) >> 20) - (120 << 3)
        # Below 2^-6 a code is a multiple of 2^-9, the last place of float32 at 2^14, where the addition rounds.
        small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(size < 0x3C800000, small, tl.minimum(normal, 0x7E))
        code = tl.where(size > 0x7F800000, 0x7F, code)
        return code | ((bits >> 24) & 0x80)

    @triton.jit
    def _decode(code):
        """e4m3 codes as float16, over 256: the same bits shifted; zeros and subnormal numbers fall into place."""
        code = code.to(tl.int16)
        size = code & 0x7F
        bits = tl.where(size == 0x7F, 0x7E00, size << 7) | ((code & 0x80) << 8)
        return bits.to(tl.int16).to(tl.float16, bitcast=True)

    @triton.jit
    def _quantize_kernel(
        x,
        scale,  # [B, width]
        shift,
        codes,  # uint8
        row_scale,
        tokens,
        blocks,  # programs of a sample
        width,
        eps,
        smallest,
        NORM: tl.constexpr,
        MODULATED: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        sample = tl.program_id(0) // blocks
        token = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS))[:, None]
        column = tl.arange(0, BLOCK)[None, :]
        inside = (token < tokens) & (column < width)
        row = sample.to(tl.int64) * tokens + token
        at = row * width + column
        value = tl.load(x + at, inside, other=0.0).to(tl.float32)
        if NORM:
            centred = tl.where(inside, value - tl.sum(value, 1, keep_dims=True) / width, 0.0)
            value = centred / tl.sqrt(tl.sum(centred * centred, 1, keep_dims=True) / width + eps)
        if MODULATED:
            own = sample.to(tl.int64) * width + column
            value *= 1 + tl.load(scale + own, column < width, other=0.0).to(tl.float32)
            value += tl.load(shift + own, column < width, other=0.0).to(tl.float32)
        # As integers the bits of sizes are ordered as the sizes are, and NaN is the largest of all.
        sizes = tl.where(inside, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        largest = tl.max(sizes, 1, keep_dims=True).to(tl.float32, bitcast=True)
        s = tl.div_rn(largest, 448.0)
        s = tl.where(largest == 0.0, 1.0, tl.where(s < smallest, smallest, s))
        tl.store(row_scale + row, s, token < tokens)
        tl.store(codes + at, _encode(value * tl.div_rn(1.0, s)).to(tl.uint8), inside)

    @triton.jit
    def _linear_kernel(
        x,  # [rows, width]: uint8 codes, or numbers if WEIGHT_ONLY
        x_scale,  # [rows], of codes
        weight,  # [columns, width] uint8
        weight_scale,  # [columns]
        bias,
        out,  # [rows, columns]
        rows,
        columns,
        width,
        BIAS: tl.constexpr,
        WEIGHT_ONLY: tl.constexpr,
        INTERPRETED: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        left_at, right_at = x + m[:, None] * width, weight + n[:, None] * width
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin in range(0, width, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            left = tl.load(left_at + k, (m < rows)[:, None] & (k < width), other=0)
            right = tl.load(right_at + k, (n < columns)[:, None] & (k < width), other=0)
            right = _decode(right)
            if WEIGHT_ONLY:
                right = right.to(left.dtype)  # bfloat16 holds every code too
            else:
                left = _decode(left)
            if INTERPRETED:  # the interpreter multiplies bfloat16's bits as if they were integers
                left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, tl.trans(right), total)
        total *= 256.0
        if not WEIGHT_ONLY:
            total *= 256.0  # of the other side
            total *= tl.load(x_scale + m, m < rows, other=0.0)[:, None]
        total *= tl.load(weight_scale + n, n < columns, other=0.0)
        if BIAS:
            total += tl.load(bias + n, n < columns, other=0.0).to(tl.float32)
        at = out + m[:, None] * columns + n
        tl.store(at, total.to(out.dtype.element_ty), (m < rows)[:, None] & (n < columns))


LINEAR = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}


def run_triton(x, norm: bool, scale, shift, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    row_scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    rows, block, warps = rows_of(x.shape[-1])
    tokens = row_scale.numel() if scale is None else x.shape[1]
    blocks = triton.cdiv(tokens, rows)
    _quantize_kernel[(row_scale.numel() // tokens * blocks,)](
        x, x if scale is None else scale, x if shift is None else shift, codes, row_scale,
        tokens, blocks, x.shape[-1], eps, SMALLEST_SCALE, NORM=norm, MODULATED=scale is not None,
        ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return codes.view(FLOAT8), row_scale


def run_triton_linear(x, x_scale, weight, weight_scale, bias, out_dtype) -> torch.Tensor:
    """x_scale: of codes; None for x in bf16 or fp16, whose product with the weight's numbers is made as it is."""
    (rows, width), columns = x.shape, len(weight)
    out = torch.empty(rows, columns, dtype=out_dtype, device=x.device)
    weight_only = x_scale is None
    _linear_kernel[(triton.cdiv(rows, LINEAR["BLOCK_M"]), triton.cdiv(columns, LINEAR["BLOCK_N"]))](
        x if weight_only else x.view(torch.uint8), weight_scale if weight_only else x_scale,
        weight.view(torch.uint8), weight_scale, out if bias is None else bias, out, rows, columns, width,
        BIAS=bias is not None, WEIGHT_ONLY=weight_only,
        INTERPRETED=weight_only and os.environ.get("TRITON_INTERPRET") == "1", **LINEAR, num_warps=8,
    )  # fmt: skip
    return out


def configurations() -> list:
    """What resources.py compiles: rows of a model 3072 wide and of its 12288 wide hidden layer, and the product."""
    from danceopd_kernels.resources import Configuration

    integers = dict.fromkeys(("tokens", "blocks", "rows", "columns", "width"), "i32")
    floats = dict.fromkeys(("row_scale", "x_scale", "weight_scale"), "*fp32") | {"eps": "fp32", "smallest": "fp32"}
    types = integers | floats | dict.fromkeys(("codes", "weight"), "*u8")
    result = []
    for dtype in ("bf16", "fp16", "fp32"):
        data = types | dict.fromkeys(("x", "scale", "shift", "bias", "out"), f"*{dtype}")
        for width, norm in ((1536, True), (3072, False), (3072, True), (12288, False)):
            rows, block, warps = rows_of(width)
            constants = {"NORM": norm, "MODULATED": norm, "ROWS": rows, "BLOCK": block}
            name = f"fp8_quantize_rowwise {dtype}, {width} wide" + ", norm and modulation" * norm
            result.append(Configuration(name, _quantize_kernel, data, constants, warps, 128, streaming=True))
        constants = LINEAR | {"BIAS": True, "WEIGHT_ONLY": False, "INTERPRETED": False}
        codes = data | {"x": "*u8"}
        result.append(Configuration(f"fp8_linear {dtype}", _linear_kernel, codes, constants, 8, 255, product=True))
        if dtype != "fp32":
            constants, name = constants | {"WEIGHT_ONLY": True}, f"fp8_linear {dtype}, weight only"
            result.append(Configuration(name, _linear_kernel, data, constants, 8, 255, product=True))
    return result


# ------------------------------------------------------------------------------------------------- compiled


def run_compiled(x, norm: bool, scale, shift, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(x.shape, dtype=FLOAT8, device=x.device)
    row_scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    compiled.call(
        "cpu",
        "quantize",
        x.dtype,
        x.device,
        x=x,
        scale=scale,
        shift=shift,
        rows_per_sample=1 if scale is None else x.shape[1],
        norm=norm,
        eps=eps,
        q=codes,
        row_scale=row_scale,
        rows=row_scale.numel(),
        columns=x.shape[-1],
    )
    return codes, row_scale


# ---------------------------------------------------------------------------------------------- operation


def fp8_quantize_rowwise(
    x: torch.Tensor,
    *,
    norm: bool = False,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds rows, of tokens or of a weight, to float8 e4m3 codes with a scale each: codes * row_scale is near x.

    The row scale is the row's largest size over 448, 1 for a row of zeros, and at least 2^-126. Codes are rounded to
    nearest, ties to even. All is in float32, with no rounding before the codes. NaN anywhere in a row makes its codes
    and its scale NaN; infinity makes its scale infinite, and what is multiplied by it NaN.

    Args:
        x: [..., C] in float32, bfloat16 or float16, not empty.
        norm: Whether a layer norm over C, without weights, comes first.
        scale: [B, C] in x's dtype, for x [B, N, C]: the modulation (1 + scale) + shift after it; goes with shift.
        shift: [B, C].
        eps: Added to the norm's variance.
        backend: "torch", "cpu" or "triton"; the fastest that can if not given.

    Returns:
        Codes [..., C] float8_e4m3fn and row scales [..., 1] float32. No gradient passes.

    Raises:
        ValueError: An argument's type, shape, dtype or device does not fit, a gradient would be lost, or the backend
            cannot run.

    Example:
        >>> weight, weight_scale = fp8_quantize_rowwise(torch.randn(48, 32))
    """
    checks.flag("norm", norm)
    eps = checks.number("eps", eps)
    _check(x, scale, shift)
    chosen = choose(x, backend, DTYPES, BACKENDS)
    x, scale, shift = (None if t is None else t.contiguous() for t in (x, scale, shift))
    run = {"triton": run_triton, "cpu": run_compiled, "torch": reference}[chosen]
    return run(x, norm, scale, shift, eps)


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    weight_only: bool | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Multiplies tokens by a frozen weight in codes: x weight^T + bias, accumulated in float32.

    Codes go through torch._scaled_mm where it takes these, else through Triton; backend "torch" is the former or a
    product in float32, "triton" the latter. On a GPU what torch._scaled_mm gives is rounded to bfloat16 first, whatever
    out_dtype is. With weight_only Triton decodes the weight inside the product in bfloat16 and float16; "torch", and a
    product in float32, before it.

    Args:
        x: [..., in]: codes with x_scale, or float32, bfloat16 or float16, which are quantised here or, with
            weight_only, multiplied as they are: in bfloat16 where out_dtype is that.
        weight: [out, in] float8_e4m3fn, as fp8_quantize_rowwise makes it.
        weight_scale: [out, 1] float32.
        bias: [out] in float32, bfloat16 or float16.
        x_scale: [..., 1] float32, of codes.
        out_dtype: float32, bfloat16 or float16; x's, or bfloat16 for codes, if not given.
        weight_only: Whether x stays as it is; if not given, on GPUs before sm_89, which do not multiply codes.
        backend: "torch" or "triton"; the fastest that can if not given.

    Returns:
        [..., out] in out_dtype. Differentiable in x, by a gradient that takes no notice of x's rounding.

    Raises:
        ValueError: An argument's type, shape, dtype or device does not fit, another gradient would be lost, or the
            backend cannot run.

    Example:
        >>> weight, weight_scale = fp8_quantize_rowwise(torch.randn(48, 32))
        >>> out = fp8_linear(torch.randn(4, 32), weight, weight_scale)
    """
    checks.no_transform("fp8_linear")
    _check_linear(x, weight, weight_scale, bias, x_scale)
    if out_dtype is None:
        out_dtype = torch.bfloat16 if x.dtype == FLOAT8 else x.dtype
    if not isinstance(out_dtype, torch.dtype) or out_dtype not in DTYPES:
        raise ValueError(f"out_dtype must be float32, bfloat16 or float16, got {out_dtype}")
    if weight_only is None:
        weight_only = x_scale is None and not multiplies_codes(x.device)
    elif checks.flag("weight_only", weight_only) and x_scale is not None:
        raise ValueError("weight_only goes with x in float32, bfloat16 or float16, not with codes")
    rows, x_scale = x.reshape(-1, x.shape[-1]), None if x_scale is None else x_scale.reshape(-1, 1)
    run = _Linear.apply if torch.is_grad_enabled() and x.requires_grad else _linear
    with checks.own_precision(x.device):
        out = run(rows, weight, weight_scale, bias, x_scale, out_dtype, weight_only, backend)
    return out.view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, weight_scale, *rest):
        ctx.save_for_backward(weight, weight_scale)
        ctx.dtype = x.dtype
        return _linear(x, weight, weight_scale, *rest)

    @staticmethod
    @checks.once
    def backward(ctx, grad):
        dtype = torch.bfloat16 if torch.bfloat16 in (ctx.dtype, grad.dtype) else torch.float32
        with checks.own_precision(grad.device):
            return input_gradient(grad, *ctx.saved_tensors, dtype).to(ctx.dtype), *[None] * 7


def input_gradient(grad, weight, weight_scale, dtype: torch.dtype) -> torch.Tensor:
    """grad [..., out] times the weight, in dtype: the gradient of its input."""
    # The scales go to the gradient, since codes are exact in every dtype; float16 would lose what they make of it.
    wide = torch.float32 if dtype == torch.float16 else dtype
    return ((grad * weight_scale[:, 0]).to(wide) @ weight.to(wide)).to(dtype)


def multiplies_codes(device: torch.device) -> bool:
    """Whether a product of codes is quicker there than of numbers; the host does what sm_89 and later GPUs do."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _linear(x, weight, weight_scale, bias, x_scale, out_dtype, weight_only: bool, backend: str | None) -> torch.Tensor:
    """x [T, in]."""
    weight, weight_scale, bias = (None if t is None else t.contiguous() for t in (weight, weight_scale, bias))
    if weight_only:
        if (x.dtype, out_dtype) == (torch.float32, torch.bfloat16):
            x = x.to(out_dtype)
        if choose(x, backend, WEIGHT_ONLY) == "triton":
            return run_triton_linear(x.contiguous(), None, weight, weight_scale, bias, out_dtype)
        return reference_weight_linear(x, weight, weight_scale, bias, out_dtype)
    offered = scaled_mm_takes(weight)
    first = "torch" if backend is None and offered and not os.environ.get(VARIABLE) else backend
    chosen = choose(x, first, (*DTYPES, FLOAT8))
    codes, x_scale = _quantized_once(x, backend) if x_scale is None else (x, x_scale)
    run = run_triton_linear if chosen == "triton" else run_scaled_mm if offered else reference_linear
    return run(codes.contiguous(), x_scale.contiguous(), weight, weight_scale, bias, out_dtype)


class _Last(threading.local):
    """The input that a thread quantised last, by what makes it the same again, and its codes and scales."""

    key: tuple | None = None
    made: tuple[torch.Tensor, torch.Tensor] | None = None


_last = _Last()


def _quantized_once(x: torch.Tensor, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of x [T, in]: those of the product before where it had the same input, as q, k and v have.

    They are kept until another input comes or this one is gone: the tensor that x is a view of, unwritten since. In a
    capture they are made anew, for those made before it are no part of the graph.
    """
    if torch.compiler.is_compiling() or x.is_inference():  # whose writes are not counted
        return fp8_quantize_rowwise(x, backend=backend)
    root, last = x if x._base is None else x._base, _last
    capturing = x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    place = (x.storage_offset(), x.shape, x.stride(), x.dtype, x._version, backend, os.environ.get(VARIABLE), capturing)
    if last.key is not None and last.key[0]() is root and last.key[1] == place:
        return last.made
    made = fp8_quantize_rowwise(x, backend=backend)

    def forget(reference) -> None:
        if last.key is not None and last.key[0] is reference:
            last.key = last.made = None

    last.key, last.made = (weakref.ref(root, forget), place), made
    return made


def scaled_mm_takes(weight: torch.Tensor) -> bool:
    """Whether torch multiplies rows of codes here: any on the CPU; from sm_89 on, whole blocks of 16."""
    if weight.device.type == "cpu":
        return True
    fits = weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
    return fits and weight.is_cuda and multiplies_codes(weight.device)


def run_scaled_mm(codes, x_scale, weight, weight_scale, bias, out_dtype) -> torch.Tensor:
    # On a GPU products of rows come out in bfloat16 alone, whose rounding is a tenth of the codes' own; that of the
    # tensor cores' own sums, which are quicker, is no more.
    on_gpu = weight.device.type != "cpu"
    made = torch.bfloat16 if on_gpu else out_dtype
    bias, options = None if bias is None else bias.to(made), {"use_fast_accum": True} if on_gpu else {}
    return torch._scaled_mm(codes, weight.mT, x_scale, weight_scale.mT, bias, out_dtype=made, **options).to(out_dtype)


def _check(x, scale, shift) -> None:
    checks.tensor("x", x, dtype=DTYPES)
    if x.dim() < 1 or not x.numel():
        raise ValueError(f"x must be [..., C] and not empty, got {list(x.shape)}")
    if (scale is None) != (shift is None):
        raise ValueError("a scale needs a shift, and a shift a scale")
    if scale is not None:
        if x.dim() != 3:
            raise ValueError(f"with a scale and a shift x must be [B, N, C], got {list(x.shape)}")
        for name, tensor in (("scale", scale), ("shift", shift)):
            checks.tensor(name, tensor, dtype=x.dtype, shape=(x.shape[0], x.shape[2]), like=x)
    checks.no_gradient(x=x, scale=scale, shift=shift)


def _check_linear(x, weight, weight_scale, bias, x_scale) -> None:
    checks.tensor("x", x, dtype=(FLOAT8, *DTYPES))
    checks.tensor("weight", weight, dtype=FLOAT8, shape=("out", "in"), like=x)
    out, width = weight.shape
    if x.dim() < 1 or x.shape[-1] != width or not x.numel() or not out:
        raise ValueError(f"x must be [..., {width}] and not empty, as weight {list(weight.shape)}, got {list(x.shape)}")
    if (x_scale is None) != (x.dtype != FLOAT8):
        raise ValueError("x_scale goes with codes, float8_e4m3fn, and codes need it")
    checks.tensor("weight_scale", weight_scale, dtype=torch.float32, shape=(out, 1), like=x)
    if x_scale is not None:
        checks.tensor("x_scale", x_scale, dtype=torch.float32, shape=(*x.shape[:-1], 1), like=x)
    if bias is not None:
        checks.tensor("bias", bias, dtype=DTYPES, shape=(out,), like=x)
    checks.no_gradient(bias=bias, weight_scale=weight_scale, x_scale=x_scale)
