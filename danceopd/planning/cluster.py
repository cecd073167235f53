"""`danceopd plan`: will a run fit on so many cards, and how long will its steps take. All of it is an estimate.

Memory begins with what the dry run finds for one process (danceopd.planning.dry_run) and splits it as DeepSpeed and
the engine of ZeRO do. Times are operations over a stated share of the card's peak, and bytes over stated speeds;
nothing is taken to overlap.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from danceopd.config.sections import Config
from danceopd.planning.cards import CARDS, NODE, Card, gather_seconds
from danceopd.planning.dry_run import dry_run
from danceopd.planning.memory import FLOAT, GIB, REPLICA, Plan
from danceopd.training.rollouts.replica import multiplies_in_bf16
from danceopd.training.zero.engine import GATHERED

UTILISATION = 0.4  # of a card's peak, by forwards and backwards

HOST_BANDWIDTH = 25e9  # bytes a second of host memory, for each card of a machine

LEFT = 2 * GIB  # of a card: context, workspace, fragmentation

STAGES = (0, 1, 2, 3)

# Not split over ranks unless the run shards its frozen networks.
FROZEN = ("base weights", "sources of their own weights", "source weights")

# DeepSpeed's defaults, in entries: a bucket of gradients, and the gathered weights that are kept at a time.
BUCKET, LIVE = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Setting:
    """stage: of ZeRO; offload: what lies in host memory, "" nothing, "optimizer" its states, the average and the
    float32 weights, "all" the shards of the weights too; sharded: the frozen networks are split over the ranks."""

    stage: int
    offload: str = ""
    checkpointing: bool = False
    sharded: bool = False

    def text(self) -> str:
        extra = {"optimizer": "optimizer in host memory", "all": "optimizer and weights in host memory"}
        parts = [f"ZeRO {self.stage}", extra.get(self.offload), "frozen networks sharded" if self.sharded else None]
        return ", ".join(filter(None, [*parts, "gradient checkpointing" if self.checkpointing else None]))


@dataclass
class Estimate:
    """Of one rank: bytes on the card and in host memory, and seconds of a step, each by term."""

    setting: Setting
    device: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def bytes(self) -> float:
        return sum(self.device.values())

    def time(self) -> float:
        return sum(self.seconds.values())


@dataclass
class Scaled:
    """A run on `gpus` cards. plan: the dry run of what one rank computes; operations: of a forward of one sample."""

    config: Config
    plan: Plan
    gpus: int
    card: Card
    bucket: int = BUCKET
    live: int = LIVE
    operations: float | None = None
    said: list[str] = field(default_factory=list)

    @property
    def trained(self) -> int:
        return self.plan.parameters["student, trainable"]

    def settings(self) -> Iterator[Setting]:
        """All that can be chosen from, the simplest first."""
        checkpointing = (False, True) if self.plan.activations and self.plan.activations[1] is not None else (False,)
        frozen = (
            (False, True) if self.gpus > 1 and any(self.plan.memory.get(name, (0,))[0] for name in FROZEN) else (False,)
        )
        for stage, check, offload, sharded in product(STAGES, checkpointing, ("", "optimizer", "all"), frozen):
            if (
                (stage < 3 and (offload == "all" or sharded))
                or (stage == 0 and offload)
                or (self.gpus == 1 and stage in (1, 2))
            ):
                continue
            yield Setting(stage, offload, check, sharded)

    def own_setting(self, stage: int) -> Setting:
        return Setting(stage, checkpointing=self.config.training.gradient_checkpointing)

    def estimate(self, setting: Setting) -> Estimate:
        found = Estimate(setting)
        self._memory(found)
        if self.operations and self.plan.evaluations:
            self._time(found)
        return found

    def _memory(self, found: Estimate) -> None:
        """As DeepSpeed and Zero hold it: the average is always split."""
        setting, plan, n, gpus = found.setting, self.plan, self.trained, self.gpus
        stage, device, host = setting.stage, found.device, found.host
        share, half = n / gpus, self._half()
        kept = host if setting.offload else device
        shards = host if setting.offload == "all" else device
        if stage == 3:
            shards["student"] = FLOAT * share
        else:
            device["student"] = FLOAT * n
        if stage:
            kept["float32 weights of the optimizer"] = FLOAT * share
        # A step makes the flat gradient of its part from the parameters' own.
        grads = n if stage < 2 else share
        (device if stage < 2 else kept)["gradient"] = FLOAT * (grads + (share if stage else 0))
        kept["optimizer state"] = plan.memory["optimizer state"][0] / gpus ** bool(stage)
        kept["average (EMA)"] = FLOAT * share
        if stage == 3:
            device[REPLICA] = plan.memory[REPLICA][0] if REPLICA in plan.memory else half * n
            device["gathered at a time"] = half * min(n, self.live)
            # Of the update: AdamW's two of its part's size, then what a part of the replica is gathered into and from.
            update = 0 if setting.offload else 2 * FLOAT * share
            device["working space of the update"] = max(update, half * min(n, GATHERED) * (1 + 1 / gpus))
        if stage > 1:
            device["buckets of gradients"] = half * self.bucket
        for name, (size, _) in plan.memory.items():
            if name in device or name in host or name in ("gradient", "optimizer state"):
                continue
            if name.startswith("student in ") and stage == 3:
                continue  # gathered in that dtype
            if name == "activations for the backward":
                size = plan.activations[setting.checkpointing]
            elif name in FROZEN and setting.sharded:
                live = min(size, self.live * half)
                size = size / gpus + live
            device[name] = size
        for name, (size, _) in plan.host.items():
            host[name] = size

    def _half(self) -> int:
        """Bytes of an entry that is gathered."""
        return 2 if multiplies_in_bf16(self.config) else FLOAT

    def forwards(self, checkpointing: bool) -> float:
        """Forwards of one sample by one rank in a step; a backward counts as two."""
        counts = dict(self.plan.evaluations)
        again = counts.pop("student, forward again", None)
        if checkpointing:
            counts["again"] = again if again is not None else counts["student, forward"]
        return sum(counts.values())

    def gathers(self) -> int:
        """Times that a step gathers the student's weights at stage 3: two for each query, one for the replica."""
        return 2 * self.config.training.gradient_accumulation_steps + 1

    def _time(self, found: Estimate) -> None:
        setting, n, gpus, card = found.setting, self.trained, self.gpus, self.card
        seconds, half, parts = found.seconds, self._half(), self.config.training.gradient_accumulation_steps
        peak = UTILISATION * card.operations
        seconds["network evaluations"] = self.forwards(setting.checkpointing) * self.operations / peak
        if gpus > 1 and setting.stage == 3:
            seconds["gathering the student"] = self.gathers() * gather_seconds(half * n, gpus, card)
            seconds["gradients"] = parts * gather_seconds(half * n, gpus, card)
        elif gpus > 1:  # a reduction, and a gather of what it gives or of the new weights
            seconds["gradients"] = 2 * gather_seconds(FLOAT * n, gpus, card)
        if setting.sharded:
            frozen = sum(self.plan.memory[name][0] for name in FROZEN if name in self.plan.memory)
            asked = self.config.rollout.num_inference_steps + 3 if self.config.student.lora else 1
            seconds["gathering frozen networks"] = parts * asked * gather_seconds(frozen, gpus, card)
        if setting.offload:  # AdamW reads or writes seven numbers of float32 for each parameter
            seconds["optimizer in host memory"] = n / gpus * (2 * FLOAT / card.host + 7 * FLOAT / HOST_BANDWIDTH)
        if setting.offload == "all":
            seconds["weights from host memory"] = self.gathers() * half * n / gpus / card.host

    def fitting(self) -> list[Estimate]:
        """What fits, the fastest first; of equals the simplest."""
        found = [self.estimate(setting) for setting in self.settings()]
        return sorted((e for e in found if e.bytes() + LEFT <= self.card.memory), key=lambda e: round(e.time(), 4))

    def text(self) -> str:
        return "\n".join(_text(self))


