"""GEdit-Bench (arXiv 2504.17761): edits by a diffusers pipeline in the official layout, and their VIEScore.

The layout is METHOD/fullset/TASK/LANGUAGE/KEY.png, as the benchmark's own script reads it.
"""

import csv
import hashlib
import inspect
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from danceopd.backbones import backbone_of, empty_transformer, loading, pipeline_class_of
from danceopd.checkpoint import write_atomic
from danceopd.data.manifest import decode_picture
from danceopd.data.prepare import fingerprint, multiple_of
from danceopd.errors import UserError
from danceopd.evaluation.judge import Edit, Verdict, judge_edits, overall
from danceopd.evaluation.world import standard_error
from danceopd.training.ranks import ALONE, Ranks

# The benchmark's own names of its eleven kinds, and those that the paper's average is over.
KINDS = (
    "background_change",
    "color_alter",
    "material_alter",
    "motion_change",
    "ps_human",
    "style_change",
    "subject-add",
    "subject-remove",
    "subject-replace",
    "text_change",
    "tone_transfer",
)
PAPER_KINDS = ("subject-add", "subject-replace", "background_change", "style_change", "color_alter", "subject-remove")
LANGUAGES = ("en", "cn")
SUBSETS = ("fullset", "intersection")
COLUMNS = ("key", "task_type", "instruction", "instruction_language", "input_image")
INTERSECTION = "Intersection_exist"  # the column of rows that are in the smaller subset too
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of pictures; ours are PNGs
MADE_BY = "made_by.json"  # beside fullset: what drew the pictures of a method


@dataclass(frozen=True)
class Row:
    """One edit of the benchmark. index: its place in the data set; intersection: None where no column tells."""

    key: str
    kind: str
    language: str
    instruction: str
    intersection: bool | None
    index: int


@dataclass(frozen=True)
class Benchmark:
    """The rows chosen, and the data set that holds their pictures."""

    rows: list[Row]
    data: Any

    def picture(self, row: Row, raw: bool = False) -> Image.Image:
        """A row's source as RGB; raw: as it was before the benchmark's authors resized it, where that is there.

        Raises UserError if it cannot be decoded.
        """
        column = "input_image_raw" if raw and "input_image_raw" in self.data.column_names else "input_image"
        try:
            picture = self.data.select_columns([column])[row.index][column]
            return picture.convert("RGB")
        except Exception as error:  # on damaged files decoders raise almost anything
            raise UserError(f"the {column} of {row.key} cannot be read ({error}); copy the data set again") from None


def kinds_of(names: Iterable[str]) -> tuple[str, ...]:
    """The benchmark's names of kinds, written with - or _ alike; "paper" and "all" are the six and the eleven."""
    known = {kind.replace("_", "-"): (kind,) for kind in KINDS} | {"paper": PAPER_KINDS, "all": KINDS}
    found: list[str] = []
    for name in names:
        if name.replace("_", "-") not in known:
            raise UserError(f"GEdit-Bench has no kind {name!r}; there are paper, all, {', '.join(KINDS)}")
        found += known[name.replace("_", "-")]
    return tuple(dict.fromkeys(found))


