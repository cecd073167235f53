"""Writes the picture world's evaluation in GenEval's layout, so that runs can be compared picture by picture."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from danceopd.evaluation.geneval.layout import prompt_folder, record, write_results
from danceopd.support.files import new_folder
from danceopd.support.pictures import to_uint8
from danceopd.world.prompts import RELATIONS, Prompt
from danceopd.world.sprites import CLASSES, COLORS, NATURAL


def geneval_metadata(prompt: Prompt, classes: Sequence[str] = CLASSES, colors: Sequence[str] = COLORS) -> dict:
    """Returns a prompt, whose objects are indices into classes and colors, as a line of GenEval's metadata."""
    include = [
        {"class": classes[cls], "count": prompt.count, **({} if color == NATURAL else {"color": colors[color]})}
        for cls, color in prompt.objects
    ]
    if prompt.relation >= 0:  # of the first to the second, which GenEval names before
        include = [include[1], {**include[0], "position": [RELATIONS[prompt.relation], 0]}]
    exclude = [{"class": include[0]["class"], "count": prompt.count + 1}] if prompt.task == "counting" else []
    return {"tag": prompt.task, "include": include, **({"exclude": exclude} if exclude else {}), "prompt": prompt.text}


def write_pictures(folder: Path, prompts: list[Prompt], images: torch.Tensor, correct: torch.Tensor) -> None:
    """Writes a new folder with pictures and results.jsonl; equal prompts' pictures are numbered.

    Args:
        folder: A UserError if it is there.
        prompts: One a picture.
        images: [B, 3, H, W] in [-1, 1].
        correct: [B] bool.
    """
    pictures: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        pictures.setdefault(json.dumps(geneval_metadata(prompt)), []).append(i)
    pixels, records = to_uint8(images).permute(0, 2, 3, 1).numpy(), []
    with new_folder(folder) as temporary:
        for index, (line, places) in enumerate(pictures.items()):
            place = prompt_folder(temporary, index)
            (place / "samples").mkdir(parents=True)
            (place / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
            for number, i in enumerate(places):
                path = place / "samples" / f"{number:04d}.png"
                Image.fromarray(pixels[i]).save(path)
                named = folder / path.relative_to(temporary)
                records.append(record(named, json.loads(line), {}, bool(correct[i]), ""))
        write_results(temporary / "results.jsonl", records)
