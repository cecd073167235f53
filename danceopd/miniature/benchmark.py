"""Writes benchmarks of the miniature's world in the forms of GenEval and GEdit-Bench."""

import json
from pathlib import Path

from danceopd.evaluation.gedit.benchmark import KINDS as GEDIT_KINDS
from danceopd.miniature.evaluate import edit_set, t2i_set
from danceopd.miniature.looks import CLASSES, COLORS
from danceopd.miniature.scene import render
from danceopd.support.errors import UserError
from danceopd.support.files import new_folder
from danceopd.support.pictures import to_uint8
from danceopd.world.layout import geneval_metadata


def write_benchmark(folder: Path, seed: int, per_task: int, per_kind: int) -> Path:
    """Writes FOLDER/evaluation_metadata.jsonl, GenEval's, and FOLDER/gedit, a data set as GEdit-Bench's.

    Args:
        folder: A UserError if it is there.
        seed: Of prompts, edits and pictures.
        per_task: Prompts of each task.
        per_kind: Edits of each kind.

    Returns:
        The folder.
    """
    try:
        from datasets import Dataset
    except ImportError:
        raise UserError("GEdit-Bench's form needs datasets: pip install 'danceopd[datasets]'") from None
    from PIL import Image

    prompts, _ = t2i_set(seed, per_task)
    edits, source, _ = edit_set(seed, per_kind)
    pixels = to_uint8(render(source)).permute(0, 2, 3, 1).numpy()
    official = {kind.replace("_", "-"): kind for kind in GEDIT_KINDS}
    columns = {
        "key": [f"{i:05d}" for i in range(len(edits))],
        "task_type": [official[edit.kind] for edit in edits],
        "instruction": [edit.text for edit in edits],
        "instruction_language": ["en"] * len(edits),
        "input_image": [Image.fromarray(picture) for picture in pixels],
    }
    with new_folder(folder) as temporary:
        lines = "".join(json.dumps(geneval_metadata(prompt, CLASSES, COLORS)) + "\n" for prompt in prompts)
        (temporary / "evaluation_metadata.jsonl").write_text(lines, encoding="utf-8")
        Dataset.from_dict(columns).save_to_disk(temporary / "gedit")
    return folder
