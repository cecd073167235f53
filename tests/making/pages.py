"""Reads what README and the pages of docs show as code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    """Returns the code of a page that is of one of the languages; "" is of none."""
    return [match[3] for match in BLOCK.finditer(page.read_text("utf-8")) if match[2] in languages]
