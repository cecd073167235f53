"""Compares runs on the same prompts and seeds picture by picture: paired differences, and a page to look at."""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image

from danceopd.evaluation.geneval.layout import read_results
from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.pages import data_uri, render
from danceopd.support.paths import near_path
from danceopd.support.pictures import decode_picture
from danceopd.support.texts import many, parse_json, parse_object

RESAMPLES, LEVEL = 10_000, 0.95

FEW = 10  # prompts, of which resamples tell little

PROMPTS = 12  # shown of the worst, and of the best

PICTURES = 8  # shown of a prompt

SIDE, SMALL = 256, 128  # pixels: pictures in the page are no larger; smaller ones keep their pixels

Key = tuple[str, int]  # a prompt, or an edit of GEdit-Bench, and the number of its picture, which stands for the seed

GENEVAL, GEDIT = "GenEval", "GEdit-Bench"

AGAIN = "run danceopd evaluate gedit again: nothing is drawn or asked twice"


@dataclass(frozen=True)
class Scored:
    """One picture of a run.

    Attributes:
        tag: What scores are averaged by: GenEval's tag, or an edit's kind and language.
        prompt: Its text.
        score: 0 or 1 by a verdict, or a mark.
        path: The picture; None where it is not in the run's folder, of which nothing else is looked at.
        reason: Why it has this score.
        right: The verdict; None where the score is a mark.
        index: An edit's place in its data set.
    """

    tag: str
    prompt: str
    score: float
    path: Path | None
    reason: str = ""
    right: bool | None = None
    index: int | None = None


@dataclass(frozen=True)
class Run:
    """A run's scored pictures.

    Attributes:
        name: The folder's.
        pictures: By key.
        benchmark: GENEVAL or GEDIT.
        seed: Of all its noise; None where what drew the pictures does not say.
        judge: What scored the edits.
        dataset: Where the pictures that were edited are.
        left_out: How many of its pictures are not compared, since another run lacks them.
    """

    name: str
    pictures: dict[Key, Scored]
    benchmark: str = GENEVAL
    seed: int | None = None
    judge: str | None = None
    dataset: Path | None = None
    left_out: int = 0

    def scores(self) -> tuple[float, dict[str, float]]:
        """Returns (overall, the mean of each tag); overall is the mean of these."""
        tags: dict[str, list[float]] = {}
        for one in self.pictures.values():
            tags.setdefault(one.tag, []).append(one.score)
        means = {tag: fmean(scores) for tag, scores in tags.items()}
        return fmean(means.values()), means


def read_run(path: Path) -> Run:
    """Reads a run's pictures and scores, whatever evaluated it.

    Args:
        path: A folder in GenEval's layout with its results.jsonl, or such a file; of GEdit-Bench the folder with a
            judge's results.json, that file, or the method's folder if one judge alone scored it.

    Raises:
        UserError: There is no such file, or two of its lines are of the same picture.
    """
    if not path.exists():
        raise UserError(f"there is no {path}; give the folder of a run that was evaluated{near_path(path)}")
    if path.is_file():
        return _read_gedit(path) if path.suffix == ".json" else _read_geneval(path)
    if (path / "results.jsonl").is_file():
        return _read_geneval(path / "results.jsonl")
    if (path / "results.json").is_file():
        return _read_gedit(path / "results.json")
    judged = sorted((path.resolve().parent / "scores" / path.resolve().name).glob("*/results.json"))
    if len(judged) == 1:
        return _read_gedit(judged[0])
    if judged:
        raise UserError(f"several judges scored {path}; give one of {', '.join(str(file.parent) for file in judged)}")
    raise UserError(
        f"there are no results in {path}: danceopd evaluate geneval {path} --detector ... writes them, danceopd "
        f"evaluate gedit ... --method {path.name} those of edits, and danceopd evaluate CHECKPOINT --pictures {path} "
        "those of the picture world"
    )


