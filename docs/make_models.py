"""Writes the table of docs/models.md from the families' modules: python docs/make_models.py, or make docs."""

import math
import re
from pathlib import Path

import diffusers

from danceopd.models.backbones import FAMILIES, family_module
from danceopd.models.lora_files import loads_loras
from danceopd.models.lora_layouts import layouts_of
from danceopd.models.lora_names import PUBLISHED

PAGE = Path(__file__).with_name("models.md")
TABLE = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end of table -->)", re.DOTALL)
HEAD = ["pipeline", "text to image", "edit", "references", "prompts", "an adapter in plain diffusers"]
HEAD += ["layers' names in LoRA files", "layouts of `danceopd export`", "base"]
EDITS = ("Kontext", "Edit", "Omni")  # in the names of pipelines that edit, where those of a family differ


def rows() -> list[list[str]]:
    """Lists the pipelines of every family."""
    found = []
    for family in FAMILIES:
        backbone = family_module(family)
        for name in backbone.PIPELINES:
            own = any(word in name for word in EDITS)
            apart = any(word in other for other in backbone.PIPELINES for word in EDITS)
            edits = backbone.MAX_SOURCES > 0 and (own or not apart)
            alone = name not in getattr(backbone, "EDIT_ONLY", ())
            count = "any number" if math.isinf(backbone.MAX_SOURCES) else str(backbone.MAX_SOURCES)
            cls, network = getattr(diffusers, name), network_of(backbone)
            loads = "`load_lora_weights`" if loads_loras(cls) else "`load_lora_adapter` of its network"
            if not hasattr(network, "load_lora_adapter"):
                loads = "none: merged, by `danceopd export --merge`"
            draws = "yes" if alone else "in training; the pipeline needs a picture"
            padding = "as long as they are" if backbone.PROMPTS_HAVE_MASKS else "padded to one length"
            names = "diffusers' and published" if network.__name__ in PUBLISHED else "diffusers'"
            row = [name, draws, "yes" if edits else "no", count if edits else "", padding, loads, names]
            found.append([*row, ", ".join(layouts_of(family)), backbone.BASE])
    return found


def network_of(backbone) -> type:
    """Finds the class of a family's transformer or UNet among the names of its module."""
    named = (value for name, value in vars(backbone).items() if re.search(r"(Transformer2D|UNet)Model$", name))
    return next(named)


def table() -> str:
    """Writes the table."""
    lines = [HEAD, ["---"] * len(HEAD), *rows()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page() -> str:
    """Returns the page with the table as it is now."""
    return TABLE.sub(lambda _: table(), PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
