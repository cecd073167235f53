"""Scores a folder of GenEval's pictures."""

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic


def _progress(what: str) -> Callable:
    from tqdm import tqdm

    return lambda items: tqdm(items, desc=what, disable=os.environ.get("RANK", "0") != "0")


def score_folder(args: argparse.Namespace, metadata: list[dict] | None, results: Path, ranks, device) -> list[dict]:
    """Score each rank's prompts, write the results of all in the order of the pictures, and return them.

    Everything that a user can mend is said before the first picture is looked at. What is scored is kept beside the
    results, in results.scored, a file a prompt and a line a picture: after a kill the same call goes on from there.
    """
    from danceopd.evaluation.geneval.draw import contents
    from danceopd.evaluation.geneval.layout import read_pictures, write_results
    from danceopd.evaluation.geneval.models import load_colors, load_detector
    from danceopd.support.ranks import agreed

    keep, keys, scored = results.with_suffix(".scored"), {}, {}  # the keys and lines of this rank's pictures

    def prepare():
        prompts = read_pictures(args.folder, metadata, args.samples if args.model else None)
        clauses = [c for p in prompts for key in ("include", "exclude") for c in p.metadata.get(key, [])]
        if any("color" in clause for clause in clauses) and not args.clip:
            raise UserError("some prompts ask for colours; give --clip, for example a folder of clip-vit-large-patch14")
        by = json.dumps([contents(args.detector), args.clip and contents(args.clip), args.max_overlap])
        for prompt in prompts[ranks.rank :: ranks.size]:
            keys.update({path: key_of(path, prompt.metadata, by) for path in prompt.pictures.values()})
            kept = read_kept(keep / f"{prompt.index:05d}.jsonl")
            for path in prompt.pictures.values():
                if keys[path] in kept:
                    scored[path] = kept[keys[path]] | {"filename": str(path)}
        if len(scored) == len(keys):
            return prompts, None, None
        detect = load_detector(args.detector, device, {clause["class"] for clause in clauses})
        return prompts, detect, load_colors(args.clip, device) if args.clip else None

    prompts, detect, name_colors = agreed(ranks, prepare)
    if ranks.rank == 0 and len({len(prompt.pictures) for prompt in prompts}) > 1:
        print("warning: prompts have different numbers of pictures; those with more weigh more in their tag")
    before = sum(ranks.gather(len(scored)))

    def score():
        for prompt in _progress("scoring")(prompts[ranks.rank :: ranks.size]):
            paths = list(prompt.pictures.values())
            if left := [path for path in paths if path not in scored]:
                lines = score_pictures(prompt.metadata, left, detect, name_colors, args.max_overlap)
                scored.update(zip(left, lines, strict=True))
                kept = [json.dumps({"key": keys[path], "record": scored[path]}) + "\n" for path in paths]
                write_atomic(keep / f"{prompt.index:05d}.jsonl", "".join(kept).encode())
        return scored

    everything: dict[Path, dict] = {}
    for part in ranks.gather(agreed(ranks, score)):
        everything |= part
    records = [everything[path] for prompt in prompts for path in prompt.pictures.values()]
    if ranks.rank == 0:
        write_results(results, records)
        print(f"{len(records) - before} pictures scored, {before} were before: {args.folder}")
    return records


def key_of(picture: Path, metadata: dict, by: str) -> str:
    """Names all that a verdict depends on: the picture's bytes, its prompt, and what looks at it."""
    digest = hashlib.blake2b(json.dumps([by, metadata]).encode(), digest_size=16)
    digest.update(picture.read_bytes())
    return digest.hexdigest()


def read_kept(file: Path) -> dict[str, dict]:
    """The lines of a prompt's results by key_of, as score_folder keeps them; one that is torn is none."""
    kept = {}
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            entry = json.loads(line)
            if isinstance(entry["record"]["correct"], bool):
                kept[entry["key"]] = entry["record"]
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def score_pictures(
    metadata: dict, paths: list[Path], detect: Callable, name_colors: Callable | None, max_overlap: float = 1.0
) -> list[dict]:
    """The results' lines of a prompt's pictures, in their order. Raises UserError for a picture that is damaged."""
    from functools import partial

    from PIL import Image, ImageOps

    from danceopd.evaluation.geneval.layout import record
    from danceopd.evaluation.geneval.rules import judge, kept

    pictures = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                pictures.append(ImageOps.exif_transpose(opened).convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it and draw it again") from None
    lines = []
    for path, picture, found in zip(paths, pictures, detect(pictures), strict=True):
        objects = {name: kept(found[name], metadata["tag"], max_overlap) for name in found}
        correct, reason = judge(metadata, objects, partial(name_colors, picture) if name_colors else None)
        lines.append(record(path, metadata, objects, correct, reason))
    return lines