def _read_geneval(file: Path) -> Run:
    folder, pictures, asked = file.parent, {}, {}
    for line in sorted(read_results(file), key=lambda line: Path(line["filename"]).parts[-3:]):
        named = Path(line["filename"])
        if not re.fullmatch(r"\d{1,9}", named.stem):
            raise UserError(f"{file}: {named} has no number as its name; give GenEval's results")
        try:
            metadata = parse_json(line["metadata"])
        except ValueError as error:
            raise UserError(
                f"{file}: the 'metadata' of {named} is not JSON ({error}); give GenEval's results"
            ) from None
        prompt = json.dumps(metadata, sort_keys=True)
        # A benchmark may ask one prompt twice, in folders of their own: the first of one run is the first of another's.
        folders = asked.setdefault(prompt, [])
        if named.parts[-3:-1] not in folders:
            folders.append(named.parts[-3:-1])
        key = (f"{prompt} {folders.index(named.parts[-3:-1])}", int(named.stem))
        if key in pictures:
            raise UserError(f"{file} has two lines for picture {named.stem} of the same prompt; remove one")
        right = line["correct"]
        pictures[key] = Scored(
            line["tag"],
            str(line.get("prompt", "")),
            float(right),
            _inside(folder, Path(*named.parts[-3:])) or _inside(folder, named),
            str(line.get("reason") or ""),
            right,
        )
    name = file.resolve().parent.name + ("" if file.name == "results.jsonl" else f"/{file.stem}")
    return Run(name, pictures, seed=_seed(folder / "generation.json"))


def _read_gedit(file: Path) -> Run:
    """Returns the O of each edit, by kind and language, at its place in the layout."""
    try:
        results = parse_json(file.read_bytes())
        ours = isinstance(results, dict) and results.get("benchmark") == GEDIT
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); {AGAIN}") from None
    if not ours:
        raise UserError(
            f"{file} holds no scores of single pictures; give results of evaluate geneval or evaluate gedit"
        )
    pictures = {}
    try:
        method = results["method"]
        if method != Path(method).name:
            raise ValueError(f"the method {method!r} is no folder's name")
        folder = file.resolve().parents[3] / method
        for row in results["rows"]:
            sc, pq = min(row["sc"]), min(row["pq"])
            pictures[f"{row['kind']}/{row['language']}/{row['key']}", 0] = Scored(
                f"{row['kind']} {row['language']}",
                row["instruction"],
                math.sqrt(sc * pq),
                _inside(folder, Path(row["picture"])),
                f"SC {sc:g}, PQ {pq:g}",
                index=row["index"],
            )
        judge, dataset = str(results["judge"]), Path(results["dataset"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{file} lacks what is compared ({error!r}); {AGAIN}") from None
    if not pictures:
        raise UserError(f"{file} scores no edit; {AGAIN}")
    return Run(folder.name, pictures, GEDIT, _seed(folder / "made_by.json"), judge, dataset)


def _inside(folder: Path, named: Path) -> Path | None:
    """Returns a file by its name in a folder, or None: results may come from anywhere, their pictures may not."""
    try:
        path = (folder / named).resolve()  # follows links, so that none leads out unnoticed
        return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, a null character, a ring of links
        return None


def _seed(file: Path) -> int | None:
    try:
        seed = parse_object(file.read_bytes()).get("seed")
    except (OSError, ValueError):
        return None
    return seed if type(seed) is int else None


@dataclass(frozen=True)
class Interval:
    """A mean difference and the ends of its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A run against the first: differences (run - first), and the prompts from worst to best.

    Attributes:
        overall: The mean of the tags' mean differences.
        tags: The mean difference of each tag.
        prompts: (difference, the keys of its pairs), sorted.
        pairs: How many pictures were paired.
        fewest: Number of prompts of the smallest tag.
    """

    overall: Interval
    tags: dict[str, Interval]
    prompts: list[tuple[float, list[Key]]]
    pairs: int
    fewest: int


def compare(first: Run, other: Run, seed: int = 0) -> Comparison:
    """Compares pictures of the same prompt and number, one from each of two runs with the same pictures.

    The intervals are percentiles of bootstrap resamples of whole prompts within each tag, since the pictures of a
    prompt are alike.

    Args:
        first, other: The runs, as `paired` returns them.
        seed: Of the resamples.
    """
    prompts: dict[str, list[Key]] = {}
    for key in first.pictures:
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
        len(first.pictures),
        min(map(len, by_tag.values())),
    )


def _interval(mean: float, resampled: np.ndarray) -> Interval:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(mean), float(low), float(high))


