"""One method and one look for all benchmarks: how variants are timed and compared, and how figures are shown.

Variants are called in turn within each round, so that a machine that slows down slows all of them; a figure is the
median of the rounds beside its quartiles, and a ratio is taken within each round. On a CPU that others use too,
`--clock cpu` takes the processor time of all threads in place of the wall's. Shares are of what a matrix product and a
copy reach here, measured in the same run. A benchmark is

    args = common.arguments(parser).parse_args(argv)
    times = common.interleaved({"plain": plain, "ours": ours}, args.rounds, clock=args.clock)
    rows = [common.row(name, times[name], over=("plain", times["plain"])) for name in times]
    return common.finish(common.result("name", rows), args)
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path

import torch
from danceopd_kernels import info
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from danceopd.core.phase import phase, recorders
from danceopd.support.exits import quieten

quieten()  # before a benchmark imports diffusers: the figures are to be seen
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes lines of its own onto the screen


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_card() -> bool:
    """Whether the device is a card: a GPU, or the pretend card of the tests."""
    return device().type != "cpu"


def cards():
    """torch's module of the device: torch.cuda on a GPU."""
    return torch.get_device_module(device())


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if on_card():
        cards().synchronize()


def describe() -> dict:
    """What figures of this process were measured on: name, kind, clocks or threads, versions, kernels."""
    found = {"torch": torch.__version__, "kernels": info()}
    if on_card():
        name, memory = cards().get_device_name(), cards().mem_get_info()[1]
        return found | {"name": name, "kind": device().type, "memory_bytes": memory, "clocks": _clocks()}
    return found | {"name": _processor(), "kind": "cpu", "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def _clocks() -> str:
    """The GPU's clocks now and at most, its power and its limit."""
    query = "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit"
    command = ["nvidia-smi", query, "--format=csv,noheader", f"--id={cards().current_device()}"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return "unknown"


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def cache_bytes() -> int:
    """The largest cache between the device's cores and its memory: a GPU's L2, or the CPU's last one; 0 if unknown."""
    if device().type == "cuda":
        return torch.cuda.get_device_properties().L2_cache_size
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes if size[-1:] in "KM"), default=0)


def replayed(run: Callable[[], object]) -> Callable[[], object]:
    """A call as the replay of a CUDA graph, whose time is the device's alone; on a CPU the call as it is.

    What the call makes stays where the capture put it.
    """
    if not on_card():
        return run
    stream, graph, first = cards().Stream(), cards().CUDAGraph(), cards().current_stream()
    stream.wait_stream(first)
    with cards().stream(stream):
        for _ in range(2):  # compiles, fills caches
            run()
        with cards().graph(graph, stream=stream):
            kept = run()
    first.wait_stream(stream)

    def replay() -> object:
        graph.replay()
        return kept

    return replay


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(run: Callable[[], object], repeats: int = 1, clock: str = "wall") -> float:
    """Times one call, over `repeats` in a row: by events on a GPU, by one of `CLOCKS` on a CPU."""
    synchronize()
    now = CLOCKS[clock]
    begin = now()
    events = [cards().Event(enable_timing=True) for _ in range(2)] if on_card() else []
    for event in events[:1]:
        event.record()
    for _ in range(repeats):
        run()
    for event in events[1:]:
        event.record()
        event.synchronize()
    taken = events[0].elapsed_time(events[1]) / 1e3 if events else now() - begin
    return taken / repeats


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    least: float = 0.0,
    prepare: Callable[[str], object] | None = None,
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Times each variant in each round; each round begins with another one of them.

    Args:
        variants: What is called, by name.
        rounds: How often each is timed.
        warmup: Rounds that are not.
        least: Seconds that a timing should last, for which a short variant is repeated up to 50 times in a row.
        prepare: Is called with the variant's name before each timing, which it is not part of.
        clock: One of `CLOCKS`, on a CPU.

    Returns:
        The seconds of each round, by name.
    """
    times, repeats, names = {name: [] for name in variants}, dict.fromkeys(variants, 1), list(variants)
    for i in range(-warmup - bool(least), rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            if prepare:
                prepare(name)
            taken = seconds(variants[name], repeats[name], clock)
            if i >= 0:
                times[name].append(taken)
            elif i == -1 and least:
                repeats[name] = max(1, min(50, int(least / max(taken, 1e-9))))
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, as numpy has them."""
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def ratios(over: Sequence[float], times: Sequence[float]) -> tuple[float, float, float]:
    """How many times as fast as `over`: the quartiles of the rounds' own ratios."""
    return quartiles([a / b for a, b in zip(over, times, strict=True)])


