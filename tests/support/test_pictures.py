"""Pictures of any mode and orientation are read as RGB; what is none is refused."""

import numpy as np
import pytest
from manifests import picture
from PIL import Image, PngImagePlugin

from danceopd.support.pictures import decode_picture


@pytest.mark.parametrize(
    ("mode", "color", "name", "expected"),
    [
        ("RGB", (10, 20, 30), "p.png", (10, 20, 30)),
        ("L", 77, "p.png", (77, 77, 77)),
        ("1", 1, "p.png", (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), "p.png", (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), "p.png", (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), "p.webp", (204, 204, 204)),
        ("LA", (100, 0), "p.png", (255, 255, 255)),
        ("I;16", 65535, "p.png", (255, 255, 255)),
        ("I;16", 257 * 99, "p.png", (99, 99, 99)),
        ("I;16B", 257 * 99, "p.tiff", (99, 99, 99)),
        ("CMYK", (255, 0, 0, 0), "p.jpg", (0, 255, 255)),
        ("YCbCr", (128, 128, 128), "p.jpg", (128, 128, 128)),
    ],
)
def test_modes(tmp_path, mode, color, name, expected):
    options = {"lossless": True} if name.endswith("webp") else {}
    result = decode_picture(picture(tmp_path / name, (6, 4), color, mode, **options))
    assert result.mode == "RGB"
    assert result.size == (6, 4)
    assert np.abs(np.asarray(result).astype(int) - expected).max() <= (1 if name.endswith("jpg") else 0)


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "p.png")
    image.save(tmp_path / "t.png", transparency=0)
    plain, transparent = (np.asarray(decode_picture(tmp_path / name)) for name in ("p.png", "t.png"))
    assert plain.tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert transparent.tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_exif_orientation(tmp_path):
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "p.png", exif=exif)
    result = decode_picture(tmp_path / "p.png")
    assert result.size == (2, 4)
    assert result.getpixel((1, 0)) == (255, 255, 255)


def test_text_in_a_picture_is_harmless(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "x" * 3_000_000, zip=True)  # expands to more than Pillow allows
    path = picture(tmp_path / "p.png", pnginfo=info)
    with pytest.raises(ValueError, match=r"decoded|not a picture"):
        decode_picture(path)
