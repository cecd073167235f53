"""Our updates beside the published step times of other trainers, by count, and the host's time: docs/benchmarks.md.

    python -m benchmarks.against            # prints the table
    python -m benchmarks.against --write    # puts it, and that of the host's time, into docs/benchmarks.md

For the same work as another trainer's it says the least possible time, the operations over the cards' published peak;
the time that is predicted; where a file benchmarks/results/against-*.json has it, the time that was measured on such a
card, or another of the same published peak; and, of a LoRA's step, the memory that `danceopd plan` estimates.
`python -m benchmarks.card` writes such a file, against-card.json, of the LoRA's step at SD3.5-medium's size.
Operations are of the released transformer, counted on the meta device (benchmarks/roofline.py): forwards, and for each
with gradient a backward to its inputs, which is as much again, since weights under an adapter have no gradient.
The prediction takes the share of the peak that `danceopd plan` takes, and adds the host's time, for nothing is taken to
overlap: of each forward without gradient what benchmarks/host_bench.py measured of a static query, and of each with
gradient what it measured of a static match (benchmarks/results/host-cpu.json), on a slower processor than such cards'.
"""

import argparse
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import host_bench, networks, roofline
from danceopd.config.reading import load_config
from danceopd.core.query import expected_depth
from danceopd.planning.cluster import UTILISATION
from danceopd.planning.dry_run import dry_run
from danceopd.planning.models import examine
from danceopd.support.cards import CARDS, card_of
from danceopd.support.memory import GIB

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(?<=<!-- against -->\n).*(?=<!-- end of against -->)", re.DOTALL)
HOST_TABLE = re.compile(r"(?<=<!-- host -->\n).*(?=<!-- end of host -->)", re.DOTALL)
HOST = RESULTS / "host-cpu.json"
CARD, RANK = "h100", 64  # of the adapter, whose own operations are few
SAMPLES_A_FORWARD = 16  # of one card at 384 pixels, in a rollout or a query


@dataclass(frozen=True)
class Work:
    """What a step computes.

    Attributes:
        name: In words.
        model: The released transformer.
        resolution: Pixels of a side.
        samples: Of a step, over all cards.
        cards: Their number.
        without, with_gradient: Forwards of a sample without and with gradient, all branches of guidance counted.
        again: Whether blocks are computed again for the backward.
        published: What the other trainer's step took, in words.
        memory: The memory that it took, in words.
    """

    name: str
    model: str
    resolution: int
    samples: int
    cards: int
    without: float
    with_gradient: float
    again: bool = False
    published: str = ""
    memory: str = ""

    def evaluations(self) -> float:
        """Returns forwards of a sample; its backward counts as one more, and so does what is computed again."""
        return self.without + self.with_gradient * (2 + self.again)


STEPS = 10  # of verl-omni's rollouts


def works() -> list[Work]:
    """Lists what is compared."""
    depth = expected_depth(STEPS, bias="low_t", k=1)
    size = ("sd3.5-medium", 384, 64, 4)
    found = []
    for guidance, published in ((1, "24.3 s"), (2, "36.2 s")):
        said = ", guidance 4.5" if guidance == 2 else ""
        every = f"on-policy distillation, every step asked{said}"
        found.append(Work(every, *size, 2 * STEPS * guidance, STEPS * guidance, published=f"{published} (verl-omni)"))
        once = f"ours: one state asked, low-t{said}"
        found.append(Work(once, *size, (depth + 1) * guidance, guidance, published="the same work's: none"))
    for model, title, again, published, memory in (
        ("sd3.5-medium", "SD3", False, "0.529 s", "34.6 GiB"),
        ("sd3.5-medium", "SD3", True, "0.721 s", "7.7 GiB"),
        ("z-image", "Z-Image", False, "0.243 s", ""),
        ("z-image", "Z-Image", True, "0.479 s", ""),
        ("qwen-image", "Qwen-Image", True, "1.202 s", "41 GiB"),
    ):
        name = f"a LoRA's step, {title}" + ", blocks computed again" * again
        found.append(Work(name, model, 1024, 1, 1, 0, 1, again, f"{published} (SimpleTuner)", memory))
    return found


