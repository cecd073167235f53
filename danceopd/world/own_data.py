"""Reads a user's own pictures for the embedded network."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from danceopd.data.column_names import column_notes
from danceopd.data.manifest import Row, _first, no_rows, read_manifest
from danceopd.support.errors import UserError
from danceopd.support.pictures import decode_picture, open_picture
from danceopd.support.texts import many
from danceopd.world.tokenizer import count_tokens

CACHE_BYTES = 256 * 2**20  # of decoded pictures that each data set keeps


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Cuts out the middle square and resizes it to size x size; a picture of that size comes back as it is."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), Image.Resampling.LANCZOS)


def load_picture(path: Path, size: int) -> torch.Tensor:
    """Reads one picture as a field takes it: [3, size, size] float32 in [-1, 1]; a UserError if it can't be read."""
    return _pixels(fit_square(open_picture(path), size)) / 127.5 - 1


def _pixels(image: Image.Image) -> torch.Tensor:
    """Returns a picture as [3, S, S] uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class ManifestData:
    """The rows of one capability in a manifest; pictures are decoded when asked for.

    Args:
        path: The manifest.
        capability: The rows' name in it.
        image_size: Sides of the pictures in pixels.
        root: The folder that picture paths start from; the manifest's own if not given.

    Raises:
        UserError: The manifest has problems or no row of the capability, only some rows have a source picture, or one
            has several; and what read_manifest raises.
    """

    def __init__(self, path: str | Path, capability: str, image_size: int, root: str | Path | None = None) -> None:
        self.path, self.capability, self.image_size = Path(path), capability, image_size
        rows, problems = read_manifest(path, root)
        if problems:
            raise UserError(f"{path} has {many(len(problems), 'problem')}: {_first(problems, '; ')}")
        self.rows = [row for row in rows if row.capability == capability]
        if not self.rows:
            raise UserError(no_rows(path, capability, {row.capability for row in rows}))
        if several := [row.line for row in self.rows if len(row.source_images) > 1]:
            raise UserError(
                f"{self.path}: {len(several)} rows of {self.capability!r} have several source pictures "
                f"(line {_first(several, ', ')}); the embedded network takes one"
            )
        self.has_source = self._all_or_none("source_image")
        self._cache: dict[Path, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def notes(self, text_length: int) -> list[str]:
        """Says which columns are passed over, and how many prompts a network of so many tokens cuts."""
        cut = [f"line {row.line}" for row in self.rows if count_tokens(row.prompt) > text_length]
        are = f"of {many(len(self), 'prompt')} {many(len(cut), 'is', 'are')}"
        said = f"{are} longer than the network's {text_length} tokens and cut there"
        return [*column_notes(self.rows), *([f"{said}: {_first(cut, ', ')}"] if cut else [])]

    def prompts(self, indices: list[int]) -> list[str]:
        """Returns the prompts of rows."""
        return [self.rows[i].prompt for i in indices]

    def columns(self, indices: list[int]) -> list[dict[str, str]]:
        """Returns what texts take from rows: all their columns of text."""
        return [self.rows[i].columns for i in indices]

    def sources(self, indices: list[int]) -> torch.Tensor | None:
        """Reads the pictures to edit, [n, 3, S, S] float32 in [-1, 1]; None without any.

        A UserError for a damaged one.
        """
        return self._pictures("source_image", indices) if self.has_source else None

    def targets(self, indices: list[int]) -> torch.Tensor | None:
        """Reads the pictures asked for, [n, 3, S, S] float32 in [-1, 1]; None without any.

        A UserError for a damaged one.

        On-policy training asks for none, so only here is it an error that some rows have one and some not.
        """
        return self._pictures("target_image", indices) if self._all_or_none("target_image") else None

    def _all_or_none(self, column: str) -> bool:
        """Returns whether the rows have this picture; raises UserError where some have it and some don't."""
        without = [row.line for row in self.rows if self._path(row, column) is None]
        if without and len(without) < len(self.rows):
            raise UserError(
                f"{self.path}: {len(without)} of {len(self.rows)} rows of {self.capability!r} have no "
                f"{column} (line {_first(without, ', ')}); give all of them one, or none"
            )
        return not without

    def _pictures(self, column: str, indices: list[int]) -> torch.Tensor:
        batch = torch.empty(len(indices), 3, self.image_size, self.image_size)
        for place, index in enumerate(indices):
            batch[place] = self._load(self.rows[index], column)
        return batch / 127.5 - 1

    @staticmethod
    def _path(row: Row, column: str) -> Path | None:
        return next(iter(row.source_images), None) if column == "source_image" else row.target_image

    def _load(self, row: Row, column: str) -> torch.Tensor:
        """Reads one picture as [3, S, S] uint8, from memory if it was kept there."""
        path = self._path(row, column)
        if path in self._cache:
            return self._cache[path]
        try:
            image = fit_square(decode_picture(path), self.image_size)
        except ValueError as error:
            raise UserError(f"{self.path}, line {row.line}: {column} {path}: {error}") from error
        pixels = _pixels(image)
        if (len(self._cache) + 1) * pixels.numel() <= CACHE_BYTES:
            self._cache[path] = pixels
        return pixels
