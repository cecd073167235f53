"""GEdit-Bench in small."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from danceopd.evaluation.gedit.benchmark import PAPER_KINDS
from danceopd.evaluation.gedit.draw import Editing

datasets = pytest.importorskip("datasets")


SIZE, EDITING = 32, Editing(resolution=32, num_inference_steps=1)


def columns(kinds=PAPER_KINDS, languages=("en", "cn")) -> dict:
    """Rows of the benchmark's columns: one of each kind in each language, pictures of several shapes."""
    rows = [(kind, language) for kind in kinds for language in languages]
    rng = np.random.default_rng(0)
    sizes = [(20 + 3 * i, 40 - 2 * i) for i in range(len(rows))]
    pictures = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    return {
        "key": [f"{i:04x}" for i in range(len(rows))],
        "task_type": [kind for kind, _ in rows],
        "instruction": [
            ("make it red" if language == "en" else "变成红色") + f" {i}" for i, (_, language) in enumerate(rows)
        ],
        "instruction_language": [language for _, language in rows],
        "input_image": pictures,
        "input_image_raw": [picture.resize((picture.width * 2, picture.height * 2)) for picture in pictures],
        "Intersection_exist": [i % 3 > 0 for i in range(len(rows))],
    }


def save(folder: Path, **changed) -> Path:
    made = {name: column for name, column in {**columns(), **changed}.items() if column is not None}
    datasets.Dataset.from_dict(made).save_to_disk(folder)
    return folder
