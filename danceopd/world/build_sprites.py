"""Rasterises the sprite sheet from Noto Emoji (Apache-2.0). Needed only to change the objects.

npm pack @iconify-json/noto && tar xzf iconify-json-noto-*.tgz
pip install resvg-py
python -m danceopd.world.build_sprites package/icons.json danceopd/world/assets/sprites.png
"""

import argparse
import io
import json
from pathlib import Path

from PIL import Image

from danceopd.world.sprites import CLASSES, SPRITE_SIZE

EMOJI = {
    "dog": "dog-face",
    "cat": "cat-face",
    "car": "automobile",
    "apple": "red-apple",
    "airplane": "airplane",
    "boat": "sailboat",
    "clock": "mantelpiece-clock",
    "cup": "hot-beverage",
}


def draw_icon(icons: dict, name: str, size: int) -> Image.Image:
    """Draws one icon, cut to what is drawn, in the middle of a square that it fills; size: of its canvas."""
    import resvg_py

    icon = icons["icons"][name]
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = image.crop(image.getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Shrinks a square by area, in premultiplied alpha ("RGBa"), so that edges don't darken."""
    return image.convert("RGBa").resize((size, size), Image.Resampling.BOX).convert("RGBA")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("icons", type=Path, help="icons.json of @iconify-json/noto")
    parser.add_argument("output", type=Path, help="the sprite sheet to write (PNG)")
    args = parser.parse_args()
    icons = json.loads(args.icons.read_text())
    sheet = Image.new("RGBA", (SPRITE_SIZE * len(CLASSES), SPRITE_SIZE))
    for index, name in enumerate(CLASSES):
        large = draw_icon(icons, EMOJI[name], 16 * SPRITE_SIZE)
        sheet.paste(shrink(large, SPRITE_SIZE), (index * SPRITE_SIZE, 0))
    sheet.save(args.output, optimize=True)


if __name__ == "__main__":
    main()
