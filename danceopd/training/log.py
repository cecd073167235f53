"""What a run writes while it goes: a JSONL log, TensorBoard scalars, sample grids."""

import json
from pathlib import Path

import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Appends records to log.jsonl and their numbers to TensorBoard.

    On resuming at `step`, later records of the interrupted run are dropped, so that no step stands twice.
    """

    def __init__(self, folder: Path, step: int):
        path = folder / "log.jsonl"
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step] if step else []
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, record: dict) -> None:
        """Add one record; numbers in it, nested or not, go to TensorBoard under their keys."""
        self.file.write(json.dumps({"step": step, **record}) + "\n")
        self.file.flush()
        for key, value in _flat(record):
            self.board.add_scalar(key, value, step)

    def close(self) -> None:
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