def warnings_of(runs: list[Run], comparisons: list[Comparison]) -> list[str]:
    """Lists what a reader of the comparison must know."""
    said = []
    seeds = {run.name: run.seed for run in runs if run.seed is not None}
    if len(set(seeds.values())) > 1:
        drawn = ", ".join(f"{name} {seed}" for name, seed in seeds.items())
        said.append(f"drawn from different seeds ({drawn}): pictures of the same number do not share their noise")
    judges = {run.name: run.judge for run in runs if run.judge is not None}
    if len(set(judges.values())) > 1:
        asked = ", ".join(f"{name} {judge}" for name, judge in judges.items())
        said.append(f"scored by different judges ({asked}), whose marks cannot be compared; score all with one")
    for run in runs:
        if lost := sum(one.path is None for one in run.pictures.values()):
            said.append(f"{run.name}: {lost} of its pictures are not in its folder and cannot be shown")
        if run.left_out:
            scored = many(len(run.pictures) + run.left_out, "picture")
            are, them = ("is", "it") if run.left_out == 1 else ("are", "them")
            said.append(f"{run.name}: {run.left_out:,} of its {scored} {are} left out, since another run lacks {them}")
    fewest = min(comparison.fewest for comparison in comparisons)  # of the same prompts in all runs
    if fewest < FEW:
        said.append(f"a tag has {many(fewest, 'prompt')}: its interval, and that of overall, are too narrow")
    return said


def table(runs: list[Run], comparisons: list[Comparison]) -> list[list[str]]:
    """Returns scores of every run, then each later run's differences to the first with their intervals; a row each."""
    scores = [run.scores() for run in runs]
    tags = list(dict.fromkeys(tag for _, means in scores for tag in means))
    rows = [["", "overall", *tags]]
    for run, (overall, means) in zip(runs, scores, strict=True):
        cells = [overall, *(means.get(tag) for tag in tags)]
        rows.append([run.name, *("" if cell is None else f"{cell:.3f}" for cell in cells)])
    for run, comparison in zip(runs[1:], comparisons, strict=True):
        cells = [comparison.overall, *(comparison.tags.get(tag) for tag in tags)]
        rows.append([f"{run.name} - {runs[0].name}", *("" if cell is None else _signed(cell) for cell in cells)])
    return rows


def _signed(interval: Interval) -> str:
    mean, low, high = (round(value, 3) + 0.0 for value in (interval.mean, interval.low, interval.high))  # no -0.000
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def paired(runs: list[Run]) -> list[Run]:
    """Leaves in every run the pictures that all of them have, so that scores and differences are of the same ones.

    Args:
        runs: Two or more.

    Returns:
        The runs, in the order that was given.

    Raises:
        UserError: They are of different benchmarks, or have no picture in common.
    """
    first = runs[0]
    for other in runs[1:]:
        if first.benchmark != other.benchmark:
            raise UserError(
                f"{first.name} is scored on {first.benchmark} and {other.name} on {other.benchmark}; give runs of one"
            )
    keys = [key for key in first.pictures if all(key in other.pictures for other in runs)]
    if not keys:
        names = " and ".join(run.name for run in runs)
        raise UserError(
            f"{names} have no picture of the same prompt and number; give runs that were drawn for the same prompts"
        )
    return [
        replace(run, pictures={key: run.pictures[key] for key in keys}, left_out=len(run.pictures) - len(keys))
        for run in runs
    ]


def distinct(runs: list[Run]) -> list[Run]:
    """Returns the runs, numbered where their names are the same."""
    counts, seen, named = Counter(run.name for run in runs), Counter(), []
    for run in runs:
        seen[run.name] += 1
        name = run.name if counts[run.name] == 1 else f"{run.name} ({seen[run.name]})"
        named.append(replace(run, name=name))
    return named


def headline(runs: list[Run], comparisons: list[Comparison]) -> str:
    """Writes one sentence: who is better than the first run, by how much, and whether that is more than chance."""
    parts = []
    for run, comparison in zip(runs[1:], comparisons, strict=True):
        mean, low, high = comparison.overall.mean, comparison.overall.low, comparison.overall.high
        if comparison.fewest < FEW:  # their interval is too narrow
            parts.append(f"too few prompts to tell {run.name} from {runs[0].name} ({_signed(comparison.overall)})")
        elif low <= 0 <= high:
            parts.append(f"{run.name} and {runs[0].name} cannot be told apart ({_signed(comparison.overall)})")
        else:
            parts.append(f"{run.name} is {'better' if mean > 0 else 'worse'} than {runs[0].name} by {abs(mean):.3f}")
    return f"{runs[0].benchmark}: {'; '.join(parts)}"


