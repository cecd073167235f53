"""Runs on the same prompts and seeds, compared picture by picture: paired differences, and a page to look at."""

import base64
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from danceopd.checkpoint import write_atomic
from danceopd.errors import UserError
from danceopd.evaluation.geneval import read_results, summary

RESAMPLES, LEVEL = 10_000, 0.95
FEW = 10  # prompts, of which resamples tell little
PROMPTS = 12  # shown of the worst, and of the best
SIDE, SMALL = 256, 128  # pixels: pictures in the page are no larger; smaller ones keep their pixels

Key = tuple[str, int]  # a prompt's metadata, and the number of its picture, which stands for the seed


@dataclass(frozen=True)
class Scored:
    """One picture of a run."""

    tag: str
    prompt: str
    score: float
    reason: str
    path: Path


@dataclass(frozen=True)
class Run:
    """A run's scored pictures by key. seed: of all its noise, None where what drew them does not say."""

    name: str
    pictures: dict[Key, Scored]
    records: list[dict]
    seed: int | None = None


def read_run(path: Path) -> Run:
    """A folder in GenEval's layout with its results.jsonl, or such a file itself, whatever evaluated it.

    Raises UserError where there is no such file, and where two of its lines are of the same picture.
    """
    file = path / "results.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{file} is not there; danceopd evaluate geneval {path} --detector ... writes it, of the picture world "
            f"danceopd evaluate CHECKPOINT --pictures {path}"
        )
    folder, pictures, records = file.parent, {}, read_results(file)
    for line in records:
        named = Path(line["filename"])
        if not named.stem.isdecimal():
            raise UserError(f"{file}: {named} has no number as its name; give GenEval's results")
        try:
            metadata = json.loads(line["metadata"])
        except ValueError:
            raise UserError(f"{file}: the 'metadata' of {named} is not JSON; give GenEval's results") from None
        key = (json.dumps(metadata, sort_keys=True), int(named.stem))
        if key in pictures:
            raise UserError(f"{file} has two lines for picture {named.stem} of the same prompt; remove one")
        here = folder.joinpath(*named.parts[-3:])
        pictures[key] = Scored(
            line["tag"],
            str(line.get("prompt", "")),
            float(line["correct"]),
            str(line.get("reason") or ""),
            here if here.is_file() else named,
        )
    return Run(_name(file), pictures, records, _seed(folder))


def _name(file: Path) -> str:
    file = file.resolve()
    return file.parent.name if file.name == "results.jsonl" else f"{file.parent.name}/{file.stem}"


def _seed(folder: Path) -> int | None:
    try:
        return json.loads((folder / "generation.json").read_text(encoding="utf-8"))["seed"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Interval:
    """A mean difference and the ends of its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Of a run to the first: differences (run - first) by tag and overall, and the prompts from worst to best.

    prompts: (difference, the keys of its pairs); pairs: how many pictures were paired; unpaired: and how many, of
    both runs, were not; fewest: prompts of a tag.
    """

    overall: Interval
    tags: dict[str, Interval]
    prompts: list[tuple[float, list[Key]]]
    pairs: int
    unpaired: int
    fewest: int


def compare(first: Run, other: Run, seed: int = 0) -> Comparison:
    """Pictures of the same prompt and number, one from each run.

    Overall is the mean of the tags' mean differences. The intervals are percentiles of bootstrap resamples of whole
    prompts within each tag, since the pictures of a prompt are alike. Raises UserError where nothing can be paired.
    """
    keys = [key for key in first.pictures if key in other.pictures]
    if not keys:
        raise UserError(f"{first.name} and {other.name} have no picture of the same prompt and number")
    prompts: dict[str, list[Key]] = {}
    for key in keys:
        prompts.setdefault(key[0], []).append(key)
    by_tag: dict[str, list[np.ndarray]] = {}
    ranked = []
    for pairs in prompts.values():
        pairs.sort(key=lambda key: key[1])
        differences = np.array([other.pictures[key].score - first.pictures[key].score for key in pairs])
        by_tag.setdefault(first.pictures[pairs[0]].tag, []).append(differences)
        ranked.append((float(differences.mean()), pairs))
    generator = np.random.default_rng(seed)
    means, resampled = {}, {}
    for tag, differences in by_tag.items():
        sums, counts = np.array([d.sum() for d in differences]), np.array([len(d) for d in differences])
        means[tag] = sums.sum() / counts.sum()
        drawn = generator.integers(len(sums), size=(RESAMPLES, len(sums)))
        resampled[tag] = sums[drawn].sum(1) / counts[drawn].sum(1)
    return Comparison(
        _interval(np.mean(list(means.values())), np.mean(list(resampled.values()), axis=0)),
        {tag: _interval(means[tag], resampled[tag]) for tag in means},
        sorted(ranked, key=lambda item: item[0]),
        len(keys),
        len(first.pictures) + len(other.pictures) - 2 * len(keys),
        min(map(len, by_tag.values())),
    )


def _interval(mean: float, resampled: np.ndarray) -> Interval:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(mean), float(low), float(high))