def read_benchmark(
    folder: Path, kinds: Sequence[str] = PAPER_KINDS, languages: Sequence[str] = ("en",), subset: str = "fullset"
) -> Benchmark:
    """The rows of these kinds, languages and subset of a data set written by save_to_disk, or of a folder of parquet.

    Raises UserError for a folder that is no such data set, columns that are missing, rows that name no place of the
    layout or the same one twice, and a kind without rows in one of the languages.
    """
    data = load_data(folder)
    if missing := [column for column in COLUMNS if column not in data.column_names]:
        raise UserError(f"{folder} lacks the columns {', '.join(missing)}; it has {', '.join(data.column_names)}")
    if subset == "intersection" and INTERSECTION not in data.column_names:
        raise UserError(f"{folder} has no column {INTERSECTION}, which says what the intersection subset is")
    names = ["key", "task_type", "instruction_language", "instruction", INTERSECTION]
    texts = data.select_columns([name for name in names if name in data.column_names])[:]
    rows, places = [], set()
    for i in range(len(data)):
        values = {name: column[i] for name, column in texts.items()}
        key, kind, language, text = (str(values[name]) for name in names[:4])
        if kind not in KINDS or language not in LANGUAGES:
            raise UserError(
                f"{folder}: row {i} is of task_type {kind!r} and language {language!r}, which GEdit-Bench has not"
            )
        if not re.fullmatch(r"[\w.-]+", key) or key.startswith("."):
            raise UserError(f"{folder}: the key {key!r} of row {i} is no file's name")
        if (kind, language, key) in places:
            raise UserError(f"{folder}: two rows have the key {key} in {kind}/{language}")
        places.add((kind, language, key))
        inside = None if values.get(INTERSECTION) is None else bool(values[INTERSECTION])
        if kind in kinds and language in languages and (subset == "fullset" or inside):
            rows.append(Row(key, kind, language, text, inside, i))
    for language in languages:
        there = {row.kind for row in rows if row.language == language}
        if none := [kind for kind in kinds if kind not in there]:
            raise UserError(f"{folder} has no rows of {', '.join(none)} in {language} ({subset}); choose other kinds")
    return Benchmark(rows, data)


def load_data(folder: Path):
    """The data set in a folder, its pictures to be decoded. Raises UserError for a folder that is none."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError("reading GEdit-Bench needs datasets; pip install 'danceopd[datasets]'") from None
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give GEdit-Bench as save_to_disk wrote it, or its parquet files")
    try:
        if parquet := sorted(str(path) for path in folder.rglob("*.parquet")):
            data = datasets.Dataset.from_parquet(parquet)
        else:
            data = datasets.load_from_disk(str(folder))
    except Exception as error:  # of many kinds, by the file that is damaged
        raise UserError(f"{folder} is no data set of save_to_disk, nor of parquet files ({error})") from None
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            raise UserError(f"{folder} has no split train, which GEdit-Bench is in; there are {', '.join(data)}")
        data = data["train"]
    for column in ("input_image", "input_image_raw"):
        if column in data.column_names and not isinstance(data.features[column], datasets.Image):
            try:
                data = data.cast_column(column, datasets.Image())
            except Exception:
                raise UserError(f"{folder}: the column {column} holds no pictures") from None
    return data


# ------------------------------------------------------------------------------------------------- editing


@dataclass(frozen=True)
class Drawing:
    """How edits are drawn: the square root of a picture's pixels, and, where not None, other than the pipeline does."""

    resolution: int = 1024
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0


def picture_file(folder: Path, row: Row) -> Path:
    """Where a method's edit of a row is: the PNG, or a picture of another kind that some tool wrote."""
    place = folder / "fullset" / row.kind / row.language
    for suffix in SUFFIXES:
        if (place / (row.key + suffix)).is_file():
            return place / (row.key + suffix)
    return place / f"{row.key}.png"


def size_of(picture: Image.Image, resolution: int, multiple: int) -> tuple[int, int]:
    """(height, width) of an edit: the source's shape with about resolution^2 pixels, in multiples of `multiple`."""
    ratio = picture.width / picture.height
    width, height = resolution * math.sqrt(ratio), resolution / math.sqrt(ratio)
    return tuple(max(multiple, round(side / multiple) * multiple) for side in (height, width))


def seed_of(row: Row, seed: int) -> int:
    """The seed of a row's noise: of its place in the layout and a seed, whatever else is drawn, where or when."""
    place = f"{seed} {row.kind} {row.language} {row.key}"
    return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=6).digest(), "big")


def load_pipeline(
    model: Path,
    lora: Path | None = None,
    transformer: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
):
    """An editing pipeline of diffusers from its folder, with a LoRA's file or folder, or another transformer's folder.

    The LoRA may be in any layout that danceopd.lora.load_lora takes, and lies beside the weights, as the pipeline's own
    load_lora_weights puts it. Raises UserError for a folder that draws from text alone, and for what cannot be loaded.
    """
    from danceopd.lora import load_lora, save_lora

    backbone, pipeline_class = check_pipeline(model, lora, transformer)
    parts = {"transformer": backbone.load_transformer(transformer, dtype)} if transformer else {}
    pipeline = loading.load(pipeline_class, model, dtype=dtype, use_safetensors=True, **parts)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        with TemporaryDirectory() as folder:
            save_lora(load_lora(lora, pipeline.transformer, pipeline_class), Path(folder), pipeline_class)
            pipeline.load_lora_weights(folder, use_safetensors=True)
    return pipeline.to(device)