class Phases:
    """Splits what runs while it is entered by the phases of danceopd.core.phase: `seconds` of each, by name.

    A phase inside another counts as its own alone. On a GPU the ends of phases are waited for, so that this is no way
    to time the whole.

    Args:
        clock: One of `CLOCKS`.
    """

    def __init__(self, clock: str = "wall"):
        self.now, self.seconds, self._open = CLOCKS[clock], defaultdict(float), []

    def __enter__(self) -> "Phases":
        recorders.append(self._record)
        return self

    def __exit__(self, *raised) -> None:
        recorders.remove(self._record)

    @contextmanager
    def _record(self, name: str) -> Iterator[None]:
        synchronize()
        start, around = self.now(), self._open
        self._open = inside = []  # seconds of the phases inside
        try:
            yield
            synchronize()
        finally:
            taken, self._open = self.now() - start, around
            self.seconds[name] += taken - sum(inside)
            around.append(taken)


# ---------------------------------------------------------------------------------------- counts and the roofline


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that a call holds at once beyond what was there: of the GPU, or of torch's tensors on a CPU.

    What a captured graph computes lies in the graph's own pool, which torch counts as free between replays: all of the
    pools of this process count, also those of graphs that the call does not replay.
    """
    synchronize()
    if on_card():
        cards().reset_peak_memory_stats()
        before = cards().memory_allocated()
        run()
        return cards().max_memory_allocated() - before + idle_in_pools(cards().memory_snapshot())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    return max(accumulate((event.nbytes() for event in events if event.name() == "[memory]"), initial=0))


def idle_in_pools(segments: Sequence[Mapping]) -> int:
    """The bytes that graphs' pools keep and no tensor holds, of what torch.cuda.memory_snapshot() returns."""
    own = [s for s in segments if tuple(s["segment_pool_id"]) != (0, 0)]
    return sum(s["total_size"] - s["allocated_size"] for s in own)


