"""Rasterises the sheet of things from Noto Emoji (Apache-2.0). Needed only to change them.

npm pack @iconify-json/noto && tar xzf iconify-json-noto-*.tgz
pip install resvg-py
python -m danceopd.miniature.build_looks package/icons.json danceopd/miniature/assets/things.png
"""

import argparse
import io
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from danceopd.miniature.looks import BOX, CLASSES, LETTERS, SIZES

EMOJI = {
    "dog": "dog-face",
    "cat": "cat-face",
    "car": "automobile",
    "apple": "red-apple",
    "airplane": "airplane",
    "boat": "sailboat",
    "clock": "mantelpiece-clock",
    "cup": "hot-beverage",
    "banana": "banana",
    "umbrella": "umbrella",
    "elephant": "elephant",
    "pizza": "pizza",
    "broccoli": "broccoli",
    "bus": "oncoming-bus",
    "chair": "chair",
    "donut": "doughnut",
}

_LARGE = 16 * BOX


def icon(icons: dict, name: str) -> Image.Image:
    """Draws one icon large, in the middle of a square that it fills."""
    import resvg_py

    entry = icons["icons"][name]
    width, height = entry.get("width", icons["width"]), entry.get("height", icons["height"])
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{entry["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=_LARGE, height=_LARGE))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = image.crop(image.getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def tile(letter: str) -> Image.Image:
    """Draws a letter, dark on a white tile with a dark rim."""
    image = Image.new("RGBA", (_LARGE, _LARGE))
    draw = ImageDraw.Draw(image)
    rim = _LARGE // 14
    draw.rounded_rectangle((0, 0, _LARGE - 1, _LARGE - 1), _LARGE // 6, (245, 245, 245), (70, 70, 70), rim)
    font = ImageFont.load_default(_LARGE * 0.8)
    middle, ink = (_LARGE / 2, _LARGE / 2), (20, 20, 30)
    draw.text(middle, letter, ink, font, anchor="mm", stroke_width=_LARGE // 24, stroke_fill=ink)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("icons", type=Path, help="icons.json of @iconify-json/noto")
    parser.add_argument("output", type=Path, help="the sheet to write (PNG)")
    args = parser.parse_args()
    icons = json.loads(args.icons.read_text())
    things = [icon(icons, EMOJI[name]) for name in CLASSES] + [tile(letter) for letter in LETTERS]
    sheet = Image.new("RGBA", (BOX * len(things), sum(SIZES)))
    for index, thing in enumerate(things):
        top = 0
        for size in SIZES:
            # Area averaging in premultiplied alpha ("RGBa"), so that edges don't darken.
            small = thing.convert("RGBa").resize((size, size), Image.Resampling.BOX).convert("RGBA")
            sheet.paste(small, (index * BOX, top))
            top += size
    sheet.save(args.output, optimize=True)


if __name__ == "__main__":
    main()