def warnings_of(runs: list[Run], comparisons: list[Comparison]) -> list[str]:
    """What a reader of the comparison must know."""
    said = []
    seeds = {run.name: run.seed for run in runs if run.seed is not None}
    if len(set(seeds.values())) > 1:
        drawn = ", ".join(f"{name} {seed}" for name, seed in seeds.items())
        said.append(f"drawn from different seeds ({drawn}): pictures of the same number do not share their noise")
    for run, comparison in zip(runs[1:], comparisons, strict=True):
        if comparison.unpaired:
            said.append(
                f"{run.name} and {runs[0].name}: {comparison.unpaired} pictures have no partner and are left out"
            )
        if comparison.fewest < FEW:
            said.append(f"a tag has {comparison.fewest} prompts: its interval, and that of overall, are too narrow")
    return said


def table(runs: list[Run], comparisons: list[Comparison]) -> list[list[str]]:
    """Scores of every run, then each later run's differences to the first with their intervals; a row each."""
    tags = list(dict.fromkeys(tag for run in runs for tag in summary(run.records)["tags"]))
    rows = [["", "overall", *tags]]
    for run in runs:
        scores = summary(run.records)
        cells = [scores["tags"][tag]["score"] if tag in scores["tags"] else None for tag in tags]
        rows.append([run.name, *("" if cell is None else f"{cell:.3f}" for cell in (scores["overall"], *cells))])
    for run, comparison in zip(runs[1:], comparisons, strict=True):
        cells = [comparison.overall, *(comparison.tags.get(tag) for tag in tags)]
        rows.append([f"{run.name} - {runs[0].name}", *("" if cell is None else _signed(cell) for cell in cells)])
    return rows


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


def distinct(runs: list[Run]) -> list[Run]:
    """The runs, numbered where their names are the same."""
    counts, seen, named = Counter(run.name for run in runs), Counter(), []
    for run in runs:
        seen[run.name] += 1
        name = run.name if counts[run.name] == 1 else f"{run.name} ({seen[run.name]})"
        named.append(Run(name, run.pictures, run.records, run.seed))
    return named


def write_page(path: Path, runs: list[Run], comparisons: list[Comparison]) -> None:
    """One HTML file with everything in it: the table, and of each later run the worst and the best prompts."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pairs = []
    for run, comparison in zip(runs[1:], comparisons, strict=True):
        lost = [item for item in comparison.prompts if item[0] < 0][:PROMPTS]
        won = [item for item in reversed(comparison.prompts) if item[0] > 0][:PROMPTS]
        sections = [
            (title, [_shown(runs[0], run, *item) for item in items])
            for title, items in (("Worst", lost), ("Best", won))
        ]
        pairs.append({"first": runs[0].name, "other": run.name, "sections": sections, "pairs": comparison.pairs})
    html = environment.get_template("compare.html.j2").render(
        runs=[run.name for run in runs],
        warnings=warnings_of(runs, comparisons),
        table=table(runs, comparisons),
        pairs=pairs,
        level=f"{LEVEL:.0%}",
        prompts=PROMPTS,
    )
    write_atomic(path, html.encode())


def _shown(first: Run, other: Run, difference: float, keys: list[Key]) -> dict:
    """A prompt for the page: both runs' pictures, one above the other."""
    scored = first.pictures[keys[0]]
    rows = [
        {"name": run.name, "pictures": [_picture(run.pictures[key], key[1]) for key in keys]} for run in (first, other)
    ]
    return {"prompt": scored.prompt, "tag": scored.tag, "difference": f"{difference:+.2f}", "rows": rows}


def _picture(scored: Scored, number: int) -> dict:
    return {"uri": data_uri(scored.path), "right": scored.score > 0, "reason": scored.reason, "number": number}


def data_uri(path: Path) -> str | None:
    """A picture for the page, no larger than SIDE; None where it is not there or cannot be read."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    image.thumbnail((SIDE, SIDE))
    kind, options = ("png", {}) if max(image.size) <= SMALL else ("jpeg", {"quality": 88})
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
