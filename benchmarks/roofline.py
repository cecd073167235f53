"""The least possible time of a rollout step and of a teacher's query on NVIDIA's cards: computed, not measured.

    python benchmarks/roofline.py                                        # every configuration of configs/models
    python benchmarks/roofline.py --configs flux.1-dev-c z-image-d --batch 1 8 --json limits.json --plot limits.png

Networks are built on the meta device at their released sizes, and torch's counter gives the operations of a forward.
The least time is the larger of two: operations over the card's published peak (FP8's for the products that FP8 weights
multiply in FP8), and bytes over its published bandwidth (each weight once, each input and output once). Which of the
two binds stands beside it. Nothing is added for what lies between products, so that no run can reach it.

What rollout_bench.py and query_bench.py measured of a released network on one of the cards, as JSON in
benchmarks/results/, is compared with the limit of that network: its share is a column of its own, empty where nothing
was measured. A network that is none of a configuration's has a line of its own.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import common, networks
from danceopd.config.reading import load_config
from danceopd.core.conditioning import Conditioning
from danceopd.models.backbones import FAMILIES
from danceopd.models.blocks import block_layers
from danceopd.models.shared_base import SharedBase, target_layers
from danceopd.models.students import LoraStudent
from danceopd.planning.backward import operations
from danceopd.planning.memory import FLOAT
from danceopd.support.cards import CARDS, Card, card_of
from danceopd.support.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIGS, RESULTS = ROOT / "configs" / "models", ROOT / "benchmarks" / "results"
LABEL = "computed, not measured"
RANK = 128  # of a source's adapter, whose file is not there
HALF = 2  # bytes of bf16
# Pixels a latent's side stands for, and what the transformer's in_channels are divided by to give a latent's channels.
LATENTS = {"sd3": (8, 1), "flux": (8, 4), "flux2": (16, 1), "qwen_image": (8, 4), "z_image": (8, 1)}
LATENTS |= {"longcat_image": (8, 4), "qwen_image_21": (16, 1), "krea2": (8, 4), "prx": (8, 1), "flux3": (16, 1)}
MEASURED = {"rollout": "rollout step", "query": "query"}  # benchmark: kind
SHOWN = ("h100", "h200", "b200", "a100", "l40s", "rtx-4090", "rtx-5090")  # the columns, if no cards are named
NAMES = {"sd35-medium": "sd3.5-medium"}  # of benchmarks.networks: the released network of that size

# ------------------------------------------------------------------------------------------------------ the limit


@dataclass(frozen=True)
class Work:
    """Of a network. Operations of one sample's forward: narrow, of the products that are in FP8 where the weights are,
    and wide, of all others. Bytes of weights in bf16 and in 8 bits, and of one sample's inputs and outputs."""

    narrow: int
    wide: int
    half: int
    eight: int
    sample: int


@dataclass(frozen=True)
class Limit:
    seconds: float
    binds: str  # "compute" or "memory"
    flops: int
    bytes: int
    fits: bool  # whether the card holds the weights at all


def least(work: Work, card: Card, batch: int, guidance: bool, precision: str) -> Limit:
    """The least time of one evaluation of a batch; with guidance it holds each sample twice.

    precision: bf16; int8, weights alone; or fp8, which a card without FP8 products has for its weights alone too.
    """
    rows = batch * (1 + guidance)
    narrow_peak = card.fp8 if precision == "fp8" and card.fp8 else card.operations
    weights = work.half if precision == "bf16" else work.eight
    moved = weights + rows * work.sample
    compute = rows * (work.narrow / narrow_peak + work.wide / card.operations)
    memory = moved / card.bandwidth
    binds = "compute" if compute >= memory else "memory"
    flops = rows * (work.narrow + work.wide)
    return Limit(max(compute, memory), binds, flops, moved, weights <= card.memory)