def plan(config: Config, gpus: int, card: str, deepspeed: dict | None = None) -> Scaled:
    """What a configuration takes on so many cards; deepspeed: its settings, whose sizes of buckets are used.

    Loads no weight. What is missing stands in the plan's problems, as for a dry run.
    """
    training, said = config.training, []
    each = math.ceil(training.batch_size / gpus / training.gradient_accumulation_steps)
    if training.batch_size < gpus * training.gradient_accumulation_steps:
        said.append(
            f"training.batch_size: {training.batch_size} samples are fewer than {gpus} cards x "
            f"{training.gradient_accumulation_steps} micro-batches, so that some have none; the time is that of a card "
            f"with {each * training.gradient_accumulation_steps}"
        )
    if training.optimizer != "adamw" and gpus > 1:
        said.append(f"training.optimizer: {training.optimizer} runs in one process; with DeepSpeed use adamw")
    own = training.model_copy(update={"batch_size": each * training.gradient_accumulation_steps})
    one = config.model_copy(update={"training": own})
    found = dry_run(one)
    zero = (deepspeed or {}).get("zero_optimization", {})
    bucket = int(float(zero.get("reduce_bucket_size", BUCKET)))
    live = int(float(zero.get("stage3_max_live_parameters", LIVE)))
    scaled = Scaled(one, found, gpus, CARDS[card], bucket, live, said=said)
    if found.operations:
        weights = {name: c.weight for name, c in config.capabilities.items()}
        counts = found.operations()
        scaled.operations = sum(counts[name] * w for name, w in weights.items()) / sum(weights.values())
    return scaled


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _text(scaled: Scaled) -> Iterator[str]:
    found, card, gpus = scaled.plan, scaled.card, scaled.gpus
    yield f"AN ESTIMATE, nothing of it measured: {gpus} x {card.name}"
    yield from (f"  {line}" for line in scaled.said)
    if "student, trainable" not in found.parameters:
        yield "no estimate without the network's configuration"
    else:
        yield ""
        yield from _memory_table(scaled)
        yield ""
        yield from _time_lines(scaled)
        yield ""
        yield from _choice(scaled)
    if found.problems:
        yield "\nthis run cannot start here:"
        yield from (f"  {problem}" for problem in found.problems)


