"""Estimates whether a run fits on so many cards, and how long its updates take: `danceopd plan`.

Memory begins with what the dry run finds for one process (danceopd.planning.dry_run) and splits it as DeepSpeed and
the engine of ZeRO do. Times are operations over a stated share of the card's peak, and bytes over stated speeds;
nothing is taken to overlap.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from danceopd.config.sections import Config
from danceopd.planning.dry_run import Examine, dry_run
from danceopd.planning.largest import largest
from danceopd.planning.memory import (
    ACTIVATIONS,
    BASE,
    BEYOND,
    FLOAT,
    LEFT,
    REPLICA,
    STEP,
    Findings,
    alone,
    beyond_activations,
)
from danceopd.support.cards import CARDS, NODE, Card, gather_seconds
from danceopd.support.memory import GIB, format_bytes
from danceopd.support.texts import format_seconds, many
from danceopd.training.rollouts.replica import multiplies_in_bf16
from danceopd.training.zero.engine import GATHERED
from danceopd.training.zero.settings import for_ranks

UTILISATION = 0.4  # of a card's peak, by forwards and backwards

HOST_BANDWIDTH = 25e9  # bytes a second of host memory, for each card of a machine

STAGES = (0, 1, 2, 3)

# Not split over ranks unless the run shards its frozen networks.
FROZEN = (BASE, "sources of their own weights", "source weights")

# DeepSpeed's defaults, in entries: a bucket of gradients, and the gathered weights that are kept at a time.
BUCKET, LIVE = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Setting:
    """A way to spread a run over its cards.

    Attributes:
        stage: ZeRO's, 0 to 3.
        offload: What lies in host memory: "" nothing; "optimizer" its states, the average and the float32 weights;
            "all" the shards of the weights too.
        checkpointing: Whether the backward computes blocks again.
        sharded: Whether the frozen networks are split over the ranks.
    """

    stage: int
    offload: str = ""
    checkpointing: bool = False
    sharded: bool = False

    def text(self) -> str:
        """Returns the setting in words."""
        extra = {"optimizer": "optimizer in host memory", "all": "optimizer and weights in host memory"}
        parts = [f"ZeRO {self.stage}", extra.get(self.offload), "frozen networks sharded" if self.sharded else None]
        return ", ".join(filter(None, [*parts, "gradient checkpointing" if self.checkpointing else None]))


@dataclass
class Estimate:
    """What one rank takes in a setting: bytes on the card and in host memory, and seconds of an update, by term."""

    setting: Setting
    device: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def bytes(self) -> float:
        """Returns the bytes on the card."""
        return sum(self.device.values())

    def time(self) -> float:
        """Returns the seconds of an update."""
        return sum(self.seconds.values())


@dataclass
class Plan:
    """A run on several cards, and what it takes in each setting.

    Attributes:
        config: The configuration of one rank's share of the batch.
        findings: The dry run of what one rank computes.
        gpus: Number of cards, 8 in a machine.
        card: What they are.
        bucket, live: DeepSpeed's sizes, in entries: a bucket of gradients, and the gathered weights kept at a time.
        operations: floating-point operations of a forward of one sample; None where they are not known.
        notes: Lines about what the estimate does not show.
    """

    config: Config
    findings: Findings
    gpus: int
    card: Card
    bucket: int = BUCKET
    live: int = LIVE
    operations: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def trained(self) -> int:
        return self.findings.parameters["student, trainable"]

    def settings(self) -> Iterator[Setting]:
        """Yields all settings that can be chosen, the simplest first."""
        activations, memory = self.findings.activations, self.findings.memory
        checkpointing = (False, True) if activations and activations[1] is not None else (False,)
        frozen = self.gpus > 1 and any(memory.get(name, (0,))[0] for name in FROZEN)
        shardings = (False, True) if frozen else (False,)
        for stage, check, offload, sharded in product(STAGES, checkpointing, ("", "optimizer", "all"), shardings):
            if (
                (stage < 3 and (offload == "all" or sharded))
                or (stage == 0 and offload)
                or (self.gpus == 1 and stage in (1, 2))
            ):
                continue
            yield Setting(stage, offload, check, sharded)

    def own_setting(self, stage: int) -> Setting:
        """Returns the configuration's own setting at a stage of ZeRO."""
        return Setting(stage, checkpointing=self.config.training.gradient_checkpointing)

    def estimate(self, setting: Setting) -> Estimate:
        """Estimates what one rank takes in a setting."""
        found = Estimate(setting)
        self._memory(found)
        if self.operations and self.findings.evaluations:
            self._time(found)
        return found

    def _memory(self, found: Estimate) -> None:
        """Adds the bytes as DeepSpeed and training.zero.engine hold them: the average is always split."""
        setting, findings, n, gpus = found.setting, self.findings, self.trained, self.gpus
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
        kept["optimizer state"] = findings.memory["optimizer state"][0] / gpus ** bool(stage)
        kept["average (EMA)"] = FLOAT * share
        if stage == 3:
            device[REPLICA] = findings.memory[REPLICA][0] if REPLICA in findings.memory else half * n
            device["gathered at a time"] = half * min(n, self.live)
            # The update takes AdamW's two of its part's size, then what the replica is gathered from and into.
            update = 0 if setting.offload else 2 * FLOAT * share
            device["working space of the update"] = max(update, half * min(n, GATHERED) * (1 + 1 / gpus))
        if stage > 1:
            device["buckets of gradients"] = half * self.bucket
        if gpus == 1 and not stage and findings.activations:
            device |= alone(findings, setting.checkpointing)
        for name, (size, _) in findings.memory.items():
            if name in device or name in host or name in ("gradient", "optimizer state", STEP):
                continue
            if name.startswith("student in ") and stage == 3:
                continue  # gathered in that dtype
            if name == ACTIVATIONS:
                size = findings.activations[setting.checkpointing]
            elif name == BEYOND:
                size = beyond_activations(findings, findings.activations[setting.checkpointing])
            elif name in FROZEN and setting.sharded:
                live = min(size, self.live * half)
                size = size / gpus + live
            device[name] = size
        for name, (size, _) in findings.host.items():
            host[name] = size

    def _half(self) -> int:
        """Returns the bytes of an entry that is gathered."""
        return 2 if multiplies_in_bf16(self.config) else FLOAT

    def forwards(self, checkpointing: bool) -> float:
        """Returns the forwards of one sample by one rank in an update; a backward counts as two."""
        counts = dict(self.findings.evaluations)
        again = counts.pop("student, forward again", None)
        if checkpointing:
            counts["again"] = again if again is not None else counts["student, forward"]
        return sum(counts.values())

    def gathers(self) -> int:
        """Returns how often an update gathers the student's weights at stage 3: two a micro-batch, one a replica."""
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
            frozen = sum(self.findings.memory[name][0] for name in FROZEN if name in self.findings.memory)
            asked = self.config.rollout.num_inference_steps + 3 if self.config.student.lora else 1
            seconds["gathering frozen networks"] = parts * asked * gather_seconds(frozen, gpus, card)
        if swap := self.findings.swap:
            seconds["blocks from host memory"] = swap.size * swap.passes / card.host
        if setting.offload:  # AdamW reads or writes seven numbers of float32 for each parameter
            seconds["optimizer in host memory"] = n / gpus * (2 * FLOAT / card.host + 7 * FLOAT / HOST_BANDWIDTH)
        if setting.offload == "all":
            seconds["weights from host memory"] = self.gathers() * half * n / gpus / card.host

    def fitting(self) -> list[Estimate]:
        """Returns what fits, the fastest first; of equals the simplest."""
        found = [self.estimate(setting) for setting in self.settings()]
        return sorted((e for e in found if e.bytes() + LEFT <= self.card.memory), key=lambda e: round(e.time(), 4))

    def text(self) -> str:
        """Returns the plan as it is printed."""
        return "\n".join(_text(self))


