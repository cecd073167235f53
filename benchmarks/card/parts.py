"""The parts of the check, each a function of its report (benchmarks.card.worker.Report)."""

import copy
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
from functools import cache, partial
from pathlib import Path

import torch
from danceopd_kernels import compiled

from benchmarks import common, kernel_bench
from benchmarks.card import network, right
from benchmarks.common import cards, on_card
from danceopd.core.batch import Batch
from danceopd.core.fields import routed, within
from danceopd.core.forwards import SharedField
from danceopd.core.methods.danceopd import danceopd
from danceopd.core.phase import phase
from danceopd.core.questions import matched
from danceopd.core.rollout import rollout as roll_out
from danceopd.core.schedule import sigma_grid
from danceopd.models.fp8 import to_fp8
from danceopd.models.shared_base import SharedBase, target_layers
from danceopd.models.students import LoraStudent
from danceopd.support.cards import CARDS, card_of
from danceopd.support.devices import no_cuda
from danceopd.training.rollouts.capture import Pool
from danceopd.training.rollouts.static import StaticField
from danceopd.training.rollouts.trained import StaticStudent
from danceopd.training.rows import Rows

ROOT = Path(__file__).parents[2]
ROUNDS = 3
BATCH, SOURCES, RANK = 4, 4, 64
LORA_STEP = "a LoRA's step, SD3"  # as benchmarks/against.py has it in its table
LAST = 3.0  # seconds of a part's time in which no further test begins


def full() -> bool:
    """Whether the sizes are a GPU's: a CPU, and the pretend card whose numbers lie there, take tiny ones."""
    return common.device().type == "cuda"


def precision() -> torch.dtype:
    return torch.bfloat16 if on_card() else torch.float32


@cache
def limit() -> dict:
    """{"flops", "fp8", "bytes"} a second: as published of a card that is listed, else as measured here; and "of"."""
    card = CARDS.get(card_of(cards().get_device_name()) or "") if on_card() else None
    if card:
        return {"flops": card.operations, "fp8": card.fp8 or card.operations, "bytes": card.bandwidth, "of": card.name}
    found = common.roofline([str(precision()).removeprefix("torch.")], rounds=2)
    (flops,) = found["flops_per_second"].values()
    return {"flops": flops, "fp8": flops, "bytes": found["copy_bytes_per_second"], "of": "measured on this machine"}


def least_ms(flops: float, moved: float, narrow: bool = False) -> float:
    """The least milliseconds of so many operations and bytes by the roofline."""
    return 1e3 * max(flops / limit()["fp8" if narrow else "flops"], moved / limit()["bytes"])


def sizes() -> dict[str, network.Size]:
    """The networks that are asked, by name."""
    if not full():
        return {"tiny": network.TINY}
    return {"SD3.5-medium's size, 1024 px": network.MEDIUM, "2 blocks of 12 billion, 1024 px": network.TWELVE_BILLION}


def named(variant: str) -> str:
    """A variant's name in a row: what is captured on a card are static steps on a CPU."""
    return variant if on_card() else variant.replace("captured", "static")


def peak(run) -> float | None:
    """The most MiB of a call beyond what was there, of a card."""
    return common.peak_bytes(run) / 2**20 if on_card() else None


# ---------------------------------------------------------------------------------------------------- the machine


def machine(report) -> None:
    """What it is, and what its product and its copy reach of what is published."""
    found = common.describe()
    kernels = found.pop("kernels")
    where = found["name"] + (f", compute capability {cards().get_device_capability()}" if on_card() else "")
    report.say("device", note=where, main=True, description=found)
    if not on_card() and (torch.version.cuda or no_cuda()):  # a build for the CPU, on no card's machine, is a rehearsal
        reason = no_cuda() or f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and finds no card"
        report.say("CUDA", ok=False, note=reason, main=True)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    for name in ("triton", "diffusers", "transformers", "deepspeed", "pytest", "hypothesis"):
        versions[name] = _version(name)
    report.say("versions", note=", ".join(f"{name} {value}" for name, value in versions.items() if value))
    for said in kernels.splitlines():
        report.say("kernels", note=said, show=False)
    report.say("limit of the figures", note=f"{limit()['of']}")
    dtypes = ["bfloat16", "float8_e4m3fn"] if on_card() else ["float32"]
    measured = common.roofline(dtypes, rounds=ROUNDS)
    for dtype, rate in measured["flops_per_second"].items():
        peak_rate = limit()["fp8" if "float8" in dtype else "flops"]
        note = f"{rate / peak_rate:.0%} of the limit"
        report.say(f"product, {dtype}", rate / 1e12, "TFLOP/s", note=note, main=True)
    rate = measured["copy_bytes_per_second"]
    note = f"{rate / limit()['bytes']:.0%} of the limit"
    report.say("copy, read and written", rate / 1e9, "GB/s", note=note, main=True)


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# -------------------------------------------------------------------------------------------------------- kernels


