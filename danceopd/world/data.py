"""Makes the picture world training data: drawn on demand, or written out in the form of a user's own data."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.hints import did_you_mean
from danceopd.support.texts import many
from danceopd.world.edits import GLOBAL_KINDS, KINDS, LOCAL_KINDS, sample_edits
from danceopd.world.prompts import PAIR_TASKS, SPLITS, draw, draw_tasks, sample_prompts
from danceopd.world.scene import Scene, render
from danceopd.world.sources import TASK_WEIGHTS

EDIT_KINDS = {"edit": KINDS, "local": LOCAL_KINDS, "global": GLOBAL_KINDS}

CAPABILITIES = ("t2i", "style", *EDIT_KINDS)

_CHUNK = 256  # pictures rendered at a time when writing


class WorldData:
    """Samples of one capability, the same for the same seed; pictures are 32 x 32.

    Only scenes and texts are kept; pictures are rendered when asked for.

    Args:
        capability: One of CAPABILITIES.
        size: Number of samples.
        seed: Of all of them.
        split: "seen" or "held_out".

    Raises:
        UserError: The capability or the split is unknown, or the size is below 1.
    """

    def __init__(self, capability: str, size: int, seed: int, split: str = "seen") -> None:
        if capability not in CAPABILITIES:
            raise UserError(f"the world has no capability {capability!r}{did_you_mean(capability, CAPABILITIES)}")
        if split not in SPLITS:
            raise UserError(f"the world has no split {split!r}{did_you_mean(split, SPLITS)}")
        if size < 1:
            raise UserError(f"a data set of {many(size, 'sample')} is of no use; ask for 1 at least")
        self.capability = capability
        generator = torch.Generator().manual_seed(seed)
        self._before: Scene | None = None
        if capability in EDIT_KINDS:
            kinds = EDIT_KINDS[capability]
            index = torch.tensor([KINDS.index(kind) for kind in kinds])[draw(size, len(kinds), generator)]
            samples, self._before, self._after = sample_edits(index, generator, split=split)
        else:
            tasks = TASK_WEIGHTS if split == "seen" else {task: TASK_WEIGHTS[task] for task in PAIR_TASKS}
            index = draw_tasks(size, tasks, generator)
            style = int(capability == "style")
            samples, self._after = sample_prompts(index, generator, split=split, style=style)
        self._texts = [sample.text for sample in samples]
        self.has_source = self._before is not None

    def __len__(self) -> int:
        return len(self._texts)

    def prompts(self, indices: list[int]) -> list[str]:
        """Returns the prompts of samples."""
        return [self._texts[i] for i in indices]

    def columns(self, indices: list[int]) -> list[dict[str, str]]:
        """Returns what texts take from samples: their prompt alone."""
        return [{"prompt": self._texts[i]} for i in indices]

    def sources(self, indices: list[int]) -> torch.Tensor | None:
        """Returns the pictures before the edit, [n, 3, 32, 32] float32 in [-1, 1].

        None for a capability without any.
        """
        return None if self._before is None else _render(self._before, indices)

    def targets(self, indices: list[int]) -> torch.Tensor:
        """Returns the pictures asked for, [n, 3, 32, 32] float32 in [-1, 1]."""
        return _render(self._after, indices)


def _render(scene: Scene, indices: list[int]) -> torch.Tensor:
    return render(scene[torch.tensor(indices, dtype=torch.int64)])


def write_world(folder: str | Path, capabilities: Iterable[str], size: int, seed: int) -> Path:
    """Writes the samples of WorldData(capability, size, seed) as PNGs and a manifest.

    Args:
        folder: Where to.
        capabilities: Each is written.
        size: Samples of each.
        seed: Of all of them.

    Returns:
        The manifest's path.

    Raises:
        UserError: As WorldData does, before anything is written.
        FileExistsError: The folder has a manifest already.
    """
    return write_sets(Path(folder), (WorldData(capability, size, seed) for capability in dict.fromkeys(capabilities)))


class SampleSet(Protocol):
    """Samples of one capability that can be written out: `capability`, and what WorldData gives of indices."""

    capability: str

    def __len__(self) -> int: ...

    def prompts(self, indices: list[int]) -> list[str]: ...

    def sources(self, indices: list[int]) -> torch.Tensor | None: ...

    def targets(self, indices: list[int]) -> torch.Tensor: ...


def write_sets(folder: Path, sets: Iterable[SampleSet]) -> Path:
    """Writes all samples of sets as PNGs and a manifest, whose path it returns.

    Raises FileExistsError where the folder has a manifest already.
    """
    manifest = folder / "manifest.jsonl"
    if manifest.exists():
        raise FileExistsError(f"{manifest} is there already; remove it or write to another folder")
    sets = list(sets)  # drawn before anything is written
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for data in sets:
        for start in range(0, len(data), _CHUNK):
            lines += _write_chunk(folder, data, list(range(start, min(start + _CHUNK, len(data)))))
    # Last, so that a folder with a manifest is a whole one.
    write_atomic(manifest, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return manifest


def _write_chunk(folder: Path, data: SampleSet, indices: list[int]) -> list[dict[str, str]]:
    """Writes the pictures of some samples; return their manifest lines."""
    ids = [f"{data.capability}-{i:05d}" for i in indices]
    lines = [
        {"id": name, "task": data.capability, "prompt": prompt}
        for name, prompt in zip(ids, data.prompts(indices), strict=True)
    ]
    for role, pictures in (("source", data.sources(indices)), ("target", data.targets(indices))):
        if pictures is None:
            continue
        pixels = ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for line, picture in zip(lines, pixels, strict=True):
            line[f"{role}_image"] = f"images/{line['id']}_{role}.png"
            Image.fromarray(picture).save(folder / line[f"{role}_image"])
    return lines
