"""Scores a folder of GenEval's pictures, and goes on where an earlier scoring stopped."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from danceopd.evaluation.geneval import models
from danceopd.evaluation.geneval.layout import in_json, read_pictures, record, write_results
from danceopd.evaluation.geneval.rules import Found, Objects, check_picture, kept
from danceopd.models.fingerprint import identity
from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.pictures import decode_picture
from danceopd.support.ranks import ALONE, Ranks, agreed
from danceopd.support.texts import many, parse_json


class Reader(Protocol):
    """Reads pictures whose every object is known, without a network.

    `name` stands for all that a verdict depends on; `detect` and `name_colors` are as models.load_detector and
    models.load_colors return them.
    """

    name: str

    def detect(self, pictures: list[Image.Image]) -> list[Objects]: ...

    def name_colors(self, picture: Image.Image, name: str, found: list[Found]) -> list[str]: ...


# Long: a third of it says what its arguments are.
def score_folder(
    folder: Path,
    results: Path,
    detector: Path | Reader,
    clip: Path | None = None,
    *,
    metadata: list[dict] | None = None,
    samples: int | None = None,
    max_overlap: float = 1.0,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
    progress: Callable = lambda items: items,
) -> list[dict]:
    """Scores the pictures of a folder and writes the results in their order.

    Everything that a user can mend is said before the first picture is looked at. What is scored is kept beside the
    results, in results.scored, a file a prompt and a line a picture: after a kill the same call goes on from there.

    Args:
        folder: Pictures in GenEval's layout.
        results: The file to write, a line a picture.
        detector: The folder of a Mask2Former that was trained on COCO's instances, or what reads pictures without one.
        clip: The folder of a CLIP, which names colours.
        metadata: The prompts that must be there; not checked if not given.
        samples: Pictures that each prompt must have; at least one if not given.
        max_overlap: Of two boxes of a class that share more of their union, only the more confident one counts.
        device: Where both models compute.
        ranks: The processes that share the prompts; every one calls this.
        progress: Wraps the list of this rank's prompts (tqdm fits).

    Returns:
        The results' lines, of all ranks.

    Raises:
        UserError: Pictures, prompts or models are missing, damaged or do not fit.
    """
    keep, keys, scored = results.with_suffix(".scored"), {}, {}  # the keys and lines of this rank's pictures

    def prepare():
        prompts = read_pictures(folder, metadata, samples)
        clauses = [c for p in prompts for key in ("include", "exclude") for c in p.metadata.get(key, [])]
        by_model = isinstance(detector, Path)
        if by_model and any("color" in clause for clause in clauses) and not clip:
            raise UserError("some prompts ask for colours; give --clip, for example a folder of clip-vit-large-patch14")
        by = json.dumps([identity(detector) if by_model else detector.name, clip and identity(clip), max_overlap])
        for prompt in prompts[ranks.rank :: ranks.size]:
            keys.update({path: key_of(path, prompt.metadata, by) for path in prompt.pictures.values()})
            there = read_kept(keep / f"{prompt.index:05d}.jsonl")
            for path in prompt.pictures.values():
                if keys[path] in there:
                    scored[path] = there[keys[path]] | {"filename": in_json(path)}
        if len(scored) == len(keys):
            return prompts, None, None
        if not by_model:
            return prompts, detector.detect, detector.name_colors
        detect = models.load_detector(detector, device, {clause["class"] for clause in clauses})
        return prompts, detect, models.load_colors(clip, device) if clip else None

    prompts, detect, name_colors = agreed(ranks, prepare)
    if ranks.rank == 0 and len({len(prompt.pictures) for prompt in prompts}) > 1:
        print("warning: prompts have different numbers of pictures; those with more weigh more in their tag")
    before = sum(ranks.gather(len(scored)))

    def score():
        for prompt in progress(prompts[ranks.rank :: ranks.size]):
            paths = list(prompt.pictures.values())
            if left := [path for path in paths if path not in scored]:
                lines = score_pictures(prompt.metadata, left, detect, name_colors, max_overlap)
                scored.update(zip(left, lines, strict=True))
                done = [json.dumps({"key": keys[path], "record": scored[path]}) + "\n" for path in paths]
                write_atomic(keep / f"{prompt.index:05d}.jsonl", "".join(done).encode())
        return scored

    everything: dict[Path, dict] = {}
    for part in ranks.gather(agreed(ranks, score)):
        everything |= part
    records = [everything[path] for prompt in prompts for path in prompt.pictures.values()]
    if ranks.rank == 0:
        write_results(results, records)
        print(f"{many(len(records) - before, 'picture')} scored, {before} were before: {folder}")
    return records


def key_of(picture: Path, metadata: dict, by: str) -> str:
    """Returns a digest of all that a verdict depends on: the picture's bytes, its prompt, and what looks at it."""
    digest = hashlib.blake2b(json.dumps([by, metadata]).encode(), digest_size=16)
    digest.update(picture.read_bytes())
    return digest.hexdigest()


def read_kept(file: Path) -> dict[str, dict]:
    """Reads the results of a prompt that score_folder kept, by key_of; a line that is torn is left out."""
    lines = {}
    for line in file.read_bytes().split(b"\n") if file.is_file() else []:
        try:
            entry = parse_json(line)
            if isinstance(entry["record"]["correct"], bool) and isinstance(entry["key"], str):
                lines[entry["key"]] = entry["record"]
        except (ValueError, KeyError, TypeError):
            continue
    return lines


def score_pictures(
    metadata: dict, paths: list[Path], detect: Callable, name_colors: Callable | None, max_overlap: float = 1.0
) -> list[dict]:
    """Scores the pictures of a prompt; returns their lines of the results. Raises UserError for a damaged
    picture.
    """
    pictures = []
    for path in paths:
        try:
            pictures.append(decode_picture(path))
        except ValueError as error:
            raise UserError(f"{path} cannot be used ({error}); remove it and draw it again") from None
    lines = []
    for path, picture, found in zip(paths, pictures, detect(pictures), strict=True):
        objects = {name: kept(found[name], metadata["tag"], max_overlap) for name in found}
        correct, reason = check_picture(metadata, objects, partial(name_colors, picture) if name_colors else None)
        lines.append(record(path, metadata, objects, correct, reason))
    return lines
