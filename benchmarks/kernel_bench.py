"""The kernels beside eager PyTorch and torch.compile, in turn in one run: ratios of time, and bandwidth reached.

    python benchmarks/kernel_bench.py                       # 8 x 16 x 128 x 128 latents, on a GPU if there is one
    python benchmarks/kernel_bench.py --shape 16 16 128 128 --dtypes bfloat16 --json results.json

A ratio is the median over rounds, in each of which every contender is timed; the smallest and largest round stand
beside it. Bandwidth is the least that has to be moved (every input read once, every output written once) over the
time, as a share of what copying a tensor of the same size reaches here (and on a GPU of the card's peak).
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from danceopd_kernels import adaln_modulate, euler_step_, fp8_quantize_rowwise, info, routed_velocity_mse, sde_step_
from torch.profiler import ProfilerActivity, profile

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """run(backend) performs the operation once; least: bytes that it has to move; output: bytes that it returns."""

    name: str
    run: Callable[[str | None], object]
    least: int
    output: int


@dataclass(frozen=True)
class Measured:
    case: str
    dtype: str
    eager: tuple[float, float, float]  # eager's time over ours: median, smallest and largest round
    compiled: tuple[float, float, float] | None  # torch.compile's over ours
    milliseconds: float  # ours, median
    of_copy: float  # bandwidth reached over the copy's
    of_peak: float | None
    extra_memory: float  # most bytes allocated at once over the output's


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
    z, velocity, other = (randn(*shape) for _ in range(3))
    width = 1536
    x = randn(samples, student[0].numel() // width, width)
    shift, gain = randn(samples, width), randn(samples, width)
    state, tokens = student.numel() * student.element_size(), x.numel() * x.element_size()

    def loss(backend, **options):
        value = routed_velocity_mse(student, teachers, route, **options, backend=backend)
        return torch.autograd.grad(value, student)

    guided = {"uncond": uncond, "guidance_scale": scale}
    made = [
        Case("routed_velocity_mse, guided", lambda b: loss(b, **guided), 4 * state, state),
        Case("routed_velocity_mse", loss, 3 * state, state),
        Case(
            "euler_step_, guided",
            lambda b: euler_step_(z, velocity, sigma, next_sigma, uncond=other, guidance_scale=scale, backend=b),
            4 * state,
            0,
        ),
        Case("euler_step_", lambda b: euler_step_(z, velocity, sigma, next_sigma, backend=b), 3 * state, 0),
        Case("sde_step_", lambda b: sde_step_(z, velocity, sigma, next_sigma, other, sigmas, backend=b), 4 * state, 0),
        Case("fp8_quantize_rowwise", lambda b: fp8_quantize_rowwise(x, backend=b), tokens + x.numel(), x.numel()),
        Case(
            "fp8_quantize_rowwise, norm",
            lambda b: fp8_quantize_rowwise(x, norm=True, scale=gain, shift=shift, backend=b),
            tokens + x.numel(),
            x.numel(),
        ),
    ]
    if device == "cuda":  # on the host it is PyTorch's
        made.append(Case("adaln_modulate", lambda b: adaln_modulate(x, shift, gain, backend=b), 2 * tokens, tokens))
    return made


def seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Of one call, over `repeats` calls in a row."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def peak_memory(run: Callable[[], object], device: str) -> int:
    """The most bytes that a call has allocated at once beyond what was there."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    now = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def peak_bandwidth() -> float:
    """Bytes a second that the card's memory clock and bus allow."""
    card = torch.cuda.get_device_properties(0)
    return 2 * card.memory_clock_rate * 1e3 * card.memory_bus_width / 8


def spread(ratios: list[float]) -> tuple[float, float, float]:
    return statistics.median(ratios), min(ratios), max(ratios)


def measure(case: Case, dtype: str, device: str, copy: Callable, copied: int, rounds: int, compiled: bool) -> Measured:
    contenders = {"ours": lambda: case.run(None), "eager": lambda: case.run("torch"), "copy": copy}
    if compiled:
        torch.compiler.reset()
        compiled_run = torch.compile(lambda: case.run("torch"))
        contenders["compiled"] = compiled_run
    for run in contenders.values():
        run()
        run()
    repeats = {name: max(1, min(50, int(0.02 / seconds(run, device, 1)))) for name, run in contenders.items()}
    times = [{name: seconds(run, device, repeats[name]) for name, run in contenders.items()} for _ in range(rounds)]
    ours = statistics.median(t["ours"] for t in times)
    bandwidth = case.least / ours
    return Measured(
        case.name,
        dtype,
        spread([t["eager"] / t["ours"] for t in times]),
        spread([t["compiled"] / t["ours"] for t in times]) if compiled else None,
        ours * 1e3,
        statistics.median(case.least / t["ours"] / (copied / t["copy"]) for t in times),
        bandwidth / peak_bandwidth() if device == "cuda" else None,
        peak_memory(contenders["ours"], device) / case.output if case.output else 0.0,
    )


def main(argv: list[str] | None = None) -> list[Measured]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs="+", default=[8, 16, 128, 128], help="of the latents, batch first")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args(argv)
    if len(args.shape) < 2 or min(args.shape) < 1 or args.rounds < 1:
        parser.error("--shape needs a batch and at least one more dimension, all positive; --rounds at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    print(f"{name}{threads}, torch {torch.__version__}, latents {'x'.join(map(str, args.shape))}\n{info()}\n")
    print(f"{'operation':<30}{'dtype':<10}{'eager/ours':>22}{'compile/ours':>22}{'ms':>8}{'of copy':>9}{'extra':>7}")
    results = []
    for dtype in args.dtypes:
        source = torch.randn(args.shape, device=device).to(getattr(torch, dtype))
        target = torch.empty_like(source)
        copied = 2 * source.numel() * source.element_size()
        for case in cases(tuple(args.shape), source.dtype, device):
            if args.only in case.name:
                copy = lambda: target.copy_(source)  # noqa: B023, E731
                m = measure(case, dtype, device, copy, copied, args.rounds, not args.no_compile)
                results.append(m)
                ratios = [f"{r[0]:.2f} ({r[1]:.2f} to {r[2]:.2f})" if r else "–" for r in (m.eager, m.compiled)]
                peak = f", {m.of_peak:.0%} of the card's peak" if m.of_peak else ""
                print(
                    f"{m.case:<30}{m.dtype:<10}{ratios[0]:>22}{ratios[1]:>22}{m.milliseconds:>8.3f}"
                    f"{m.of_copy:>9.0%}{m.extra_memory:>7.2f}{peak}",
                    flush=True,
                )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(
                {"device": name, "torch": torch.__version__, "rows": [asdict(m) for m in results]}, file, indent=1
            )
    return results


if __name__ == "__main__":
    main()
