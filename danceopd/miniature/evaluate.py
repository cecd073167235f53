"""Scores of the miniature's networks, by what they draw through the whole pipeline: GenEval's tasks and edits."""

import torch

from danceopd.evaluation.statistics import standard_error
from danceopd.miniature.edits import KINDS, Edit, sample_edits
from danceopd.miniature.prompts import sample_prompts
from danceopd.miniature.scene import Scene
from danceopd.world.prompts import PAIR_TASKS, TASKS, Prompt


def t2i_set(seed: int, per_task: int, split: str = "seen", style: int = 0) -> tuple[list[Prompt], Scene]:
    """Draws the evaluation's prompts, `per_task` of each task in turn, and one right scene for each."""
    tasks = TASKS if split == "seen" else PAIR_TASKS
    index = torch.tensor([TASKS.index(task) for task in tasks]).repeat(per_task)
    return sample_prompts(index, torch.Generator().manual_seed(seed), split=split, style=style)


def edit_set(
    seed: int, per_kind: int, kinds: tuple[str, ...] = KINDS, half: bool = False
) -> tuple[list[Edit], Scene, Scene]:
    """Draws the evaluation's instructions, `per_kind` of each kind in turn, the scenes to edit and what is expected."""
    index = torch.tensor([KINDS.index(kind) for kind in kinds]).repeat(per_kind)
    return sample_edits(index, torch.Generator().manual_seed(seed + 1), half=half)


def summary(values: torch.Tensor, labels: list[str], mean_name: str) -> dict:
    """Returns the mean of the groups' means under its name, its standard error, and each group's mean."""
    groups: dict[str, list[float]] = {}
    for label, value in zip(labels, values.tolist(), strict=True):
        groups.setdefault(label, []).append(value)
    means = {label: sum(v) / len(v) for label, v in groups.items()}
    error = standard_error([torch.tensor(v) for v in groups.values()])
    return {mean_name: sum(means.values()) / len(means), "standard_error": error, **means}
