"""Names what ships of the miniature: its pipeline folder, and a LoRA for each source."""

from pathlib import Path

from danceopd.support.paths import MINIATURE

PIPELINE = MINIATURE / "pipeline"  # a folder for diffusers' from_pretrained

SOURCES = MINIATURE / "sources"  # a folder for each source, for load_lora_weights


def shipped_sources() -> dict[str, Path]:
    """Returns the LoRA's file of each source that ships, by name."""
    return {path.parent.name: path for path in sorted(SOURCES.glob("*/pytorch_lora_weights.safetensors"))}