def write_page(path: Path, runs: list[Run], comparisons: list[Comparison]) -> None:
    """Writes one HTML file with everything in it: the table, and of each later run the worst and the best prompts."""
    pairs, source_of = [], _sources(runs[0])
    for run, comparison in zip(runs[1:], comparisons, strict=True):
        lost = [item for item in comparison.prompts if item[0] < 0][:PROMPTS]
        won = [item for item in reversed(comparison.prompts) if item[0] > 0][:PROMPTS]
        same = [item for item in comparison.prompts if item[0] == 0][:PROMPTS] if not lost and not won else []
        found = (
            (f"Where {run.name} is worse", lost),
            (f"Where {run.name} is better", won),
            ("Scored alike", same),
        )
        sections = [
            (title, [_shown(runs[0], run, source_of, *item) for item in items]) for title, items in found if items
        ]
        pairs.append({"first": runs[0].name, "other": run.name, "sections": sections, "pairs": comparison.pairs})
    html = render(
        Path(__file__).with_name("compare.html.j2"),
        runs=[run.name for run in runs],
        headline=headline(runs, comparisons),
        warnings=warnings_of(runs, comparisons),
        table=table(runs, comparisons),
        pairs=pairs,
        benchmark=runs[0].benchmark,
        level=f"{LEVEL:.0%}",
        prompts=PROMPTS,
    )
    write_atomic(path, html.encode())


def _sources(run: Run) -> Callable[[Key, Scored], Image.Image | None]:
    """Returns the picture that was edited; None where the data set is not there, or another one is."""

    @cache
    def data():
        import datasets

        from danceopd.evaluation.gedit.benchmark import load_data  # diffusers comes with it, which takes its time

        rows = load_data(run.dataset).select_columns(["key", "input_image"])
        return rows.cast_column("input_image", datasets.Image(decode=False))

    def source_of(key: Key, scored: Scored) -> Image.Image | None:
        try:
            row = data()[scored.index]
            own = key[0].endswith(f"/{row['key']}")
            return decode_picture(io.BytesIO(row["input_image"]["bytes"])) if own else None
        except Exception:  # on damaged files decoders raise almost anything, and the page does without
            return None

    return source_of


def _shown(first: Run, other: Run, source_of: Callable, difference: float, keys: list[Key]) -> dict:
    """Lays out a prompt for the page: both runs' pictures, one above the other.

    Of an edit its source picture above both.
    """
    scored, shown = first.pictures[keys[0]], keys[:PICTURES]
    rows = [
        {"name": run.name, "pictures": [_picture(run.pictures[key], key[1]) for key in shown]} for run in (first, other)
    ]
    if first.dataset:
        source = source_of(keys[0], scored)
        uri = source and small_uri(source)
        rows.insert(0, {"name": "source", "pictures": [{"uri": uri, "verdict": "", "reason": "", "number": 0}]})
    tag = scored.tag if len(shown) == len(keys) else f"{scored.tag} · {len(shown)} of {len(keys)} pictures"
    return {"prompt": scored.prompt, "tag": tag, "difference": f"{difference:+.2f}", "rows": rows}


def _picture(scored: Scored, number: int) -> dict:
    verdict = f"{scored.score:.2f}" if scored.right is None else "right" if scored.right else "wrong"
    return {"uri": file_uri(scored.path), "verdict": verdict, "reason": scored.reason, "number": number}


def file_uri(path: Path | None) -> str | None:
    """Reads a picture's file for the page; None where it is not there or cannot be read."""
    try:
        return small_uri(decode_picture(path)) if path else None
    except ValueError:
        return None


def small_uri(image: Image.Image) -> str:
    """Returns a picture for the page, no larger than SIDE."""
    image.thumbnail((SIDE, SIDE))
    return data_uri(image) if max(image.size) <= SMALL else data_uri(image, "jpeg", quality=88)