def _memory_table(scaled: Scaled) -> Iterator[str]:
    stages = STAGES if scaled.gpus > 1 else (0,)
    columns = [scaled.estimate(scaled.own_setting(stage)) for stage in stages]
    names = list(dict.fromkeys(name for e in columns for name in e.device))
    each = scaled.config.training.batch_size // scaled.config.training.gradient_accumulation_steps
    yield (
        f"memory of one rank in GiB, {each} samples in a forward"
        + " " * 4
        + "".join(f"{f'ZeRO {s}':>10}" for s in stages)
    )
    for name in names:
        cells = [_gib(e.device[name]) if name in e.device else "-" for e in columns]
        yield f"  {name:44}" + "".join(f"{cell:>10}" for cell in cells)
    yield f"  {'total':44}" + "".join(f"{_gib(e.bytes()):>10}" for e in columns)
    fits = ["fits" if e.bytes() + LEFT <= scaled.card.memory else "too large" for e in columns]
    yield f"  {f'on {scaled.card.memory / GIB:.0f} GiB, of which {LEFT / GIB:.0f} are left':44}" + "".join(
        f"{cell:>10}" for cell in fits
    )
    sharded = replace(scaled.own_setting(3), sharded=True)
    if sharded in scaled.settings():
        yield (
            f"  {'total with the frozen networks sharded':44}"
            + " " * 30
            + f"{_gib(scaled.estimate(sharded).bytes()):>10}"
        )
    if not scaled.plan.activations:
        yield "  at least: without activations, which need prepared rows and the transformer"


def _time_lines(scaled: Scaled) -> Iterator[str]:
    card = scaled.card
    if not scaled.operations or not scaled.plan.evaluations:
        missing = (
            "the network and its rows"
            if scaled.plan.evaluations
            else "this method, whose evaluations are not worked out"
        )
        yield f"no time without {missing}"
        return
    rows, each = scaled.config.training.batch_size, scaled.operations / 1e12
    forwards = scaled.forwards(scaled.config.training.gradient_checkpointing)
    peak = f"{UTILISATION:.0%} of {card.operations / 1e12:.0f} dense bf16 TFLOPS"
    yield f"one step: {forwards:.1f} network evaluations of a rank for its {rows} samples, {each:.3g} TFLOP each:"
    yield f"  {forwards * each:.4g} TFLOP, at {peak}"
    yield (
        f"  links in one direction: NVLink {card.nvlink / 1e9:.0f} GB/s a card in a machine of {NODE}, "
        f"{card.network / 1e9:.0f} GB/s a card between, {card.host / 1e9:.0f} GB/s to host memory; nothing overlaps"
    )


def _choice(scaled: Scaled) -> Iterator[str]:
    fitting = scaled.fitting()
    if not fitting:
        least = min(map(scaled.estimate, scaled.settings()), key=Estimate.bytes)
        yield f"nothing fits; the least is {_gib(least.bytes())} GiB with {least.setting.text()}"
        yield "  a smaller training.batch_size, more gradient_accumulation_steps, student.lora or more cards take less"
        return
    cheapest = fitting[0]
    host = _gib(sum(cheapest.host.values()))
    yield f"cheapest setting that fits: {cheapest.setting.text()}"
    yield f"  {_gib(cheapest.bytes())} GiB of the card, {host} GiB of host memory a rank"
    if cheapest.seconds:
        steps = scaled.config.training.max_steps
        parts = ", ".join(f"{name} {value:.3g}" for name, value in cheapest.seconds.items())
        yield f"  {cheapest.time():.3g} s a step ({parts}); {steps} steps: {steps * cheapest.time() / 3600:.2g} h"
    seen = {cheapest.setting.stage}
    for other in fitting[1:]:
        if other.setting.stage not in seen:
            seen.add(other.setting.stage)
            time = f", {other.time():.3g} s a step" if other.seconds else ""
            yield f"  also: {other.setting.text()}: {_gib(other.bytes())} GiB{time}"
