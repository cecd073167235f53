"""Merges several LoRAs of one model into one by distillation, from prompts alone, and says what came of it."""

from danceopd.tools.merge_loras.given import Options
from danceopd.tools.merge_loras.merge import Merged, merge_loras

__all__ = ["Merged", "Options", "merge_loras"]