def work_of(ask, transformer: torch.nn.Module, shape: Sequence[int], conditioning: Conditioning, extra: int = 0):
    """The Work of a network on the meta device in bf16.

    ask: the network as a field; transformer: whose blocks' linear layers FP8 would store; shape, conditioning: of one
    sample; extra: bytes of weights beside the transformer's own.
    """
    layers, narrow = list(block_layers(transformer)), {}
    for name, layer, modulates in layers:
        if not modulates:  # once a forward; a forward that is tried again counts once
            layer.register_forward_hook(
                lambda layer, inputs, _, name=name: narrow.__setitem__(name, 2 * inputs[0].numel() * layer.out_features)
            )
    total, inside = operations(ask, tuple(shape), conditioning), sum(narrow.values())
    half = extra + sum(p.nbytes for p in transformer.parameters())
    saved = sum(layer.weight.nbytes - layer.weight.numel() - FLOAT * layer.out_features for _, layer, _ in layers)
    read = [conditioning.prompt, () if conditioning.source is None else conditioning.source]
    inputs = sum(t.nbytes for t in tree_leaves(read) if isinstance(t, torch.Tensor))
    return Work(inside, total - inside, half, half - saved, inputs + 2 * FLOAT * math.prod(shape))


@cache
def released(model: str, rank: int | None, edits: bool, resolution: int) -> Work:
    """The Work of a released transformer with an adapter in bf16, or without where rank is None.

    edits: with one source picture of the same size.
    """
    import diffusers

    sizes = networks.released()
    family, config, _ = sizes.MODELS[model]
    with torch.device("meta"):
        transformer = getattr(diffusers, sizes.CLASSES[family])(**config).eval()
    torch.nn.Module.to(transformer, torch.bfloat16)
    name, backbone = next((n, m) for n, m in _backbones().items() if hasattr(m, sizes.CLASSES[family]))
    pixels, divisor = LATENTS[name]
    if resolution % (2 * pixels):
        raise UserError(f"--resolution: {resolution} pixels are no multiple of {2 * pixels}, which {model} needs")
    side = resolution // pixels
    shape = (transformer.config.in_channels // divisor, side, side)
    seen = side**2 // 4 if edits and family == "qwen_21" else 0  # places of the source picture in the prompt
    length = sizes.PROMPT.get(family, 512) + seen
    prompt = tree_map(lambda x: x[None], sizes.prompt_of(family, transformer, length, slots=seen))
    prompt = {key: x.bfloat16() if x.is_floating_point() else x for key, x in prompt.items()}
    source = torch.zeros(1, *shape, dtype=torch.bfloat16) if edits else None

    def velocity(transformer, latents, sigma, prompt, sources=(), *_, **__):
        return backbone.velocity(transformer, latents, sigma, prompt, sources, 1.0)

    conditioning = Conditioning(prompt, source, torch.tensor([edits]))
    if rank is None:
        return work_of(SharedBase(transformer, [], velocity).field(-1), transformer, shape, conditioning)
    layers = target_layers(transformer, backbone.LORA_TARGETS, every=False)
    with torch.device("meta"):
        student = LoraStudent(SharedBase(transformer, [], velocity, layers), layers, rank, rank)
    extra = HALF * sum(p.numel() for p in student.parameters())
    return work_of(student, transformer, shape, conditioning, extra)


@cache
def _backbones() -> dict:
    return {family: import_module(f"danceopd.models.backbones.{family}") for family in FAMILIES}


# ------------------------------------------------------------------------------------------------ configurations


def model_of(config: Path) -> str:
    """The released transformer that a file of configs/models is for, by its name."""
    models = networks.released().MODELS
    found = [model for model in models if config.stem.startswith(f"{model}-")]
    if not found:
        raise UserError(f"{config}: its name begins with no model whose size is known: {', '.join(models)}")
    return max(found, key=len)


def limits(
    paths: Iterable[Path], cards: Sequence[str], batches: Sequence[int] = (1,), resolution: int = 1024
) -> list[dict]:
    """A row for each configuration, kind, batch, guidance and precision (its own and FP8), with each card's limit."""
    rows = []
    for path in paths:
        config, model = load_config(path), model_of(path)
        lora, adapted = config.student.lora, any(source.lora for source in config.sources.values())
        rank = lora.rank if lora else None
        ranks = {"rollout step": rank, "query": (rank or RANK) if adapted else None}
        edits = any(capability.task == "edit" for capability in config.capabilities.values())
        precisions = dict.fromkeys([config.training.base_precision or "bf16", "fp8"])
        for kind, batch, guidance, precision in product(ranks, batches, (False, True), precisions):
            settings = {
                "kind": kind, "model": model, "rank": ranks[kind], "edits": edits, "batch": batch,
                "resolution": resolution, "guidance": guidance, "precision": precision,
            }  # fmt: skip
            rows.append(row_of(path.stem, settings, cards))
    return rows


def row_of(name: str, settings: dict, cards: Sequence[str]) -> dict:
    """A row without anything measured."""
    s = settings
    work = released(s["model"], s["rank"], s["edits"], s["resolution"])
    found = {card: least(work, CARDS[card], s["batch"], s["guidance"], s["precision"]) for card in cards}
    return {"name": name, "settings": settings, "limits": found, "measured": {}}


# --------------------------------------------------------------------------------------------- what was measured


@dataclass(frozen=True)
class Measured:
    """seconds: of one evaluation of the batch; settings: as a row's."""

    file: str
    device: str
    variant: str
    settings: dict
    seconds: float


def read_measured(folder: Path) -> list[Measured]:
    """What rollout_bench.py and query_bench.py wrote of released networks into a folder; the rest is passed by.

    Raises UserError for a file that no benchmark wrote.
    """
    found, models = [], networks.released().MODELS
    for file in sorted(folder.glob("*.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            benchmark, _, model = result["benchmark"].partition(", ")
            kind, model = MEASURED.get(benchmark), NAMES.get(model, model)
            if kind and model in models and result["measured"]:
                device = result["device"]["name"]
                found += [_measured(file.name, kind, model, device, row) for row in result["rows"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"{file} is not what a benchmark writes with --json: {what}; write it again, or move it elsewhere"
            ) from None
    return found


def _measured(file: str, kind: str, model: str, device: str, row: dict) -> Measured:
    low, middle, high = row["milliseconds"]
    if not 0 < low <= middle <= high:
        raise ValueError(f"milliseconds {row['milliseconds']} are no quartiles of a time")
    given, words = row["settings"], row["name"].split("+")
    guidance = given.get("guidance", 1) != 1
    # Of a rollout, evaluations are of one branch; samples leave, so that the batch is evaluated so many times in all.
    count = row["evaluations_per_sample"] / (1 + guidance) if kind == "rollout step" else 1
    settings = {
        "kind": kind, "model": model, "rank": given.get("rank"), "edits": False, "batch": given["batch"],
        "resolution": given["resolution"], "guidance": guidance, "precision": "fp8" if "fp8" in words else "bf16",
    }  # fmt: skip
    return Measured(file, device, row["name"], settings, middle / 1e3 / count)


def compare(rows: list[dict], measured: Sequence[Measured], cards: Sequence[str]) -> list[str]:
    """Put the best share of the limit that was measured into the rows, and rows behind them for networks that are none
    of theirs; returns what could not be compared, and why."""
    said = []
    for one in measured:
        card = card_of(one.device)
        if card not in cards:
            said.append(f"{one.file}: measured on {one.device}, which is none of {', '.join(cards)}")
            continue
        places = [row for row in rows if row["settings"] == one.settings]
        if not places:
            rows.append(row_of(f"{one.settings['model']}, measured", one.settings, cards))
            places = rows[-1:]
        for row in places:
            share = row["limits"][card].seconds / one.seconds
            if share > row["measured"].get(card, {"share_of_limit": 0})["share_of_limit"]:
                row["measured"][card] = {
                    "milliseconds": 1e3 * one.seconds, "share_of_limit": share, "variant": one.variant,
                    "file": one.file,
                }  # fmt: skip
    return list(dict.fromkeys(said))


# ------------------------------------------------------------------------------------------------------- output


def table(rows: list[dict], cards: Sequence[str]) -> str:
    """Milliseconds for each card, what binds, and the measured share of the limit."""
    name = max(len(row["name"]) for row in rows) + 2
    head = f"{'':{name}}{'':14}{'batch':>5}{'px':>6}  {'guidance':9}{'precision':10}"
    lines = [f"LEAST MILLISECONDS, {LABEL.upper()}; C: compute binds, M: memory; -: its weights alone do not fit"]
    lines.append(head + "".join(f"{card:>13}{'measured':>10}" for card in cards))
    for row in rows:
        s = row["settings"]
        line = f"{row['name']:{name}}{s['kind']:14}{s['batch']:>5}{s['resolution']:>6}  "
        line += f"{'on' if s['guidance'] else 'off':9}{s['precision']:10}"
        for card in cards:
            limit, measured = row["limits"][card], row["measured"].get(card)
            line += f"{f'{limit.seconds * 1e3:.4g} {limit.binds[0].upper()}' if limit.fits else '-':>13}"
            line += f"{measured['share_of_limit']:>10.0%}" if measured else " " * 10
        lines.append(line.rstrip())
    return "\n".join(lines)


def as_json(rows: list[dict], cards: Sequence[str]) -> dict:
    def plain(row):
        return row | {"limits": {card: vars(limit) for card, limit in row["limits"].items()}}

    return {
        "benchmark": "roofline", "measured": False, "label": LABEL, "cards": {c: vars(CARDS[c]) for c in cards},
        "rows": [plain(row) for row in rows],
    }  # fmt: skip


def plot(rows: list[dict], cards: Sequence[str], file: Path) -> None:
    """A bar for each card of every configuration's rollout step at the first batch, without guidance, in bf16."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = rows[0]["settings"]["batch"]
    shown = [
        row for row in rows
        if (s := row["settings"])["kind"] == "rollout step" and s["batch"] == first and not s["guidance"]
        and s["precision"] != "fp8" and s["resolution"] == rows[0]["settings"]["resolution"]
    ]  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.14 * len(shown) * len(cards)))
    height = 0.8 / len(cards)
    for i, card in enumerate(cards):
        places = [j + i * height for j in range(len(shown))]
        axes.barh(places, [row["limits"][card].seconds * 1e3 for row in shown], height, label=CARDS[card].name)
        there = [(y, row["measured"][card]) for y, row in zip(places, shown, strict=True) if card in row["measured"]]
        axes.plot([m["milliseconds"] for _, m in there], [y for y, _ in there], "k|", markersize=8)
    axes.set_yticks([j + 0.4 - height / 2 for j in range(len(shown))], [row["name"] for row in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"least milliseconds of a rollout step, {LABEL}; a black mark: measured")
    axes.set_title(f"Roofline, {LABEL}: batch {first}, {rows[0]['settings']['resolution']} px", fontsize=9)
    axes.legend(fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def config_paths(names: Sequence[str]) -> list[Path]:
    """Files of configs/models by name, or others by path; all of configs/models if none is named."""
    if not names:
        every, sizes = sorted(CONFIGS.glob("*.yaml")), networks.released().MODELS
        return [path for path in every if sizes[model_of(path)][1] is not None]
    return [Path(name) if name.endswith(".yaml") else CONFIGS / f"{name}.yaml" for name in names]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(SHOWN), help="(%(default)s)")
    parser.add_argument("--configs", nargs="+", default=[], help="names in configs/models, or files; all if not given")
    parser.add_argument(
        "--batch", type=common.positive, nargs="+", default=[1], help="samples of one evaluation (%(default)s)"
    )
    parser.add_argument("--resolution", type=common.positive, default=1024, help="pixels of a side (%(default)s)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of measured JSON files (benchmarks/results)"
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--plot", type=Path, help="file to draw them in")
    args = parser.parse_args(argv)
    try:
        rows = limits(config_paths(args.configs), args.cards, args.batch, args.resolution)
        measured = read_measured(args.results)
        said = compare(rows, measured, args.cards)
    except UserError as error:
        parser.error(str(error))
    if not measured:
        said.append(f"{args.results}: no figures of a released network there, so that nothing is compared")
    print("\n".join([table(rows, args.cards), *said]))
    result = as_json(rows, args.cards)
    common.write(result, args.json)
    if args.plot:
        plot(rows, args.cards, args.plot)
    return result


if __name__ == "__main__":
    main()
