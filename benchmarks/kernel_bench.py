"""The kernels beside eager PyTorch and torch.compile, in turn in one run: how many times as fast, and bandwidth.

    python benchmarks/kernel_bench.py                       # on a GPU if there is one, else the host
    python benchmarks/kernel_bench.py --full                # with torch.compile, float16 and more rounds
    python benchmarks/kernel_bench.py --shape 16 16 128 128 --dtypes bfloat16 --json results.json

On a GPU the latents are so many that none of a call's tensors fits into its L2 cache, and every contender is the replay
of a CUDA graph: what is timed is the kernel and not its launch. A host's latents are 8 x 16 x 128 x 128, which its
caches may hold, and --shape says otherwise; the result says how large the cache is. On a host the process keeps the
memory that it frees, as the trainer does there: without it each new tensor costs the clearing of its pages.

The share of the roofline is of bandwidth: the least that has to be moved (every input read once, every output written
once) over the time, of what copying a tensor of the latents' size reaches in the same round. It can pass 100 %: a copy
is no limit, and a processor reads what it copies to before it writes it, which steps in place need not do.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from danceopd_kernels import (
    adaln_modulate,
    euler_step_,
    fp8_quantize_rowwise,
    heun_step_,
    routed_velocity_mse,
    sde_step_,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import common
from danceopd.support.memory import keep_freed_memory

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """run(backend) performs the operation once; least: bytes that it has to move."""

    name: str
    run: Callable[[str | None], object]
    least: int


def cases(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Case]:
    samples, rest = shape[0], shape[1:]
    randn = lambda *size: torch.randn(*size, device=device).to(dtype)  # noqa: E731
    route = torch.arange(samples, device=device) % 2
    counts = [(samples + 1) // 2, samples // 2]
    student = randn(*shape).requires_grad_()
    teachers, uncond = ([randn(n, *rest) for n in counts] for _ in range(2))
    scale = torch.full((samples,), 3.0, device=device)
    sigma, next_sigma = (torch.full((samples,), s, device=device) for s in (0.8, 0.7))
    sigmas = torch.tensor([1.0, 0.9, 0.0], device=device)
    z, velocity, other, end, end_other = (randn(*shape) for _ in range(5))
    width = 1536
    x = randn(samples, student[0].numel() // width, width)
    shift, gain = randn(samples, width), randn(samples, width)
    state, tokens = student.numel() * student.element_size(), x.numel() * x.element_size()

    def loss(backend, **options):
        value = routed_velocity_mse(student, teachers, route, **options, backend=backend)
        return torch.autograd.grad(value, student)

    guided = {"uncond": uncond, "guidance_scale": scale}
    made = [
        Case("routed_velocity_mse, guided", lambda b: loss(b, **guided), 4 * state),
        Case("routed_velocity_mse", loss, 3 * state),
        Case(
            "euler_step_, guided",
            lambda b: euler_step_(z, velocity, sigma, next_sigma, uncond=other, guidance_scale=scale, backend=b),
            4 * state,
        ),
        Case("euler_step_", lambda b: euler_step_(z, velocity, sigma, next_sigma, backend=b), 3 * state),
        Case(
            "heun_step_, guided",
            lambda b: heun_step_(
                z,
                velocity,
                end,
                sigma,
                next_sigma,
                uncond=other,
                second_uncond=end_other,
                guidance_scale=scale,
                backend=b,
            ),
            6 * state,
        ),
        Case("sde_step_", lambda b: sde_step_(z, velocity, sigma, next_sigma, other, sigmas, backend=b), 4 * state),
        Case("fp8_quantize_rowwise", lambda b: fp8_quantize_rowwise(x, backend=b), tokens + x.numel()),
        Case(
            "fp8_quantize_rowwise, norm",
            lambda b: fp8_quantize_rowwise(x, norm=True, scale=gain, shift=shift, backend=b),
            tokens + x.numel(),
        ),
    ]
    if device != "cpu":  # on the host it is PyTorch's
        made.append(Case("adaln_modulate", lambda b: adaln_modulate(x, shift, gain, backend=b), 2 * tokens))
    return made


def large_shape() -> tuple[int, ...]:
    """Latents [B, 16, 128, 128] of which, in bfloat16, one tensor is twice the GPU's L2 cache; 8 samples on a host."""
    if common.device().type == "cpu":
        return (8, 16, 128, 128)
    sample = 2 * 16 * 128 * 128
    return (max(8, -(-2 * common.cache_bytes() // sample)), 16, 128, 128)


def measure(case: Case, copy: Callable, copied: int, settings: dict, args: argparse.Namespace) -> list[dict]:
    """Ours, eager and compiled; on a GPU replayed."""
    contenders = {"ours": lambda: case.run(None), "eager": lambda: case.run("torch")}
    if args.full and not args.no_compile:
        torch.compiler.reset()
        contenders["compiled"] = torch.compile(lambda: case.run("torch"))
    contenders = {name: common.replayed(run) for name, run in contenders.items()}
    times = common.interleaved(contenders | {"copy": copy}, args.rounds, warmup=2, least=0.02, clock=args.clock)
    rows = []
    for by, run in contenders.items():
        pairs = zip(times[by], times["copy"], strict=True)
        share = statistics.median(case.least / taken / (copied / copying) for taken, copying in pairs)
        over, peak = ("eager", times["eager"]), common.peak_bytes(run)
        row = common.row(case.name, times[by], settings={**settings, "by": by}, over=over, share=share, peak=peak)
        rows.append(common.show(row))
        if args.profile:
            common.profiled(run, args.profile, " ".join([case.name, *settings.values(), by]))
    return rows


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=common.positive, nargs="+", help="of the latents, batch first")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="float32 and bfloat16; with --full float16 too")
    parser.add_argument("--full", action="store_true", help="torch.compile and float16 too, and 15 rounds")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out of --full")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    args = common.arguments(parser, rounds=None).parse_args(argv)
    args.shape, args.rounds = args.shape or list(large_shape()), args.rounds or (15 if args.full else 5)
    args.dtypes = args.dtypes or DTYPES[: 3 if args.full else 2]
    if len(args.shape) < 2:
        parser.error("--shape needs a batch and at least one more dimension")
    device, rows = common.device().type, []
    if device == "cpu":
        keep_freed_memory()
    for dtype in args.dtypes:
        source = torch.randn(args.shape, device=device).to(getattr(torch, dtype))
        target = torch.empty_like(source)
        for case in cases(tuple(args.shape), source.dtype, device):
            if args.only in case.name:
                copy = common.replayed(lambda: target.copy_(source))  # noqa: B023
                rows += measure(case, copy, 2 * source.nbytes, {"dtype": dtype}, args)
    return common.finish(common.result("kernels", rows, latents=args.shape, cache_bytes=common.cache_bytes()), args)


if __name__ == "__main__":
    main()