def planned_bytes(work: Work) -> float:
    """Estimates what `danceopd plan` says of a card's memory for our update of the same samples.

    The run is the model's setting C, whose student is a LoRA beside a source that is one, and whose average counts too.

    Args:
        work: Of a model for whose setting C a configuration ships, at 1024 pixels.

    Returns:
        The bytes, without what is set aside for CUDA and its libraries.
    """
    making = networks.real_models()
    config = ROOT / "configs" / "models" / f"{work.model}-c.yaml"
    with tempfile.TemporaryDirectory() as folder:
        place = making.real_place(Path(folder) / "place", work.model)
        values = [f"training.batch_size={work.samples}", f"training.gradient_checkpointing={str(work.again).lower()}"]
        loaded = load_config(config, [*making.overrides(config, place), *values, f"student.lora.rank={RANK}"])
        return dry_run(loaded, examine).total_memory()


def host_seconds(file: Path = HOST) -> tuple[float, float] | None:
    """Reads the host's seconds of a static query and of a static match; None where nobody has measured them."""
    if not file.is_file():
        return None
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    taken = {row["name"]: row["milliseconds"][1] / 1e3 for row in rows}
    return taken["query, float32, static"], taken["match, float32, static"]


def row_of(
    work: Work, operations: float, host: tuple[float, float] | None, measured: dict[str, float], planned: float | None
) -> list[str]:
    """Makes a row of the table.

    Args:
        work: What is computed.
        operations: Of one sample's forward.
        host: As `host_seconds` reads it.
        measured: Seconds that were measured on such a card, by the name of the work.
        planned: Bytes as `planned_bytes` estimates them; None where nothing is to be said of memory.
    """
    total, peak = work.samples * work.evaluations() * operations, work.cards * CARDS[CARD].operations
    each = work.samples / work.cards
    query, match = host or (0.0, 0.0)
    on_host = each * work.without / min(each, SAMPLES_A_FORWARD) * query + each * work.with_gradient * match
    seen = f"{measured[work.name]:.3g} s" if work.name in measured else "–"
    predicted = total / (UTILISATION * peak) + on_host
    cards = f"{work.cards} x {work.samples // work.cards} at {work.resolution} px"
    numbers = [f"{work.evaluations():.3g}", f"{total / 1e12:.4g}", f"{total / peak:.3g} s", f"{predicted:.3g} s"]
    memory = [f"{planned / GIB:.1f} GiB" if planned else "–", work.memory or "–"]
    return [work.name, cards, *numbers, f"{on_host:.2g} s" if host else "not measured", seen, work.published, *memory]


HEAD = ["a step", "cards x samples", "evaluations a sample", "TFLOP", "**computed**: the least", "**predicted**"]
HEAD += ["of it the host", "**measured**", "published for it", "memory, **estimated** by the plan", "memory published"]


def read_measured(folder: Path = RESULTS) -> dict[str, float]:
    """Reads the seconds of works that were measured on a card of this peak, by their names, from files that say so."""
    found = {}
    for file in sorted(folder.glob("against-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        card = CARDS.get(card_of(result["device"]["name"]) or "")
        if card and card.operations == CARDS[CARD].operations:
            found |= {row["name"]: row["milliseconds"][1] / 1e3 for row in result["rows"]}
    return found


def table() -> str:
    """Writes the table."""
    host, measured = host_seconds(), read_measured()
    lines = [HEAD, ["---", "---", *["---:"] * 6, "---", "---:", "---:"]]
    for work in works():
        counted = roofline.released(work.model, RANK, False, work.resolution)
        planned = planned_bytes(work) if work.cards == 1 else None
        lines.append(row_of(work, counted.narrow + counted.wide, host, measured, planned))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def host_table(file: Path = HOST) -> str:
    """Writes the table of the host's time, as benchmarks/host_bench.py measured it."""
    result = json.loads(file.read_text(encoding="utf-8"))
    device, taken = result["device"], {row["name"]: row for row in result["rows"]}
    lines = [["", "base", "eager", "static", "eager / static (quartiles)"], ["---", "---", "---:", "---:", "---:"]]
    titles = {"query": f"a query of {host_bench.ROWS} samples", "match": "one sample's forward and backward"}
    for part, title in titles.items():
        for precision in ("float32", "fp8"):
            eager, static = (taken[f"{part}, {precision}, {how}"] for how in ("eager", "static"))
            times = [f"{row['milliseconds'][1]:.3g} ms" for row in (eager, static)]
            low, middle, high = static["ratio"]
            lines.append([title, precision, *times, f"{middle:.0f} ({low:.0f} to {high:.0f})"])
    rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{rows}\nProcessor time on one thread, {device['name']}, torch {device['torch']}.\n"


def page() -> str:
    """Returns the page with both tables as they are now."""
    page = TABLE.sub(lambda _: table(), PAGE.read_text(encoding="utf-8"))
    return HOST_TABLE.sub(lambda _: host_table(), page)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    args = parser.parse_args(argv)
    if args.write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
