"""The merge benchmark: LoRAs of the miniature's looks as one, against every merge that needs no training.

Every row is measured on the same prompts and noise. By hand, that is with the LoRA of each prompt loaded for it (both
for two triggers), is what the others are compared with.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean

import torch

from danceopd.config.reading import parse_config
from danceopd.core.fields import Field
from danceopd.miniature.evaluate import Canvas, field_of, look_marks
from danceopd.miniature.looks import IMAGE_SIZE, LOOKS
from danceopd.miniature.pipeline import TEXT_LENGTH
from danceopd.miniature.prompts import PLAIN_TASKS, draw_tasks, sample_prompts
from danceopd.miniature.shipped import PIPELINE
from danceopd.models.backbones import flux2, pipeline_class_of
from danceopd.models.lora_algebra import Lora, sum_loras
from danceopd.models.lora_files import load_lora
from danceopd.models.lora_merges import COMBINATIONS, WEIGHTS, combined
from danceopd.reproduce.matrix import DRAWN_STEPS, MERGE_DRAWN, UNTRAINED, Run, override_lines
from danceopd.reproduce.measure import VALIDATION_SEED
from danceopd.reproduce.miniature import draw_rows, lora_of, with_lora
from danceopd.reproduce.results import once
from danceopd.support.files import write_atomic
from danceopd.support.run_log import read_log
from danceopd.tools.merge_loras import Options, merge_loras
from danceopd.tools.merge_loras.configuration import configuration, manifest_of
from danceopd.tools.merge_loras.given import read
from danceopd.tools.merge_loras.merge import encode
from danceopd.tools.merge_loras.prompts import routes_of
from danceopd.training.assembly.build import build_model
from danceopd.training.loop import train

SEED = 4100  # of the first seed's evaluation prompts and noise

PICTURES = {0: 160, 1: 480, 2: 240}  # of prompts as they are, of all LoRAs together, and of all pairs

FEW = {0: 32, 1: 96, 2: 48}  # where a merge's weight is chosen

PROMPTS = 2000  # that are trained on; some are alike

BY_HAND = "by_hand"

Measured = dict[str, float]  # the share of right things (look_marks) by the looks that call, as "night + wood"


def look_sets(count: int) -> list[tuple[str, ...]]:
    """Returns what is measured of the first `count` looks: none, each, and each pair that doesn't contradict itself."""
    looks = list(LOOKS)[:count]
    return [(), *((look,) for look in looks), *(pair for pair in combinations(looks, 2) if _apart(*pair))]


def _apart(one: str, other: str) -> bool:
    """Tells whether two looks set different columns of a scene."""
    return LOOKS[one][0] != LOOKS[other][0]


def loras(work: Path, count: int) -> dict[str, Path]:
    """Returns the files of the first `count` looks' LoRAs; those that don't ship are trained, once.

    Args:
        work: The folder of the runs.
        count: Their number.
    """
    return {look: lora_of(work / "merge" / "looks", look) for look in list(LOOKS)[:count]}