def check_pipeline(model: Path, lora: Path | None = None, transformer: Path | None = None):
    """(the family's module, the pipeline's class) of what load_pipeline would load, by files' headers and names alone.

    Raises UserError as it does.
    """
    from danceopd.lora import lora_parameters

    backbone = backbone_of(model)
    if "edit" not in backbone.tasks(model):
        name = loading.class_name_of(model)
        raise UserError(f"{model} is a {name}, which draws from text alone; give the folder of an editing pipeline")
    loading.check_weights(transformer or model)
    loading.check_weights(model / "vae")
    if lora:
        lora_parameters(lora, empty_transformer(transformer or model), pipeline_class_of(model))
    return backbone, pipeline_class_of(model)


def _identity(path: Path | None) -> str | None:
    """Names a file's or a folder's content, wherever it lies."""
    if path is None or path.is_dir():
        return path and fingerprint(path)
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def claim(
    folder: Path, model: Path, lora: Path | None, transformer: Path | None, drawing: Drawing, dtype: torch.dtype
) -> None:
    """Say in a method's folder what draws its pictures. Raises UserError where others were drawn there."""
    pictures = any(path.suffix in SUFFIXES for path in (folder / "fullset").glob("*/*/*"))
    what = {
        "model": _identity(loading.transformer_folder(model)),
        "lora": _identity(lora),
        "transformer": _identity(transformer and loading.transformer_folder(transformer)),
        "dtype": str(dtype).removeprefix("torch."),
        **asdict(drawing),
    }
    try:
        there = json.loads((folder / MADE_BY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = None
    except ValueError as error:
        raise UserError(f"{folder / MADE_BY} is damaged ({error}); remove {folder}, or give another --method") from None
    if pictures and there != what:
        other = [name for name in what if there is None or there.get(name) != what[name]]
        by = f"with other settings ({', '.join(other)})" if there else "by another tool"
        raise UserError(
            f"the pictures in {folder} were made {by}; give another --method, or score them without --model"
        )
    if there != what:
        write_atomic(folder / MADE_BY, (json.dumps(what, indent=1) + "\n").encode())


def edit(pipeline, picture: Image.Image, instruction: str, size: tuple[int, int], seed: int, drawing: Drawing):
    """One edit by an editing pipeline of diffusers: a picture of `size` (height, width).

    Raises UserError where numbers in it are not finite, which diffusers would draw as black.
    """
    height, width = size
    takes = inspect.signature(type(pipeline).__call__).parameters
    options: dict[str, Any] = {}
    if drawing.num_inference_steps is not None:
        options["num_inference_steps"] = drawing.num_inference_steps
    if "_auto_resize" in takes:  # Kontext, which else takes sizes of its own for the source, and of 1024^2 for the edit
        options |= {"_auto_resize": False, "max_area": height * width}
    if type(pipeline).__name__.startswith("QwenImage"):
        options["negative_prompt"] = " "  # without one there is no guidance
        if drawing.guidance_scale is not None:
            options["true_cfg_scale"] = drawing.guidance_scale
    elif drawing.guidance_scale is not None:
        options["guidance_scale"] = drawing.guidance_scale
    drawn = pipeline(
        image=picture.resize((width, height), Image.Resampling.LANCZOS),
        prompt=instruction,
        height=height,
        width=width,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        **options,
    ).images
    if not np.isfinite(drawn).all():
        raise UserError(f"the model draws no finite numbers for {instruction!r}; try --dtype bfloat16 or more steps")
    return pipeline.image_processor.numpy_to_pil(drawn)[0]


def missing_rows(benchmark: Benchmark, folder: Path, rows: Iterable[Row] | None = None) -> list[Row]:
    """The rows whose edit a method's folder lacks."""
    return [row for row in (benchmark.rows if rows is None else rows) if not picture_file(folder, row).is_file()]


def edit_rows(benchmark: Benchmark, rows: Sequence[Row], folder: Path, pipeline, multiple: int, drawing: Drawing):
    """Draw the edits of rows into a method's folder, each file whole or not at all; what is there stays.

    One at a time: pictures are of different sizes, and what comes out must not depend on who is beside it.
    """
    for row in tqdm(missing_rows(benchmark, folder, rows), "edits", unit="picture"):
        source = benchmark.picture(row)
        size = size_of(source, drawing.resolution, multiple)
        buffer = io.BytesIO()
        edit(pipeline, source, row.instruction, size, seed_of(row, drawing.seed), drawing).save(buffer, "PNG")
        write_atomic(folder / "fullset" / row.kind / row.language / f"{row.key}.png", buffer.getvalue())


# ------------------------------------------------------------------------------------------------- scoring


def score_rows(benchmark: Benchmark, rows: Sequence[Row], folder: Path, judge, cache: Path) -> list[Verdict]:
    """The judge's verdict on each row's edit in a method's folder. Raises UserError as judge_edits, and for a picture
    that cannot be read."""

    def load(row: Row) -> tuple[Image.Image, Image.Image]:
        path = picture_file(folder, row)
        try:
            return benchmark.picture(row, raw=True), decode_picture(path)
        except ValueError as error:
            raise UserError(error if isinstance(error, UserError) else f"{path}: {error}; make it again") from None

    edits = [Edit(row.instruction, lambda row=row: load(row)) for row in rows]
    return judge_edits(edits, judge, cache, lambda items, total: tqdm(items, "judged", total, unit="batch"))


def summarize(rows: Sequence[Row], verdicts: Sequence[Verdict], kinds: Sequence[str] = PAPER_KINDS) -> dict:
    """{language: {subset: {"average": ..., "kinds": {kind: ...}}}}, each of "sc", "pq", "o" and how many "n" scored.

    A kind's value is the mean of its edits', the average the mean of its kinds, None where one has no edit that was
    scored; "standard_error" is of the average O. Edits without a score are left out, as the official script does.
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
    """The summary as a table for the terminal."""
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
    """Write results.json and, for the official calculate_statistics.py, one CSV a kind; returns the results."""
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


# ------------------------------------------------------------------------------------------------- the command


def method_folder(output: Path, method: str) -> Path:
    """A method's folder. Raises UserError for a name that is none of a folder, or is taken."""
    if not re.fullmatch(r"[\w.-]+", method) or method.startswith(".") or method in ("scores", "judged"):
        raise UserError(f"--method {method!r} is no name of a folder beside scores and judged")
    return output / method


def evaluate_gedit(
    dataset: Path,
    output: Path,
    method: str,
    *,
    model: Path | None = None,
    lora: Path | None = None,
    transformer: Path | None = None,
    drawing: Drawing | None = None,
    make_judge: Callable | None = None,
    judge_name: str = "judge",
    kinds: Sequence[str] = PAPER_KINDS,
    languages: Sequence[str] = ("en",),
    subset: str = "fullset",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ranks: Ranks = ALONE,
) -> dict | None:
    """Edit the benchmark's pictures that are missing, if there is a model, and score them all, if there is a judge.

    output: holds METHOD/fullset/..., scores/METHOD/JUDGE/results.json and the judge's answers in judged. make_judge():
    an EndpointJudge or LocalJudge. Each rank edits and asks about its own share of rows. Returns the results, on rank 0
    and with a judge. Raises UserError for whatever is missing before anything is drawn.
    """
    drawing = drawing or Drawing()
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
        backbone, _ = check_pipeline(model, lora, transformer)
        claim(folder, model, lora, transformer, drawing, dtype)
        if missing:
            if judge:
                judge.check()  # hours of drawing come before its first question
            for row in missing_rows(benchmark, folder, own):
                benchmark.picture(row)
            pipeline = load_pipeline(model, lora, transformer, device, dtype)
            edit_rows(benchmark, own, folder, pipeline, multiple_of(backbone, model), drawing)
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
