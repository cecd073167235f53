"""Writes samples of the miniature's world as a user's own data: PNGs and a manifest."""

from collections.abc import Iterable
from pathlib import Path

import torch

from danceopd.miniature.edits import ALL, GLOBAL_KINDS, HALF, KINDS, LOCAL_KINDS, sample_edits
from danceopd.miniature.looks import LOOKS
from danceopd.miniature.prompts import PLAIN_TASKS, draw_tasks, sample_looks, sample_prompts
from danceopd.miniature.scene import Scene, render
from danceopd.support.errors import UserError
from danceopd.support.hints import did_you_mean
from danceopd.world.data import write_sets
from danceopd.world.prompts import draw

EDIT_KINDS = {"edit": KINDS, "local": LOCAL_KINDS, "global": GLOBAL_KINDS}

_HALVES = tuple(f"{name}-half" for name in EDIT_KINDS)

# The place of each says which seeds its training data have.
CAPABILITIES = ("t2i", *tuple(LOOKS)[:4], *EDIT_KINDS, *_HALVES, *tuple(LOOKS)[4:])


def sample(capability: str, n: int, generator: torch.Generator) -> tuple[list[str], Scene | None, Scene]:
    """Draws n samples of a capability: prompts, the scenes to edit (None for text-to-image), and the right scenes.

    Args:
        capability: One of CAPABILITIES; "-half" edits show only the classes of miniature.edits.HALF.
        n: Number of samples.
        generator: Draws all.

    Raises:
        UserError: There is no such capability.
    """
    if capability not in CAPABILITIES:
        raise UserError(f"the miniature has no capability {capability!r}{did_you_mean(capability, CAPABILITIES)}")
    name, _, half = capability.partition("-")
    if name in EDIT_KINDS:
        kinds = EDIT_KINDS[name]
        index = torch.tensor([KINDS.index(kind) for kind in kinds])[draw(n, len(kinds), generator)]
        edits, before, after = sample_edits(index, generator, classes=HALF if half else ALL)
        return [edit.text for edit in edits], before, after
    if name in LOOKS:
        prompts, scene = sample_looks([name], draw_tasks(n, generator, PLAIN_TASKS), generator)
    else:
        prompts, scene = sample_prompts(draw_tasks(n, generator), generator)
    return [prompt.text for prompt in prompts], None, scene


class MiniatureData:
    """Samples of one capability, the same for the same seed; only scenes and texts are kept.

    Args:
        capability: One of CAPABILITIES.
        size: Number of samples.
        seed: Of all of them.
    """

    def __init__(self, capability: str, size: int, seed: int) -> None:
        self.capability = capability
        self._texts, self._before, self._after = sample(capability, size, torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self._texts)

    def prompts(self, indices: list[int]) -> list[str]:
        """Returns the prompts of samples."""
        return [self._texts[i] for i in indices]

    def sources(self, indices: list[int]) -> torch.Tensor | None:
        """Returns the pictures before the edit, [n, 3, 64, 64] float32 in [-1, 1]; None without any."""
        return None if self._before is None else render(self._before[torch.tensor(indices)])

    def targets(self, indices: list[int]) -> torch.Tensor:
        """Returns the pictures asked for, [n, 3, 64, 64] float32 in [-1, 1]."""
        return render(self._after[torch.tensor(indices)])


def write_miniature(folder: Path, capabilities: Iterable[str], size: int, seed: int) -> Path:
    """Writes the samples of MiniatureData(capability, size, seed) as PNGs and a manifest, whose path it returns.

    Raises:
        UserError: There is no such capability.
        FileExistsError: The folder has a manifest already.
    """
    return write_sets(folder, (MiniatureData(name, size, seed) for name in dict.fromkeys(capabilities)))