def python_calls(run: Callable[[], object]) -> int:
    """Counts the calls of Python and built-in functions in one call, on this thread."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def flops(run: Callable[[], object]) -> int:
    """Of the products and attention in one call, by torch's counter; it sees no fused or compiled kernel's."""
    operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # unknown to the counter
    attention = {operation: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        run()
    return counter.get_total_flops()


def roofline(dtypes: Sequence[str] = ("float32",), rounds: int = 5, clock: str = "wall") -> dict:
    """Measured here: {"flops_per_second": {dtype: of a large matrix product}, "copy_bytes_per_second": read and write}.

    The best of the rounds, since it is to be a limit. "float8_e4m3fn" is torch._scaled_mm with a scale a row.
    """
    on_gpu = device().type == "cuda"
    n, found = 8192 if on_gpu else 1024, {}
    for name in dtypes:
        a, b = (torch.randn(n, n, device=device()) for _ in range(2))
        if name.startswith("float8"):
            scale = torch.ones(n, 1, device=device())
            a, b, scales = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), (scale, scale.t().contiguous())
            run = lambda: torch._scaled_mm(a, b, *scales, out_dtype=torch.bfloat16)  # noqa: B023, E731
        else:
            a, b = a.to(getattr(torch, name)), b.to(getattr(torch, name))
            run = lambda: a @ b  # noqa: B023, E731
        with suppress(RuntimeError):  # the device has no such product
            found[name] = 2 * n**3 / min(interleaved({"product": run}, rounds, least=0.02, clock=clock)["product"])
    source = torch.randn((2**30 if on_gpu else 2**28) // 4, device=device())
    target = torch.empty_like(source)
    copied = min(interleaved({"copy": lambda: target.copy_(source)}, rounds, clock=clock)["copy"])
    return {"flops_per_second": found, "copy_bytes_per_second": 2 * source.nbytes / copied}


def share_of_roofline(limit: dict, taken: float, flops: float = 0, moved: float = 0, dtype: str = "float32"):
    """The least seconds that `flops` and `moved` bytes would take by a measured roofline, over those taken; or None."""
    if dtype not in limit["flops_per_second"] and flops:
        return None
    product = flops / limit["flops_per_second"][dtype] if flops else 0.0
    return max(product, moved / limit["copy_bytes_per_second"]) / taken


# ----------------------------------------------------------------------------------------------- rows and a result


def row(name, times, *, settings=None, samples=None, over=None, flops=None, share=None, peak=None, **more) -> dict:
    """One line of a table. times: seconds of each round; settings: a mapping; samples: that one call takes; over:
    (name, times) of what it is compared with, in the same rounds: the ratio is how many times as fast it is; flops,
    share of the roofline and peak bytes: of one call; more: further figures, each a column."""
    low, middle, high = quartiles(times)
    return {
        "name": name,
        "settings": dict(settings or {}),
        "milliseconds": [1e3 * low, 1e3 * middle, 1e3 * high],
        "samples_per_second": samples / middle if samples else None,
        "ratio": list(ratios(over[1], times)) if over else None,
        "over": over[0] if over else None,
        "flops": flops,
        "share_of_roofline": share,
        "peak_bytes": peak,
        **more,
    }


def result(name: str, rows: list[dict], **more) -> dict:
    """What a benchmark returns and writes. more: "roofline", settings that all rows share, notes."""
    return {"benchmark": name, "device": describe(), "measured": True, **more, "rows": rows}


def heading(result: dict) -> str:
    """What was measured, on what."""
    machine = result["device"]
    where = f"{machine['threads']} threads" if machine["kind"] == "cpu" else f"clocks {machine['clocks']}"
    lines = [f"{result['benchmark']}: measured on {machine['name']}, {where}, torch {machine['torch']}"]
    if result.get("clock") == "cpu":
        lines.append("times are of the processor, summed over threads")
    if limit := result.get("roofline"):
        products = [f"{name} {value / 1e12:.3g} TFLOP/s" for name, value in limit["flops_per_second"].items()]
        lines.append(f"roofline: {', '.join(products)}, copy {limit['copy_bytes_per_second'] / 1e9:.3g} GB/s")
    return "\n".join(lines)


def table(rows: Sequence[dict]) -> str:
    """Aligned text; a column for whatever one of the rows has."""
    cells = [_cells(row) for row in rows]
    titles = list(dict.fromkeys(title for cell in cells for title in cell))
    lines = [titles, *([cell.get(title, "") for title in titles] for cell in cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = "  ".join(f"{{:{'>' if i else '<'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(aligned.format(*line).rstrip() for line in lines)


def _cells(row: dict) -> dict[str, str]:
    spread = "{1:.4g} ({0:.4g} to {2:.4g})".format
    shown = {
        "ms (quartiles)": ("milliseconds", lambda value: spread(*value)),
        "samples/s": ("samples_per_second", "{:.4g}".format),
        "times as fast": ("ratio", lambda value: "{1:.2f} ({0:.2f} to {2:.2f})".format(*value) + f" as {row['over']}"),
        "GFLOP": ("flops", lambda value: f"{value / 1e9:.4g}"),
        "of roofline": ("share_of_roofline", "{:.0%}".format),
        "peak MiB": ("peak_bytes", lambda value: f"{value / 2**20:.4g}"),
    }
    more = set(row) - {"name", "settings", "over", *(key for key, _ in shown.values())}
    plain = [(key, row[key]) for key in row if key in more and isinstance(row[key], int | float | str)]
    return {
        "": row["name"],
        **{key: str(value) for key, value in row["settings"].items()},
        **{title: text(row[key]) for title, (key, text) in shown.items() if row[key] is not None},
        **{key.replace("_", " "): f"{v:.4g}" if isinstance(v, float) else str(v) for key, v in plain},
    }


def show(row: dict) -> dict:
    """Print one row as soon as it is there; returns it."""
    low, middle, high = row["milliseconds"]
    settings = ", ".join(f"{key} {value}" for key, value in row["settings"].items())
    ratio = f"  {row['ratio'][1]:.2f} times as fast as {row['over']}" if row["ratio"] else ""
    print(f"{row['name']:<28}{settings:<48}  {middle:.4g} ms ({low:.4g} to {high:.4g}){ratio}", flush=True)
    return row


def plot(result: dict, file: Path) -> None:
    """Bars of the rows' medians, with their quartiles."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    labels = [" ".join([r["name"], *(f"{key} {value}" for key, value in r["settings"].items())]) for r in rows]
    times = [r["milliseconds"] for r in rows]
    spread = [[middle - low for low, middle, _ in times], [high - middle for _, middle, high in times]]
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(rows)))
    axes = figure.subplots()
    axes.barh(range(len(rows)), [t[1] for t in times], xerr=spread, color="#4a7ebb", capsize=2)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, median and quartiles")
    axes.set_title(f"{result['benchmark']}, measured on {result['device']['name']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


# ------------------------------------------------------------------------------------------------ the command line


def arguments(parser: argparse.ArgumentParser, rounds: int | None = 5) -> argparse.ArgumentParser:
    """Add what every benchmark takes: --rounds, --clock, --json, --plot, --profile."""
    parser.add_argument("--rounds", type=positive, default=rounds, help="in each of which all variants are timed")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, on a CPU (%(default)s)")
    for flag, metavar, text in (
        ("--json", "FILE", "file to write the figures to"),
        ("--plot", "FILE.png", "file to draw the figures in"),
        ("--profile", "FOLDER", "folder for a trace of one more run of each variant"),
    ):
        parser.add_argument(flag, type=Path, metavar=metavar, help=text)
    return parser


def positive(text: str) -> int:
    """An argparse type."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def finish(result: dict, args: argparse.Namespace) -> dict:
    """Print the table, write what was asked for, and return the result."""
    result["clock"] = args.clock if result["device"]["kind"] == "cpu" else "wall"
    print(f"\n{heading(result)}\n\n{table(result['rows'])}", flush=True)
    write(result, args.json)
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(result, args.plot)
    return result


def write(result: dict, file: Path | None) -> None:
    """Write a result as JSON, if a file was asked for."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def profiled(run: Callable[[], object], folder: Path, name: str) -> Path:
    """Write torch's trace of one call as FOLDER/NAME.json, to be opened in Perfetto or chrome://tracing."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device().type == "cuda" else [])]
    file = folder / f"{''.join(c if c.isalnum() or c in '-_.' else '_' for c in name)}.json"
    with profile(activities=kinds) as profiler, phase(name):
        run()
        synchronize()
    profiler.export_chrome_trace(str(file))
    return file
