"""Scores the edits of GEdit-Bench."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from danceopd.evaluation.gedit.benchmark import PAPER_KINDS, SUBSETS, Benchmark, Row, read_benchmark
from danceopd.evaluation.gedit.draw import (
    Editing,
    check_pipeline,
    claim,
    edit_rows,
    missing_rows,
    picture_file,
)
from danceopd.evaluation.gedit.judge import Edit, ExactJudge, Verdict, judge_edits, overall
from danceopd.evaluation.pipelines import check_takes, load_pipeline
from danceopd.evaluation.statistics import standard_error
from danceopd.models.loading import multiple_of
from danceopd.support.bars import bar
from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.pictures import decode_picture
from danceopd.support.ranks import ALONE, Ranks


def score_rows(benchmark: Benchmark, rows: Sequence[Row], folder: Path, judge, cache: Path) -> list[Verdict]:
    """Judges each row's edit in a method's folder; a UserError as from judge_edits, and for a damaged picture.

    judge: An EndpointJudge or LocalJudge, or an ExactJudge, whose verdicts need no cache.
    """

    def load(row: Row) -> tuple[Image.Image, Image.Image]:
        path = picture_file(folder, row)
        try:
            return benchmark.picture(row, raw=True), decode_picture(path)
        except ValueError as error:
            raise UserError(error if isinstance(error, UserError) else f"{path}: {error}; make it again") from None

    edits = [Edit(row.instruction, lambda row=row: load(row)) for row in rows]
    if isinstance(judge, ExactJudge):
        return [judge.verdict(edit.instruction, *edit.load()) for edit in bar(edits, "judged")]
    return judge_edits(edits, judge, cache, lambda items, total: bar(items, "judged", total, unit="batch"))


def summarize(rows: Sequence[Row], verdicts: Sequence[Verdict], kinds: Sequence[str] = PAPER_KINDS) -> dict:
    """Averages the verdicts by language, subset and kind.

    A kind's value is the mean of its edits', the average the mean of its kinds, None where one has no edit that was
    scored. Edits without a score are left out, as the official script does.

    Returns:
        {language: {subset: {"average": ..., "kinds": {kind: ...}}}}, each of "sc", "pq", "o" and how many "n" scored;
        "standard_error" is of the average O.
    """
    summary: dict = {}
    for language in dict.fromkeys(row.language for row in rows):
        summary[language] = {}
        for subset in SUBSETS:
            scored: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
            for row, verdict in zip(rows, verdicts, strict=True):
                inside = row.language == language and (subset == "fullset" or row.intersection)
                if inside and row.kind in scored and not verdict.problem:
                    scored[row.kind].append((verdict.sc, verdict.pq, overall(verdict.sc, verdict.pq)))
            if not any(scored.values()):
                continue
            means = {kind: _means(values) for kind, values in scored.items()}
            average = _means([(m["sc"], m["pq"], m["o"]) for m in means.values()]) if all(scored.values()) else None
            if average:
                average["n"] = sum(m["n"] for m in means.values())
                average["standard_error"] = standard_error([torch.tensor(v)[:, 2] for v in scored.values()])
            summary[language][subset] = {"average": average, "kinds": means}
    return summary


def _means(values: Sequence[tuple[float, float, float]]) -> dict:
    columns = zip(*values, strict=True) if values else ((), (), ())
    means = {name: sum(v) / len(v) if v else None for name, v in zip(("sc", "pq", "o"), columns, strict=True)}
    return {"n": len(values), **means}


def format_summary(summary: dict) -> str:
    """Writes the summary as a table for the terminal."""
    lines = []
    for language, subsets in summary.items():
        for subset, scores in subsets.items():
            lines.append(f"{language} {subset:22s}      SC      PQ       O      n")
            for name, means in [*scores["kinds"].items(), ("average", scores["average"])]:
                shown = [means and means[part] for part in ("sc", "pq", "o")]
                cells = "".join(f"{'-' if x is None else format(x, '.3f'):>8s}" for x in shown)
                lines.append(f"   {name:22s}{cells}{means['n'] if means else 0:7d}")
    return "\n".join(lines)


def write_scores(
    place: Path,
    folder: Path,
    dataset: Path,
    rows: Sequence[Row],
    verdicts: Sequence[Verdict],
    kinds: Sequence[str],
    judge: str,
) -> dict:
    """Writes results.json and, for the official calculate_statistics.py, one CSV a kind; returns the results."""
    results = {
        "benchmark": "GEdit-Bench",
        "method": folder.name,
        "judge": judge,
        "dataset": str(dataset.resolve()),
        "kinds": list(kinds),
        "scores": summarize(rows, verdicts, kinds),
        "unscored": [
            {"key": row.key, "kind": row.kind, "language": row.language, "problem": verdict.problem}
            for row, verdict in zip(rows, verdicts, strict=True)
            if verdict.problem
        ],
        "rows": [
            {
                "key": row.key,
                "kind": row.kind,
                "language": row.language,
                "intersection": row.intersection,
                "instruction": row.instruction,
                "index": row.index,
                "picture": str(picture_file(folder, row).relative_to(folder)),
                "sc": list(verdict.sc_marks),
                "pq": list(verdict.pq_marks),
            }
            for row, verdict in zip(rows, verdicts, strict=True)
            if not verdict.problem
        ],
    }
    for kind in kinds:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for row, verdict in zip(rows, verdicts, strict=True):
            if row.kind == kind and not verdict.problem:
                picture, inside = str(picture_file(folder, row)), bool(row.intersection)
                writer.writerow((row.key, picture, row.instruction, verdict.sc, verdict.pq, inside, row.language))
        write_atomic(place / f"{folder.name}_{kind}_all_vie_score.csv", text.getvalue().encode())
    write_atomic(place / "results.json", (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
    return results


CSV_COLUMNS = (  # the official script's names, its spelling too
    "key",
    "edited_image",
    "instruction",
    "sementics_score",
    "quality_score",
    "intersection_exist",
    "instruction_language",
)


def method_folder(output: Path, method: str) -> Path:
    """Returns a method's folder; a UserError for a name that is none of a folder, or is taken."""
    if not re.fullmatch(r"[\w.-]+", method) or method.startswith(".") or method in ("scores", "judged"):
        raise UserError(f"--method {method!r} is no name of a folder beside scores and judged")
    return output / method


