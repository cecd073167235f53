"""Rasterises the sheet of things from Noto Emoji (Apache-2.0). Needed only to change them.

npm pack @iconify-json/noto && tar xzf iconify-json-noto-*.tgz
pip install resvg-py
python -m danceopd.miniature.build_looks package/icons.json danceopd/miniature/assets/things.png
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from danceopd.miniature.looks import BOX, CLASSES, LETTERS, SIZES
from danceopd.world.build_sprites import EMOJI as WORLD_EMOJI
from danceopd.world.build_sprites import draw_icon, shrink

EMOJI = WORLD_EMOJI | {
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
    things = [draw_icon(icons, EMOJI[name], _LARGE) for name in CLASSES] + [tile(letter) for letter in LETTERS]
    sheet = Image.new("RGBA", (BOX * len(things), sum(SIZES)))
    for index, thing in enumerate(things):
        top = 0
        for size in SIZES:
            sheet.paste(shrink(thing, size), (index * BOX, top))
            top += size
    sheet.save(args.output, optimize=True)


if __name__ == "__main__":
    main()