def plan(config: Config, examine: Examine, gpus: int, card: str, deepspeed: dict | None = None) -> Plan:
    """Estimates what a configuration takes on so many cards, without loading a weight.

    Args:
        config: The run's configuration.
        examine: Looks at the networks and the data, as for `planning.dry_run.dry_run`.
        gpus: Number of cards, 8 in a machine.
        card: Key of the card in CARDS.
        deepspeed: DeepSpeed's settings, whose sizes of buckets are used.

    Returns:
        The plan; what is missing stands in its findings' problems.
    """
    config, notes = for_ranks(config) if gpus > 1 else (config, [])
    training = config.training
    each = math.ceil(training.batch_size / gpus / training.gradient_accumulation_steps)
    if training.batch_size < gpus * training.gradient_accumulation_steps:
        notes.append(
            f"training.batch_size: {training.batch_size} samples are fewer than {gpus} cards x "
            f"{training.gradient_accumulation_steps} micro-batches, so that some have none; the time is that of a card "
            f"with {each * training.gradient_accumulation_steps}"
        )
    if training.optimizer != "adamw" and gpus > 1:  # such as that of 8 bits
        notes.append(f"training.optimizer: {training.optimizer} runs in one process; with DeepSpeed use adamw")
    if training.swap_blocks and gpus > 1:
        notes.append("training.swap_blocks: blocks wait in host memory in one process alone; leave it out")
    own = training.model_copy(update={"batch_size": each * training.gradient_accumulation_steps})
    one = config.model_copy(update={"training": own})
    found = dry_run(one, examine, CARDS[card])
    zero = (deepspeed or {}).get("zero_optimization", {})
    bucket = int(float(zero.get("reduce_bucket_size", BUCKET)))
    live = int(float(zero.get("stage3_max_live_parameters", LIVE)))
    planned = Plan(one, found, gpus, CARDS[card], bucket, live, notes=notes)
    if found.operations:
        weights = {name: c.weight for name, c in config.capabilities.items()}
        counts = found.operations()
        planned.operations = sum(counts[name] * w for name, w in weights.items()) / sum(weights.values())
    return planned


