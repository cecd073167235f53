"""Writes the names of methods, tasks and numbers."""

import math

from danceopd.support.texts import finite

DASH = "–"

T2I_SOURCE, EDIT_SOURCE = "source_t2i", "source_edit"

LABELS = {
    "base": "Base",
    "source_t2i": "T2I source",
    "source_edit": "Edit source",
    "source_local": "Local-edit source",
    "source_global": "Global-edit source",
    "weight_merge": "Weight merge",
    "joint": "Joint training",
    "off_policy": "Off-policy distillation",
    "diffusion_opd": "DiffusionOPD",
    "flow_opd": "Flow-OPD",
    "flow_opd_attached": "Flow-OPD, advantage not detached",
    "joint_samples": "Joint training, sources' samples",
    "off_policy_samples": "Off-policy, sources' samples",
    "danceopd_fast": "DanceOPD fast",
    "source_style": "Style source",
    "danceopd": "DanceOPD",
    "t2i": "T2I",
    "memory_gib": "Memory (GiB)",
    "cpu": "CPU",
    "gpu": "GPU",
    "torch": "PyTorch",
}

TASKS = {
    "single_object": "Single object",
    "two_object": "Two objects",
    "counting": "Counting",
    "colors": "Colors",
    "position": "Position",
    "color_attr": "Color attribution",
}

KINDS = {
    "subject-add": "Add",
    "subject-remove": "Remove",
    "subject-replace": "Replace",
    "color-alter": "Color",
    "background-change": "Background",
    "style-change": "Style",
}


def label(name: str) -> str:
    """Returns the printed form of a row's, capability's or machine entry's name."""
    words = str(name).replace("_", " ")
    return LABELS.get(name, words[:1].upper() + words[1:])


def _number(tree: object, *path: str) -> float | None:
    """Returns the finite number at the path of keys, or None where it, or a key on the way, is absent."""
    for key in path:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return finite(tree)


def percent(share: float | None) -> str:
    """Writes a share as "96.3 %", cut rather than rounded, so that one just under a bar is never printed as the bar."""
    return DASH if share is None else f"{math.floor(share * 1000 + 1e-9) / 10:.1f} %"


def duration(seconds: float) -> str:
    """Writes seconds: "48 s", "1,234 s (20.6 min)", "7,380 s (2.1 h)"."""
    text = f"{seconds:,.0f} s"
    if seconds >= 7200:
        return f"{text} ({seconds / 3600:.1f} h)"
    return f"{text} ({seconds / 60:.1f} min)" if seconds >= 120 else text
