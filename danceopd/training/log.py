"""What a run writes while it goes: a JSONL log, TensorBoard scalars, sample grids."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter

PREVIEW_SAMPLES, MODEL_SAMPLES = 8, 4  # of each capability in a sample grid: of the embedded network, of a model
CELL = (96, 512)  # least and largest width of a picture in a grid, in pixels


class RunLog:
    """Appends records to log.jsonl and their numbers to TensorBoard.

    On resuming at `step`, later records of the interrupted run are dropped, so that no step stands twice. silent: write
    nothing, as all ranks but one.
    """

    def __init__(self, folder: Path, step: int, silent: bool = False):
        self.silent = silent
        if silent:
            return
        path = folder / "log.jsonl"
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step] if step else []
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, record: dict) -> None:
        """Add one record; numbers in it, nested or not, go to TensorBoard under their keys."""
        if self.silent:
            return
        self.file.write(json.dumps({"step": step, **record}) + "\n")
        self.file.flush()
        for key, value in _flat(record):
            self.board.add_scalar(key, value, step)

    def close(self) -> None:
        if not self.silent:
            self.file.close()
            self.board.close()


def _whole_lines(path: Path) -> list[str]:
    """The lines of a log that are whole; a killed run may leave half of one."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            lines += [line] if "step" in json.loads(line) else []
        except json.JSONDecodeError:
            continue
    return lines


def _flat(record: dict, prefix: str = ""):
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] to uint8, clipped; NaN becomes black."""
    return ((images.float().nan_to_num(-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def save_grid(path: Path, rows: list[torch.Tensor], scale: int = 3) -> None:
    """Write rows of pictures [N, 3, H, W] in [-1, 1] as one PNG, enlarged by whole pixels."""
    lines = [torch.cat(list(to_uint8(row)), dim=2) for row in rows]
    width = max(line.shape[2] for line in lines)
    lines = [torch.nn.functional.pad(line, (0, width - line.shape[2]), value=255) for line in lines]
    image = Image.fromarray(torch.cat(lines, dim=1).permute(1, 2, 0).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


def labelled_grid(
    rows: Sequence[tuple[str, Sequence[torch.Tensor]]], columns: Sequence[str] = (), least=CELL[0]
) -> bytes:
    """A PNG of rows of pictures [3, H, W] in [-1, 1], each row under its label; columns: their names, above all rows.

    Pictures are as wide as the first, at least `least` and at most 512 pixels.
    """
    cell = min(max(rows[0][1][0].shape[2], least), CELL[1])
    line = max(16, cell // 16)
    font = ImageFont.load_default(line * 0.7)
    heights = [max(round(cell * p.shape[1] / p.shape[2]) for p in pictures) for _, pictures in rows]
    top = line if columns else 0
    image = Image.new("RGB", (cell * max(len(p) for _, p in rows), top + sum(heights) + len(rows) * line), "white")
    draw = ImageDraw.Draw(image)
    for i, name in enumerate(columns):
        draw.text((i * cell + 4, 1), name, "black", font)
    for (label, pictures), tall in zip(rows, heights, strict=True):
        draw.text((4, top + 1), label, "dimgray", font)
        for i, picture in enumerate(pictures):
            shown = Image.fromarray(to_uint8(picture).permute(1, 2, 0).numpy())
            size = (cell, round(cell * shown.height / shown.width))
            enlarged = shown.width < cell  # small pictures by their pixels, large ones smoothly
            method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
            image.paste(shown.resize(size, method), (i * cell, top + line))
        top += line + tall
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