def _text(planned: Plan) -> Iterator[str]:
    found, card, gpus = planned.findings, planned.card, planned.gpus
    yield f"AN ESTIMATE, nothing of it measured: {gpus} x {card.name}"
    yield from (f"  {line}" for line in planned.notes)
    if "student, trainable" not in found.parameters:
        yield "no estimate without the network's configuration"
    else:
        yield ""
        yield from _memory_table(planned)
        yield ""
        yield from _time_lines(planned)
        yield ""
        yield from _choice(planned)
    if found.problems:
        yield "\nthis run cannot start here:"
        yield from (f"  {problem}" for problem in found.problems)


def _memory_table(planned: Plan) -> Iterator[str]:
    stages = STAGES if planned.gpus > 1 else (0,)
    columns = [planned.estimate(planned.own_setting(stage)) for stage in stages]
    names = list(dict.fromkeys(name for e in columns for name in e.device))
    each = planned.config.training.batch_size // planned.config.training.gradient_accumulation_steps
    yield _row(f"memory of one rank, {each} samples in a forward", [f"ZeRO {s}" for s in stages])
    for name in names:
        yield _row(f"  {name}", [format_bytes(e.device[name]) if name in e.device else "-" for e in columns])
    yield _row("  total", [format_bytes(e.bytes()) for e in columns])
    fits = ["fits" if e.bytes() + LEFT <= planned.card.memory else "too large" for e in columns]
    yield _row(f"  on {planned.card.memory / GIB:.0f} GiB, of which {LEFT / GIB:.0f} are left", fits)
    sharded = replace(planned.own_setting(3), sharded=True)
    if sharded in planned.settings():
        total = format_bytes(planned.estimate(sharded).bytes())
        yield _row("  total with the frozen networks sharded", [*[""] * (len(stages) - 1), total])
    if planned.gpus == 1 and (most := largest(planned.config, planned.findings, planned.card.memory)):
        yield f"  {most.text()}"
    if planned.findings.precision:
        yield f"  {planned.findings.precision}"
    if planned.findings.swap:
        yield f"  {planned.findings.swap.line()}"
    if not planned.findings.activations:
        yield "  at least: without activations, which need prepared rows and the transformer"


def _row(name: str, cells: list[str]) -> str:
    return f"{name:46}" + "".join(f"{cell:>12}" for cell in cells)


def _time_lines(planned: Plan) -> Iterator[str]:
    card = planned.card
    if not planned.operations or not planned.findings.evaluations:
        missing = (
            "the network and its rows"
            if planned.findings.evaluations
            else "this method, whose evaluations are not worked out"
        )
        yield f"no time without {missing}"
        return
    rows, each = planned.config.training.batch_size, planned.operations
    forwards = planned.forwards(planned.config.training.gradient_checkpointing)
    peak = f"{UTILISATION:.0%} of {card.operations / 1e12:.0f} dense bf16 TFLOPS"
    own = many(rows, "sample")
    yield f"one update: {forwards:.1f} network evaluations of a rank for its {own}, {_operations(each)} each:"
    yield f"  {_operations(forwards * each)}, at {peak}"
    inside = "NVLink" if card.nvlink > card.host else "PCIe"
    yield (
        f"  links in one direction: {inside} {card.nvlink / 1e9:.0f} GB/s a card in a machine of {NODE}, "
        f"{card.network / 1e9:.0f} GB/s a card between, {card.host / 1e9:.0f} GB/s to host memory; nothing overlaps"
    )


def _operations(count: float) -> str:
    unit, size = next(((u, s) for u, s in (("TFLOP", 1e12), ("GFLOP", 1e9)) if count >= s), ("MFLOP", 1e6))
    return f"{count / size:,.3g} {unit}"


def _choice(planned: Plan) -> Iterator[str]:
    fitting = planned.fitting()
    if not fitting:
        least = min(map(planned.estimate, planned.settings()), key=Estimate.bytes)
        yield f"nothing fits; the least is {format_bytes(least.bytes())} with {least.setting.text()}"
        yield "  a smaller training.batch_size, more gradient_accumulation_steps, student.lora or more cards take less"
        return
    cheapest = fitting[0]
    host = format_bytes(sum(cheapest.host.values()))
    yield f"cheapest setting that fits: {cheapest.setting.text()}"
    yield f"  {format_bytes(cheapest.bytes())} of the card, {host} of host memory a rank"
    if cheapest.seconds:
        steps = planned.config.training.max_steps
        parts = ", ".join(f"{name} {format_seconds(value)}" for name, value in cheapest.seconds.items())
        updates = f"{many(steps, 'update')}: {format_seconds(steps * cheapest.time())}"
        yield f"  {format_seconds(cheapest.time())} an update ({parts}); {updates}"
    seen = {cheapest.setting.stage}
    for other in fitting[1:]:
        if other.setting.stage not in seen:
            seen.add(other.setting.stage)
            time = f", {format_seconds(other.time())} an update" if other.seconds else ""
            yield f"  also: {other.setting.text()}: {format_bytes(other.bytes())}{time}"
