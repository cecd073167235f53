"""Samples whose prompts and pictures were encoded before (danceopd.data.prepare): training reads nothing else."""

import copy
import json
from collections import Counter
from pathlib import Path

import torch

from danceopd.conditioning import Conditioning, concatenate
from danceopd.data.cache import Cache
from danceopd.data.manifest import hint
from danceopd.errors import UserError


class PreparedData:
    """The rows of one capability, from the file that `danceopd data prepare` wrote into its cache.

    sizes: {(height, width) in pixels: rows of it}. Raises UserError for a file of no use, one
    without rows of the capability, or rows of which only some have a source picture.
    """

    def __init__(self, path: Path | str, capability: str):
        self.path, self.capability, self.cache = Path(path), capability, Cache(Path(path).parent)
        try:
            lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            self.head, rows = lines[0], lines[1:]
            self.rows = [row for row in rows if row["capability"] == capability]
        except FileNotFoundError:
            raise UserError(f"no prepared rows at {self.path}; make them by `danceopd data prepare`") from None
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self.path} is damaged ({error}); run `danceopd data prepare` again") from None
        if not self.rows:
            known = hint(capability, {row["capability"] for row in rows})
            raise UserError(f"{self.path} has no rows of {capability!r}; {known}")
        counts = {len(row["sources"]) for row in self.rows}
        if len(counts) > 1:
            raise UserError(
                f"{self.path}: rows of {capability!r} have {sorted(counts)} source pictures; give all as many"
            )
        self.has_source = counts != {0}
        self._check_cache()
        self.sizes = dict(Counter(tuple(row["size"]) for row in self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def of_size(self, size: tuple[int, int]) -> "PreparedData":
        """The rows of one picture size, on the same cache."""
        part = copy.copy(self)
        part.rows = [row for row in self.rows if tuple(row["size"]) == size]
        return part

    def condition(self, indices: list[int], without_prompt: list[bool]) -> Conditioning:
        """What the samples are conditioned on; those without a prompt get the empty one's encoding."""
        return concatenate([self._one(self.rows[i], empty) for i, empty in zip(indices, without_prompt, strict=True)])

    def targets(self, indices: list[int]) -> torch.Tensor | None:
        """[n, C, h, w]: the latents of the pictures asked for, or None where rows have none."""
        if any(row["target"] is None for row in self.rows):
            return None
        return torch.stack([self.cache.read(self.rows[i]["target"])["latents"] for i in indices])

    def empty_prompt(self) -> dict[str, torch.Tensor]:
        """The empty prompt's encoding, of one sample without source pictures."""
        return self.cache.read(self.head["negative_prompts"][""])

    def _one(self, row: dict, empty: bool) -> Conditioning:
        own = {**self.head["negative_prompts"], **row.get("negative_prompts", {})}[""]
        prompt = self._prompt(own if empty else row["prompt"])
        sources = tuple(self.cache.read(key)["latents"][None] for key in row["sources"])
        conditioning = Conditioning(prompt, sources or None, torch.tensor([bool(sources)]))
        if self.head.get("prompts_see_pictures"):
            conditioning.empty_prompt = self._prompt(own)
        return conditioning

    def _prompt(self, key: str) -> dict[str, torch.Tensor]:
        return {name: value[None] for name, value in self.cache.read(key).items()}

    def _check_cache(self) -> None:
        """Every entry that a row names is there; whether it is whole shows when it is read."""
        named = {key for row in self.rows for key in (row["prompt"], row["target"], *row["sources"]) if key}
        named |= {key for row in self.rows for key in row.get("negative_prompts", {}).values()}
        missing = [key for key in named | set(self.head["negative_prompts"].values()) if key not in self.cache]
        if missing:
            raise UserError(
                f"{self.path}: {len(missing)} of its entries are not in the cache {self.path.parent}; "
                "run `danceopd data prepare` again"
            )


def common_sizes(data: list[PreparedData]) -> dict[tuple[int, int], int]:
    """The picture sizes of which every data set has rows, and how many rows there are of each.

    A batch is of one size and any mixture of capabilities. Raises UserError if there is none.
    """
    shared = set.intersection(*(set(rows.sizes) for rows in data))
    if not shared:
        raise UserError(
            "no picture size is common to all capabilities, so that no batch can mix them: "
            + "; ".join(f"{rows.capability} has {', '.join(f'{h} x {w}' for h, w in rows.sizes)}" for rows in data)
        )
    return {size: sum(rows.sizes[size] for rows in data) for size in sorted(shared)}
