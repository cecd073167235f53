"""Reads pictures safely, and writes grids of them."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from danceopd.support.errors import UserError
from danceopd.support.paths import near_path

CELL = (96, 512)  # least and largest width of a picture in a grid, in pixels


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Converts pictures in [-1, 1] to uint8 on the CPU, clipped; NaN becomes black."""
    return ((images.float().nan_to_num(-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def save_grid(path: Path, rows: list[torch.Tensor], scale: int = 3) -> None:
    """Writes rows of pictures [N, 3, H, W] in [-1, 1] as one PNG, enlarged by whole pixels."""
    lines = [torch.cat(list(to_uint8(row)), dim=2) for row in rows]
    width = max(line.shape[2] for line in lines)
    lines = [torch.nn.functional.pad(line, (0, width - line.shape[2]), value=255) for line in lines]
    image = Image.fromarray(torch.cat(lines, dim=1).permute(1, 2, 0).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


def png(picture: torch.Tensor) -> bytes:
    """Returns a picture [3, H, W] in [-1, 1] as a PNG's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(picture).permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def labelled_grid(
    rows: Sequence[tuple[str, Sequence[torch.Tensor]]], columns: Sequence[str] = (), least=CELL[0]
) -> bytes:
    """Draws pictures in rows as a PNG; they are as wide as the first, at least `least` and at most 512 pixels.

    Args:
        rows: A label, and pictures [3, H, W] in [-1, 1], for each row.
        columns: Names of the columns, above all rows, wrapped where a cell is too narrow.
        least: Pixels.

    Returns:
        The PNG's bytes.
    """
    cell = min(max(rows[0][1][0].shape[2], least), CELL[1])
    line = max(16, cell // 16)
    font = ImageFont.load_default(line * 0.7)
    heights = [max(_height(cell, *p.shape[1:]) for p in pictures) for _, pictures in rows]
    names = [_wrapped(name, font, cell - 8) for name in columns]
    top = line * max((name.count("\n") + 1 for name in names), default=0)
    image = Image.new("RGB", (cell * max(len(p) for _, p in rows), top + sum(heights) + len(rows) * line), "white")
    draw = ImageDraw.Draw(image)
    for i, name in enumerate(names):
        draw.text((i * cell + 4, 1), name, "black", font)
    for (label, pictures), tall in zip(rows, heights, strict=True):
        draw.text((4, top + 1), label, "dimgray", font)
        for i, picture in enumerate(pictures):
            shown = Image.fromarray(to_uint8(picture).permute(1, 2, 0).numpy())
            size = (cell, _height(cell, shown.height, shown.width))
            enlarged = shown.width < cell  # small pictures by their pixels, large ones smoothly
            method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
            image.paste(shown.resize(size, method), (i * cell, top + line))
        top += line + tall
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _height(cell: int, height: int, width: int) -> int:
    """Returns how high a picture stands in a cell of this width: a pixel at least."""
    return max(1, round(cell * height / width))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Breaks a text between words so that its lines fit a width in pixels, as far as its words do."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


# Only plain raster formats: Pillow would hand others (EPS) to an external interpreter.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

MAX_PIXELS = 64_000_000

WHITENED = "whitened"  # in the info of a decoded picture: whether any of it was transparent

SERIES = ("PNG", "WEBP", "GIF", "TIFF")  # formats that may hold several pictures of which none is the first by right


def decode_picture(file: Path | BinaryIO) -> Image.Image:
    """Decodes a picture of any mode, turned upright, as 8-bit sRGB; transparency becomes white.

    Colours of an embedded ICC profile are converted to sRGB; a profile that is damaged or of another kind of pixels is
    not looked at, as in browsers.

    Args:
        file: A path, or a file opened to read bytes.

    Raises:
        ValueError: It can't be read to its end, is animated, or has more than MAX_PIXELS; with the reason.
    """
    with _opened(file) as image:
        if image.format in SERIES and getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"holds {image.n_frames} pictures, not one; save the one that is meant")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def open_picture(path: Path) -> Image.Image:
    """Decodes a picture that a user named, as `decode_picture` does; a UserError where there is none to be decoded."""
    if not path.is_file():
        raise UserError(f"no picture at {path}{near_path(path)}")
    try:
        return decode_picture(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def check_picture_file(file: Path) -> None:
    """Checks a picture's header and the checksums in it, without decoding it; raises as decode_picture."""
    with _opened(file) as image:
        image.verify()


@contextmanager
def _opened(file: Path | BinaryIO) -> Iterator[Image.Image]:
    """Opens a picture in one of FORMATS, no larger than MAX_PIXELS; a ValueError for all that goes wrong with it."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} is over {MAX_PIXELS / 1e6:.0f} megapixels")
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"not a picture, or damaged (readable are {', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"far over {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller") from error
    except Exception as error:  # on damaged files decoders raise almost anything
        raise ValueError(f"can't be decoded ({error}); save it again") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts a picture of any mode to 8-bit sRGB; a ValueError for pixels whose range isn't known."""
    profile = image.info.get("icc_profile")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of unknown range")
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 8 instead of scaling them
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have more than 16 bits")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))  # 65535 / 255 is 257
    alpha = None
    if image.has_transparency_data:
        alpha = (image if "A" in image.getbands() else image.convert("RGBA")).getchannel("A")
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    image = _to_srgb(image, profile)
    if alpha:
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=alpha)
        white.info[WHITENED] = alpha.getextrema()[0] < 255
        return white
    return image


# The kind of pixels that a profile is of, by Pillow's mode.
PROFILED = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts a picture in one of PROFILED from its ICC profile's colours to sRGB."""
    try:
        if profile:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if own.profile.xcolor_space.strip() == PROFILED[image.mode]:
                return ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        pass
    return image if image.mode == "RGB" else image.convert("RGB")