# Long: a third of it says what its arguments are.
def evaluate_gedit(
    dataset: Path,
    output: Path,
    method: str,
    *,
    model: Path | None = None,
    lora: Path | None = None,
    transformer: Path | None = None,
    editing: Editing | None = None,
    make_judge: Callable | None = None,
    judge_name: str = "judge",
    kinds: Sequence[str] = PAPER_KINDS,
    languages: Sequence[str] = ("en",),
    subset: str = "fullset",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ranks: Ranks = ALONE,
) -> dict | None:
    """Edits the benchmark's pictures that are missing, if there is a model, and scores them all, if there is a judge.

    Args:
        dataset: The benchmark, as read_benchmark takes it.
        output: Holds METHOD/fullset/..., scores/METHOD/JUDGE/results.json and the judge's answers in judged.
        method: The folder's name of these pictures.
        model, lora, transformer, device, dtype: As for evaluation.pipelines.load_pipeline.
        editing: How edits are drawn.
        make_judge: Makes an EndpointJudge or LocalJudge.
        judge_name: The folder's name of its scores.
        kinds, languages, subset: As for read_benchmark.
        ranks: Each edits and asks about its own share of rows; every one calls this.

    Returns:
        The results, on rank 0 and with a judge; else None.

    Raises:
        UserError: Something is missing; said before anything is drawn.
    """
    editing = editing or Editing()
    folder, benchmark = method_folder(output, method), read_benchmark(dataset, kinds, languages, subset)
    own = [benchmark.rows[i] for i in ranks.slots(len(benchmark.rows))]
    missing = missing_rows(benchmark, folder)
    if model is None and missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(benchmark.rows)} pictures, such as "
            f"{picture_file(folder, missing[0]).relative_to(folder)}; draw them by --model"
        )
    judge = make_judge() if make_judge else None
    if model is not None:
        backbone = check_pipeline(model, lora, transformer)
        check_takes(model, None, editing.max_sequence_length)
        claim(folder, model, lora, transformer, editing, dtype)
        if missing:
            if judge:
                judge.check()  # hours of drawing come before its first question
            for row in missing_rows(benchmark, folder, own):
                benchmark.picture(row)
            pipeline = load_pipeline(model, lora, transformer, device, dtype)
            edit_rows(benchmark, own, folder, pipeline, multiple_of(backbone, model), editing)
            del pipeline  # its memory, before a judge on this machine is loaded
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if judge is None:
        ranks.wait()
        return None
    verdicts = [v for part in ranks.gather(score_rows(benchmark, own, folder, judge, output / "judged")) for v in part]
    if ranks.rank:
        return None
    place = output / "scores" / method / (re.sub(r"[^\w.-]+", "_", judge_name).strip("._") or "judge")
    results = write_scores(place, folder, dataset, benchmark.rows, verdicts, kinds, judge.name)
    return results | {"place": str(place)}