def measure(
    canvas: Canvas,
    field: Callable[[tuple[str, ...]], Field],
    count: int,
    seed: int,
    pictures: dict[int, int] = PICTURES,
) -> Measured:
    """Measures what draws, with noise that no training saw; most of the prompts stand in the training's too.

    Args:
        canvas: The miniature's.
        field: Returns the field that is asked where looks call.
        count: The number of LoRAs.
        seed: Of prompts and noise.
        pictures: Of all prompts that no look, one and two looks call.

    Returns:
        The share of right things, as `look_marks` reads them, for each of look_sets.
    """
    sets, shares = look_sets(count), {}
    sizes = Counter(map(len, sets))
    for i, looks in enumerate(sets):
        marks = look_marks(canvas.drawer(field(looks)), looks, seed + i, pictures[len(looks)] // sizes[len(looks)])
        shares[" + ".join(looks)] = float(marks.mean())
    return shares


def kept(own: Measured, by_hand: Measured) -> dict[str, float]:
    """Returns what a merge keeps of the LoRAs, of the base and of pairs: its share of right things over that by hand.

    Means over LoRAs, and over pairs, are divided, so that one that draws hardly anything right by hand hardly counts.

    Returns:
        {"kept": of all LoRAs' pictures, "base_kept", "pairs": of all pairs'}.
    """
    single = [look for look in own if look and " + " not in look]
    pairs = [look for look in own if " + " in look]

    def share(looks: Sequence[str]) -> float:
        return fmean(own[look] for look in looks) / fmean(by_hand[look] for look in looks)

    return {"kept": share(single), "base_kept": share([""]), "pairs": share(pairs)}


class Bench:
    """What is measured of a number of LoRAs, each once: files in a folder hold what is known.

    Args:
        work: The folder of the runs.
        count: The number of LoRAs.
    """

    def __init__(self, work: Path, count: int) -> None:
        self.count, self.paths, self.canvas = count, loras(work, count), Canvas(PIPELINE)
        self.folder = work / "merge" / f"measured_{count}"
        self.folder.mkdir(parents=True, exist_ok=True)
        transformer = flux2.load_transformer(PIPELINE)
        self.read = {
            name: load_lora(path, transformer, pipeline_class_of(PIPELINE)) for name, path in self.paths.items()
        }
        self.rank = max(len(a) for lora in self.read.values() for a, _, _ in lora.values())

    def field(self, lora: Lora) -> Field:
        """Returns the base with a LoRA merged into it."""
        return with_lora(flux2.load_transformer(PIPELINE), lora)

    def by_hand(self, looks: Sequence[str]) -> Field:
        """Returns the base with the LoRAs of looks, each in full."""
        return self.field(sum_loras([self.read[look] for look in looks]))

    def measured(self, name: str, seed: int, field: Callable[[tuple[str, ...]], Field]) -> Measured:
        """Measures a row by the prompts of one seed."""
        path = self.folder / f"{name}-{seed}.json"
        return once(path, lambda: measure(self.canvas, field, self.count, SEED + 1000 * seed))

    def merge(self, combination: str, weight: float) -> Field:
        """Returns the base with one of PEFT's combinations of all LoRAs."""
        return self.field(combined(list(self.read.values()), combination, [weight] * self.count))

    def best_weight(self, combination: str) -> float:
        """Chooses a combination's weight on validation prompts: the best mean of kept's three shares."""

        def merit(field: Callable) -> dict[str, float]:
            return measure(self.canvas, field, self.count, VALIDATION_SEED, FEW)

        by_hand = once(self.folder / "validation-by_hand.json", lambda: merit(self.by_hand))
        found = {}
        for weight in WEIGHTS:
            own = self.merge(combination, weight)
            path = self.folder / f"validation-{combination}-{weight:g}.json"
            score = once(path, lambda own=own: merit(lambda _: own))
            found[weight] = fmean(kept(score, by_hand).values())
        return max(found, key=found.get)


def make(run: Run, folder: Path, work: Path) -> dict:
    """Makes one run of the benchmark.

    Args:
        run: Its overrides name the number of "loras", the "method", and the evaluations.
        folder: The run's.
        work: The folder of all runs.

    Returns:
        Of a training its metrics, "shares", and what it took; else {"methods": {row: its metrics}}.
    """
    bench = Bench(work, run.overrides["loras"])
    return (
        {"methods": _untrained(bench, run.seed)}
        if run.overrides["method"] == UNTRAINED
        else _trained(run, folder, bench)
    )


def _untrained(bench: Bench, seed: int) -> dict[str, dict]:
    """Measures all rows that need no training: {method: kept's metrics, "shares", "rank", and "chosen", the weight}."""
    by_hand = bench.measured(BY_HAND, seed, bench.by_hand)
    fields: dict[str, tuple[Callable[[], Field], float | None]] = {
        "base": (partial(bench.field, {}), None),
        "sum": (partial(bench.merge, "cat", 1.0), None),
        "sum_cut": (partial(bench.merge, "svd", 1.0), None),
    }
    for combination in COMBINATIONS:
        weight = bench.best_weight(combination)
        fields[f"merge_{combination}"] = partial(bench.merge, combination, weight), weight
    rows = {BY_HAND: {**kept(by_hand, by_hand), "shares": by_hand, "rank": bench.rank}}
    for name, (make, weight) in fields.items():
        field = make()
        own = bench.measured(name, seed, lambda _, field=field: field)
        rank = 0 if name == "base" else bench.rank * (bench.count if name in ("sum", "merge_cat") else 1)
        rows[name] = {**kept(own, by_hand), "shares": own, "rank": rank} | (
            {} if weight is None else {"chosen": weight}
        )
    return rows


def _trained(run: Run, folder: Path, bench: Bench) -> dict:
    """Trains one LoRA out of several, and measures it."""
    own = {"training.optimizer": "muon", "training.lr_schedule": "cosine"}
    own |= {key: value for key, value in run.overrides.items() if key.startswith(("training.", "rollout."))}
    ours = run.overrides["method"] == "danceopd"
    if not ours:
        own["method"] = "joint"
    options = Options(
        prompts=_write_prompts(folder / "prompts.txt"),
        steps=100_000,  # the evaluations end it
        patience=0,
        resolution=IMAGE_SIZE,
        max_sequence_length=TEXT_LENGTH,
        work=folder / "work",
        overrides=override_lines(own),
    )
    paths, output = list(bench.paths.values()), folder / "merged.safetensors"
    if ours:
        merge_loras(PIPELINE, paths, output, options)
        trained_in = folder / "work" / f"rank-{bench.rank}"
    else:
        trained_in = _joint(paths, output, options, folder, bench)
    log = read_log(trained_in / "log.jsonl").training[-1]
    field = field_of(PIPELINE, trained_in / "student")
    by_hand = bench.measured(BY_HAND, run.seed, bench.by_hand)
    shares = measure(bench.canvas, lambda _: field, bench.count, SEED + 1000 * run.seed)
    took = {key: log[key] for key in ("network_evaluations", "seconds")} | {"updates": log["step"]}
    if not ours:
        took["network_evaluations"] += MERGE_DRAWN * DRAWN_STEPS  # its pictures are drawn before it trains
    return {**kept(shares, by_hand), "shares": shares, "rank": bench.rank, **took}


def _write_prompts(path: Path) -> Path:
    """Writes prompts of the miniature's world, a line each."""
    generator = torch.Generator().manual_seed(SEED - 1)
    prompts, _ = sample_prompts(draw_tasks(PROMPTS, generator, PLAIN_TASKS), generator)
    write_atomic(path, "".join(f"{prompt.text}\n" for prompt in prompts).encode())
    return path


def _joint(paths: list[Path], output: Path, options: Options, folder: Path, bench: Bench) -> Path:
    """Trains on pictures that each LoRA draws, by flow matching: as many of each route as DanceOPD asks of it."""
    given = read(PIPELINE, paths, output, options)
    routes = routes_of(given.triggers, given.prompts, options.pairs)
    manifest, rows = manifest_of(routes)
    raw = configuration(given, options, routes, folder / "work", manifest)
    config = parse_config(raw, list(options.overrides), "this merge")
    encode(config, given, options, routes, folder / "work", (manifest, rows))
    drawn, made = folder / "work" / "cache" / "drawn.jsonl", folder / "work" / "cache" / manifest
    total = sum(route.weight for route in routes)
    if not drawn.exists():
        pictures = {route.name: max(1, round(MERGE_DRAWN * route.weight / total)) for route in routes}
        fields = {route.name: partial(bench.by_hand, route.loras) for route in routes}
        draw_rows(made, drawn, PIPELINE, fields, pictures)
    for capability in raw["capabilities"].values():
        capability["data"]["prepared"] = str(drawn)
    config = parse_config(raw, list(options.overrides), "this merge")
    return train(config, build_model, False)
