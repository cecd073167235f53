"""Names what ships of the miniature: its pipeline folder, and a LoRA for each source."""

from pathlib import Path

from danceopd.support.paths import MINIATURE, draws_miniature, shipped
from danceopd.support.texts import parse_object

PIPELINE = MINIATURE / "pipeline"  # a folder for diffusers' from_pretrained

SOURCES = MINIATURE / "sources"  # a folder for each source, for load_lora_weights


def shipped_sources() -> dict[str, Path]:
    """Returns the LoRA's file of each source that ships, by name."""
    return {path.parent.name: path for path in sorted(SOURCES.glob("*/pytorch_lora_weights.safetensors"))}


def trained_at(model: Path | None) -> dict[str, int]:
    """Returns the "resolution" and "max_sequence_length" that the miniature was trained at; nothing of other models."""
    if not draws_miniature(model):
        return {}
    return parse_object((shipped(model) / "miniature.json").read_text(encoding="utf-8"))
