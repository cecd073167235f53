"""Pictures of any mode and orientation are read as RGB; what is none is refused."""

import struct

import numpy as np
import pytest
from manifests import picture
from PIL import Image, PngImagePlugin

from danceopd.support.pictures import check_picture_file, decode_picture


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


def profile_of(space: str, primaries: dict, gamma: float) -> bytes:
    """A matrix profile of ICC version 2, or of grey where it has no primaries, by the format's definition."""

    def fixed(*values):
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    name = b"by hand\0"
    tags = {"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78)}
    tags |= {"cprt": b"text\0\0\0\0none\0", "wtpt": b"XYZ \0\0\0\0" + fixed(*D50)}
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    tags |= {f"{c}XYZ": b"XYZ \0\0\0\0" + fixed(*xyz) for c, xyz in primaries.items()}
    tags |= {f"{c}TRC": curve for c in primaries or "k"}
    table, data, at = b"", b"", 128 + 4 + 12 * len(tags)
    for key, value in tags.items():
        padded = value + bytes(-len(value) % 4)
        table += key.encode() + struct.pack(">II", at + len(data), len(value))
        data += padded
    head = struct.pack(">I4xI4s4s4s", at + len(data), 0x02100000, b"mntr", space.encode(), b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(*D50)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + data


D50 = (0.9642, 1.0, 0.8249)
WIDE = {"r": (0.60974, 0.31111, 0.01947), "g": (0.20528, 0.62567, 0.06087), "b": (0.14919, 0.06322, 0.74457)}
# Of linear sRGB from XYZ under D50 (Bradford), as Lindbloom gives it.
TO_SRGB = [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]


def shown_as(color, primaries, gamma):
    """The sRGB number of a colour under a matrix profile, in float64."""
    linear = (np.array(color) / 255) ** gamma
    xyz = np.stack([primaries[c] for c in "rgb"], axis=1) @ linear
    srgb = np.clip(np.array(TO_SRGB) @ xyz, 0, 1)
    return 255 * np.where(srgb <= 0.0031308, 12.92 * srgb, 1.055 * srgb ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("name", ["p.png", "p.tiff", "p.webp"])
def test_an_icc_profile_is_converted_to_srgb(tmp_path, name):
    color, wide = (150, 130, 90), profile_of("RGB ", WIDE, 563 / 256)
    options = {"lossless": True} if name.endswith("webp") else {}
    path = picture(tmp_path / name, (6, 4), color, icc_profile=wide, **options)
    seen = np.asarray(decode_picture(path)).astype(int)
    expected = shown_as(color, WIDE, 563 / 256)
    assert np.abs(expected - color).max() > 8
    assert np.abs(seen - expected).max() <= 2


def test_profiles_of_other_modes(tmp_path):
    wide, linear = profile_of("RGB ", WIDE, 563 / 256), profile_of("GRAY", {}, 1.0)
    grey = decode_picture(picture(tmp_path / "l.png", (6, 4), 55, "L", icc_profile=linear))
    assert np.abs(np.asarray(grey).astype(int) - 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)).max() <= 2
    half = decode_picture(picture(tmp_path / "a.png", (6, 4), (150, 130, 90, 128), "RGBA", icc_profile=wide))
    over_white = (shown_as((150, 130, 90), WIDE, 563 / 256) * 128 + 255 * 127) / 255
    assert np.abs(np.asarray(half) - over_white).max() <= 2
    palette = Image.new("RGB", (6, 4), (150, 130, 90)).quantize(4)
    palette.save(tmp_path / "pal.png", icc_profile=wide)
    seen = np.asarray(decode_picture(tmp_path / "pal.png")) - shown_as((150, 130, 90), WIDE, 563 / 256)
    assert np.abs(seen).max() <= 2


@pytest.mark.parametrize(
    "profile", [b"no profile at all", profile_of("GRAY", {}, 1.0), profile_of("RGB ", WIDE, 2)[:90]]
)
def test_a_profile_that_cannot_be_used_is_not_looked_at(tmp_path, profile):
    path = picture(tmp_path / "p.png", (6, 4), (10, 200, 30), icc_profile=profile)
    assert decode_picture(path).getpixel((0, 0)) == (10, 200, 30)


def test_sixteen_bits_are_rounded_as_they_are_scaled(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (64, 64), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "p.png")
    expected = np.round(values.astype(float) / 257)
    assert (np.asarray(decode_picture(tmp_path / "p.png"))[..., 0] == expected).all()


@pytest.mark.parametrize("name", ["p.gif", "p.png", "p.webp", "p.tiff"])
def test_several_pictures_in_one_file_are_refused(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="holds 3 pictures"):
        decode_picture(tmp_path / name)
    frames[0].save(tmp_path / name)
    assert decode_picture(tmp_path / name).size == (8, 8)


def test_a_phones_photo_with_a_second_picture_behind_it(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "p.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert decode_picture(tmp_path / "p.jpg").getpixel((0, 0))[0] > 250


@pytest.mark.parametrize("read", [decode_picture, check_picture_file])
def test_what_is_refused_by_the_header(tmp_path, read):
    (tmp_path / "p.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n%%EOF\n")
    with pytest.raises(ValueError, match="readable are PNG"):
        read(tmp_path / "p.png")
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="over 64 megapixels"):
        read(tmp_path / "large.png")
    data = picture(tmp_path / "whole.png", (64, 64)).read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="decoded"):
        read(tmp_path / "half.png")


def test_transparency_over_white_is_rounded_exactly(tmp_path):
    value, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    Image.fromarray(np.stack([value, value, value, alpha], -1), "RGBA").save(tmp_path / "p.png")
    share = alpha.astype(float) / 255
    expected = np.rint(value * share + 255 * (1 - share))
    assert (np.asarray(decode_picture(tmp_path / "p.png"))[..., 0] == expected).all()