def kernels(report) -> None:
    """Every operation on every backend against float64, and what it reaches of the bandwidth."""
    device = common.device()
    tokens, width = (1000, 1536) if full() else (9, 40)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        for case in right.cases(device, dtype, tokens, width):
            report.need(1)
            for backend, error in right.errors(case):
                bound = right.BOUND[name]
                report.say(f"{case.name}, {name}, {backend}", error, "error", ok=error <= bound, show=error > bound)
        for what, backend, error, bound in right.fp8_errors(device, dtype, 4 * tokens, width // 16 * 16):
            report.say(f"{what}, {name}, {backend}", error, "error", ok=error <= bound, show=error > bound)
    _bandwidth(report, ["bfloat16", "float32"] if on_card() else ["float32"])


def _bandwidth(report, dtypes: list[str], backend: str | None = None) -> None:
    shape = kernel_bench.large_shape() if full() else (2, 4, 32, 32)
    for name in dtypes:
        dtype = getattr(torch, name)
        source = torch.randn(shape, device=common.device()).to(dtype)
        target = torch.empty_like(source)
        copying = common.replayed(lambda: target.copy_(source))  # noqa: B023
        for case in kernel_bench.cases(shape, dtype, common.device().type):
            report.need(2)
            if backend == "cuda" and "step" not in case.name and "mse" not in case.name:
                continue
            times = common.interleaved(
                {"ours": common.replayed(partial(case.run, backend)), "copy": copying},
                ROUNDS,
                least=0.005,
            )
            taken, copied = (common.quartiles(times[key])[1] for key in ("ours", "copy"))
            share = case.least / taken / (2 * source.nbytes / copied)
            report.say(
                f"{case.name}, {name}" + (f", {backend}" if backend else ""), 1e3 * taken, "ms",
                least=least_ms(0, case.least), note=f"{share:.0%} of a copy's bandwidth", main=name == dtypes[0],
            )  # fmt: skip


# -------------------------------------------------------------------------------------------- rollout and queries


def rollout(report) -> None:
    """A step of rollouts: eager, static or captured, in FP8."""
    device, steps = common.device(), 8
    for title, size in sizes().items():
        base = network.make(size, device, precision())
        narrow = to_fp8(copy.deepcopy(base))
        weights = sum(p.nbytes for p in base.parameters())
        codes = sum(p.nbytes for p in narrow.parameters())
        for batch in (1, 4):
            noise, conditioning = network.samples(size, batch, device)
            sigmas, until = sigma_grid(steps, 3.0), torch.full((batch, 1), steps)
            expected = None
            for name, asked in (("eager", base), ("captured", base), ("captured, fp8", narrow)):
                report.need(5 if full() else 0)
                field = _field(asked)
                if "captured" in name:
                    field = StaticField(field, field, None, [asked], capture=on_card())
                run = lambda: roll_out(field, noise, conditioning, sigmas, until)  # noqa: B023, E731
                states = run()[0].float()
                expected = states if expected is None else expected
                distance = float((states - expected).norm() / expected.norm())
                taken = common.quartiles(common.interleaved({name: run}, ROUNDS)[name])[1]
                least = least_ms(batch * size.flops(), codes if "fp8" in name else weights, "fp8" in name)
                refused = getattr(field, "reason", None)
                report.say(
                    f"{title}, batch {batch}, {named(name)}: a step", 1e3 * taken / steps, "ms", least=least,
                    ok=distance < (0.2 if "fp8" in name else 0.02) and not refused, main=batch == 1,
                    note=refused or "", peak_MiB=peak(run), distance=distance,
                )  # fmt: skip


def _field(asked):
    return lambda latents, sigma, conditioning: network.velocity(asked, latents, sigma, conditioning.prompt)


def _loras(transformer) -> list[dict]:
    found = []
    for seed in range(SOURCES):
        generator, lora = torch.Generator().manual_seed(seed), {}
        for name in target_layers(transformer, network.LORA_TARGETS):
            out, width = transformer.get_submodule(name).weight.shape
            a = torch.randn(RANK, width, generator=generator) / width**0.5
            lora[name] = (a, 0.02 * torch.randn(out, RANK, generator=generator), 1.0)
        found.append(lora)
    return found


def _sources(transformer, layers: list[str]) -> tuple[SharedBase, list[SharedField]]:
    """One network with the adapters of all sources, and each source as a field."""
    shared = SharedBase(transformer, _loras(transformer), network.velocity, layers)

    def ask(latents, sigma, conditioning):
        return shared(latents, sigma, conditioning, conditioning.adapter)

    return shared, [SharedField(shared, ask, m) for m in range(SOURCES)]


def query(report) -> None:
    """Four LoRA sources on one network, asked in one forward."""
    device = common.device()
    title, size = next(iter(sizes().items()))
    for name in ("", ", fp8"):
        report.need(5 if full() else 0)
        base = network.make(size, device, precision())
        weights = sum(p.nbytes for p in base.parameters())
        _, fields = _sources(to_fp8(base) if name else base, [])
        states, conditioning = network.samples(size, BATCH, device)
        sigma, route = torch.linspace(0.9, 0.1, BATCH, device=device), torch.arange(BATCH) % SOURCES
        run = lambda: routed(fields, route, states, sigma, conditioning)  # noqa: B023, E731
        together = run().target()
        alone = fields[1](states[1:2], sigma[1:2], conditioning[1:2]).float()
        distance = float((together[1:2] - alone).norm() / alone.norm())
        taken = common.quartiles(common.interleaved({"": run}, ROUNDS)[""])[1]
        least = least_ms(BATCH * size.flops(), weights, bool(name))
        report.say(
            f"{title}, {SOURCES} LoRA sources, {BATCH} samples{name}", 1e3 * taken, "ms", least=least,
            ok=distance < (0.1 if on_card() else 1e-3), peak_MiB=peak(run), main=True,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------- whole updates


class Update:
    """DanceOPD's update of a LoRA student, with LoRA sources on the student's base, matched one sample at a time."""

    def __init__(self, size: network.Size, captured: bool, fp8: bool):
        device = common.device()
        base = network.make(size, device, precision())
        layers = target_layers(base, network.LORA_TARGETS)
        shared, self.fields = _sources(to_fp8(base) if fp8 else base, layers)
        self.student = LoraStudent(shared, layers, RANK, RANK, torch.Generator().manual_seed(1)).to(device)
        field = lambda latents, sigma, conditioning: self.student(latents, sigma, conditioning)  # noqa: E731
        self.rolled = self.trained = field
        if captured:
            pool, read = Pool(device) if on_card() else None, [self.student, base]
            self.rolled = StaticField(field, field, None, read, capture=on_card(), pool=pool)
            self.trained = StaticStudent(field, read, pool)
            ask = self.fields[0].ask
            steps = StaticField(ask, ask, capture=on_card(), name="sources", rows=Rows(BATCH), pool=pool)
            self.fields = [within(source, lambda _: steps.once) for source in self.fields]
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4)
        noise, conditioning = network.samples(size, BATCH, device)
        self.batch = Batch(noise, conditioning, torch.arange(BATCH) % SOURCES)
        self.sigmas, self.steps, self.depth = sigma_grid(16 if full() else 4, 3.0), 0, 0

    def __call__(self) -> torch.Tensor:
        """The loss."""
        generator, total = torch.Generator().manual_seed(self.steps), 0.0
        self.steps += 1
        with phase("questions"), torch.no_grad():
            asked = danceopd(self.rolled, self.fields, self.batch, sigmas=self.sigmas, generator=generator)
        self.depth = int(asked.depth.sum())
        for part in asked.split(BATCH):
            loss = matched(self.trained, part).loss.sum() / BATCH
            with phase("backward"):
                loss.backward()
            total = total + loss.detach()
        with phase("step"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return total


def update(report) -> None:
    """Whole updates: by graphs, eager, in FP8; losses that agree, samples a second, MFU, memory, phases."""
    size, first = network.MEDIUM_512 if full() else network.TINY, None
    title = "SD3.5-medium's size, 512 px" if full() else "tiny"
    for name, options in {"captured": (True, False), "eager": (False, False), "captured, fp8": (True, True)}.items():
        report.need(15 if full() else 0)
        run = Update(size, *options)
        begin = cards().memory_allocated() if on_card() else 0
        losses = [float(run()) for _ in range(3)]
        first = first or losses
        near = all(abs(a - b) < (0.3 if options[1] else 0.05) * b for a, b in zip(losses, first, strict=True))
        taken = common.quartiles(common.interleaved({name: run}, ROUNDS)[name])[1]
        # Forwards of a sample: those of the rollout, the source's, the student's, and its backward to the inputs.
        flops = size.flops() * (run.depth + 3 * BATCH)
        with common.Phases() as phases, phase("rest"):
            run()
        whole = sum(phases.seconds.values())
        shares = {key: round(100 * value / whole, 1) for key, value in phases.seconds.items()}
        refused = getattr(run.rolled, "reason", None) or getattr(run.trained, "reason", None)
        report.say(
            f"{title}, {BATCH} samples, {named(name)}: an update", 1e3 * taken, "ms", least=least_ms(flops, 0),
            ok=near and not refused, main=True, phases=shares, losses=losses, peak_MiB=peak(run),
            note=refused or f"{BATCH / taken:.3g} samples/s, MFU {flops / taken / limit()['flops']:.1%}",
        )  # fmt: skip
        report.say("  phases, %", note=", ".join(f"{key} {value}" for key, value in shares.items()))
        if on_card():
            for _ in range(5):
                run()
            common.synchronize()
            grown = (cards().memory_allocated() - begin) / 2**20
            report.say("  memory that 11 updates have added", grown, "MiB", show=False)
        del run
    _lora_step(report)


def _lora_step(report) -> None:
    """A step of LoRA training, which other trainers publish; for benchmarks/against.py a file where it ran on a GPU."""
    report.need(10 if full() else 0)
    device, size = common.device(), network.MEDIUM if full() else network.TINY
    base = network.make(size, device, precision())
    layers = target_layers(base, network.LORA_TARGETS)
    shared = SharedBase(base, [], network.velocity, layers)
    student = LoraStudent(shared, layers, RANK, RANK, torch.Generator().manual_seed(1)).to(device)
    asked = StaticStudent(lambda *inputs: student(*inputs), [student, base], Pool(device) if on_card() else None)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    noise, conditioning = network.samples(size, 1, device)
    sigma = torch.full((1,), 0.5, device=device)

    def step() -> None:
        asked(noise, sigma, conditioning).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = common.interleaved({LORA_STEP: step}, ROUNDS, warmup=2)[LORA_STEP]
    title = next(iter(sizes()))
    report.say(
        f"{LORA_STEP}: {title}, {named('captured')}", 1e3 * common.quartiles(times)[1], "ms", ok=not asked.reason,
        least=least_ms(2 * size.flops(), 0), note=asked.reason or "", peak_MiB=peak(step), main=True,
    )  # fmt: skip
    if full():
        found = common.result("against", [common.row(LORA_STEP, times)])
        common.write(found, report.out / "against-card.json")


# ------------------------------------------------------------------------------------------------------ the rest


def tests(report) -> None:
    """The tests marked gpu, in this process."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing or not full():
        report.say("tests marked gpu", note=f"left out: {', '.join(missing) or 'a GPU'} is not there")
        return
    import pytest

    _load_cuda(report)
    say, counts, outcome, asked = report.say, {"passed": 0, "failed": 0, "skipped": 0}, {}, []

    class Watch:
        def pytest_collection_finish(self, session):
            asked.extend(item.nodeid for item in session.items)

        def pytest_runtest_logreport(self, report):  # pytest's name for a test's outcome
            if report.when == "call" or report.outcome != "passed":
                outcome[report.nodeid] = report.outcome
            if report.outcome == "failed":
                last = str(report.longrepr).strip().splitlines()[-1][:200]
                say(report.nodeid.rpartition("/")[2][:60], ok=False, note=last)

        def pytest_runtest_logfinish(self, nodeid):
            if report.left() <= LAST:
                pytest.exit("the part's time is up", returncode=0)

    options = ["-m", "gpu and not slow", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "--color=no"]
    options += ["--continue-on-collection-errors"]  # a file may need what is not installed
    folders = [str(ROOT / "tests" / name) for name in ("kernels", "training", "benchmarks", "models")]
    code = pytest.main([*options, *folders], plugins=[Watch()])
    for result in outcome.values():
        counts[result] += 1
    note = ", ".join(f"{count} {name}" for name, count in counts.items()) + f", pytest's exit status {int(code)}"
    cut = len(outcome) < len(asked)
    note += f": {len(outcome)} of {len(asked)} ran, the time was up" if cut else ""
    right_so_far = bool(counts["passed"]) and not counts["failed"]
    ok = None if cut and right_so_far else right_so_far  # what has not run is neither right nor wrong
    report.say("tests marked gpu", counts["passed"], "passed", ok=ok, note=note, main=True)
    if cut:
        report.need(LAST)


def csrc(report) -> None:
    """The CUDA part of csrc/: built by nvcc, right, and its share of the bandwidth."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if not nvcc or importlib.util.find_spec("setuptools") is None:
        report.say("csrc's CUDA part", note="left out: nvcc or setuptools is not there")
        return
    sys.path.insert(0, str(ROOT / "kernels"))
    from build_csrc import nvcc_command

    major, minor = cards().get_device_capability() if on_card() else (9, 0)
    os.environ.setdefault("DANCEOPD_CUDA_ARCHS", f"{major}{minor}")
    # torch brings pybind11's headers along.
    folders = [str(Path(torch.__file__).parent / "include"), sysconfig.get_path("include")]
    target = _cuda_file(report)
    command = nvcc_command(nvcc, str(ROOT / "csrc" / "cuda.cu"), target, folders)
    if not _ran(report, "csrc's CUDA part is built", command) or not full():
        return
    _load_cuda(report)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for case in right.cases(common.device(), dtype, 1000, 1536):
            for backend, error in right.errors(case):
                if backend == "cuda":
                    report.say(f"{case.name}, {name}, cuda", error, "error", ok=error <= right.BOUND[name], show=False)
    _bandwidth(report, ["bfloat16"], "cuda")


def _ran(report, name: str, command: list[str]) -> bool:
    """Run a command within the part's time, in a process group that is ended as a whole; whether it succeeded."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    allowed, late = max(1.0, report.left() - 3), ""
    try:
        said, _ = process.communicate(timeout=allowed)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        late = f"ended after {allowed:.0f} s: "
    last = said.strip().splitlines()[-1:] or [""]
    report.say(name, ok=process.returncode == 0, note=f"{late}{last[0]}"[:160], main=True)
    return process.returncode == 0


def _cuda_file(report) -> Path:
    return report.out / f"_CUDA{sysconfig.get_config_var('EXT_SUFFIX')}"


def _load_cuda(report) -> None:
    """Let this process have the module that csrc built, if it did, where the installation has none."""
    if compiled.module("cuda") is None and _cuda_file(report).is_file():
        spec = importlib.util.spec_from_file_location("danceopd_kernels._CUDA", _cuda_file(report))
        if spec and spec.loader:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules[spec.name] = module
            compiled.module.cache_clear()


def zero3(report) -> None:
    """Two updates of the picture world's run under ZeRO-3 on one rank, by the trainer itself."""
    needed = ("deepspeed", "pydantic", "safetensors", "yaml")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing or not full():
        report.say("ZeRO-3 on one rank", note=f"left out: {', '.join(missing) or 'a GPU'} is not there")
        return
    settings = report.out / "zero3.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    command = [sys.executable, "-m", "danceopd", "train", "--config", str(ROOT / "configs" / "demo.yaml")]
    command += [
        "--deepspeed",
        str(settings),
        "training.max_steps=2",
        "training.batch_size=8",
        "training.sample_every=0",
    ]
    command += [f"training.output_dir={report.out / 'zero3'}"]
    _ran(report, "ZeRO-3 on one rank, two updates", command)


def profile(report) -> None:
    """Where an update's time goes: the operations that take most, and how often kernels start."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    report.need(10 if full() else 0)
    run = Update(network.MEDIUM_512 if full() else network.TINY, captured=True, fp8=False)
    for _ in range(2):
        run()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if full() else [])]
    with profiled(activities=kinds) as seen:
        run()
        common.synchronize()
    spent = "self_device_time_total" if full() else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, spent))
    whole = sum(getattr(row, spent) for row in rows) or 1
    report.say("kinds of operations", len(rows), "kinds", note=f"{sum(row.count for row in rows)} calls", main=True)
    for row in rows[:15]:
        share = getattr(row, spent) / whole
        report.say(row.key[:50], getattr(row, spent) / 1e3, "ms", note=f"{share:.1%}, {row.count} calls", show=False)
