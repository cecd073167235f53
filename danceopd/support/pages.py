"""Makes self-contained HTML pages: one environment of templates, and pictures as data URIs."""

import base64
import io
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image


def render(template: Path, **values) -> str:
    """Renders a template: what it prints is escaped, and a name that it does not get is an error."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = unbroken
    text = environment.get_template(template.name).render(**values)
    return text.encode(errors="replace").decode()  # a file's name need not be UTF-8


def unbroken(text: str) -> str:
    """Keeps each number of a text on one line with its unit."""
    return re.sub(r"(\d) (?=%|(?:s|min|h)\b)", "\\1\N{NO-BREAK SPACE}", text)


def data_uri(picture: Image.Image, kind: str = "png", **options) -> str:
    """Returns a picture as a data URI; kind: "png" or "jpeg"; options: of Pillow's writer."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
