"""Looks at GenEval's pictures: Mask2Former finds objects, CLIP names their colours, both through transformers."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation

from danceopd.evaluation.geneval.rules import CLASSES, COLORS, CONFIDENCE, Found, Objects
from danceopd.models.loading import load, load_model, read_json
from danceopd.support.errors import UserError

# How checkpoints of COCO call what the benchmark calls otherwise: COCO itself, and the list that mmdet began with.
NAMES = {
    **{"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"},
    **{"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant"},
    **{"diningtable": "dining table", "tvmonitor": "tv"},
}

SHORT, LONG = 800, 1333  # the sides of a picture are fitted to these, as the source's detector has them

DIVISOR, GREY = 32, 128.0  # sides are filled up to a multiple with grey

DETECTIONS = 100  # the most of a picture, of all classes

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")

BACKGROUND = "#999"

CROPS = 16  # seen by CLIP at a time

Detect = Callable[[list[Image.Image]], list[Objects]]  # RGB pictures -> what is above CONFIDENCE, by class, unsorted

NameColors = Callable[[Image.Image, str, list[Found]], list[str]]


def load_detector(folder: Path, device: torch.device | str, classes: set[str]) -> Detect:
    """Loads a Mask2Former trained on COCO's instances, in float32.

    Args:
        folder: Of save_pretrained, with its preprocessor_config.json.
        device: Where it computes.
        classes: What is asked of it, by the benchmark's names.

    Returns:
        detect(pictures), which finds the objects of each RGB picture by class.

    Raises:
        UserError: The folder is no whole Mask2Former, or does not know a class.
    """
    mean, std = _mean_and_std(folder)
    if read_json(folder / "config.json").get("model_type") != "mask2former":
        raise UserError(f"{folder} is no Mask2Former; give one that was trained on COCO's instances")
    model = load_model(Mask2FormerForUniversalSegmentation, folder, torch.float32).to(device)
    labels = [NAMES.get(name, name) for _, name in sorted(model.config.id2label.items())]
    if unknown := sorted(classes - set(labels)):
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UserError(
            f"{folder} does not know {', '.join(unknown[:5])}{more}: its id2label begins {', '.join(labels[:3])}; "
            "give a detector of COCO's classes, as mask2former-swin-small-coco-instance"
        )

    @torch.inference_mode()
    def detect(pictures: list[Image.Image]) -> list[Objects]:
        found = []
        for _, group in groupby(pictures, key=lambda picture: picture.size):  # padding would change a result
            batch = list(group)
            pixels, size = detector_input(batch, mean, std, device)
            output = model(pixel_values=pixels)
            for picture, logits, masks in zip(
                batch, output.class_queries_logits, output.masks_queries_logits, strict=True
            ):
                found.append(objects_of(logits, masks, pixels.shape[2:], size, picture.size[::-1], labels))
        return found

    return detect


def _mean_and_std(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    config = read_json(folder / "preprocessor_config.json")
    try:
        mean, std = (
            torch.tensor(config[key], dtype=torch.float32).view(3, 1, 1) for key in ("image_mean", "image_std")
        )
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{folder / 'preprocessor_config.json'}: no image_mean and image_std; copy it again") from None
    return mean, std


def detector_input(
    pictures: list[Image.Image], mean: torch.Tensor, std: torch.Tensor, device: torch.device | str
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Makes the detector's input from RGB pictures of one size, as the source makes it.

    The short side is SHORT and the long side at most LONG, by bilinear interpolation between the nearest pixels, in 8
    bits; the rest is grey, at the right and the bottom.

    Returns:
        [B, 3, H, W] float32 with sides that DIVISOR divides, and the (h, w) of it that is picture.
    """
    width, height = pictures[0].size
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    pixels = F.interpolate(pixels.to(device, torch.float32), size, mode="bilinear", align_corners=False).round()
    padding = (0, -size[1] % DIVISOR, 0, -size[0] % DIVISOR)
    pixels = F.pad(pixels, padding, value=GREY)
    return (pixels / 255 - mean.to(device)) / std.to(device), size


def objects_of(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    padded: tuple[int, int],
    size: tuple[int, int],
    original: tuple[int, int],
    labels: list[str],
) -> Objects:
    """Finds the objects of one picture in the network's logits, as Mask2Former's own inference does.

    Of the pairs of query and class the most probable are taken; a pixel is the object's where its logit is positive,
    and the confidence is the class's probability times the mean probability of these pixels.

    Args:
        class_logits: [Q, C + 1], the last of no object.
        mask_logits: [Q, h, w], of the padded input.
        padded, size, original: (height, width) of the input, of the picture in it and of the picture itself.
        labels: Names of the C classes.

    Returns:
        The detections above CONFIDENCE, by class.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    count = probabilities.shape[1]
    best, pair = probabilities.flatten().topk(min(DETECTIONS, probabilities.numel()))
    pair = pair[best > CONFIDENCE]  # a confidence is never above it: no mask of the others is asked
    best = best[: len(pair)]
    things = [(i, labels[int(p) % count]) for i, p in enumerate(pair) if labels[int(p) % count] in CLASSES]
    result: Objects = {}
    for i, label in things:
        logits = mask_logits[pair[i] // count][None, None].float()
        logits = F.interpolate(logits, tuple(padded), mode="bilinear", align_corners=False)[..., : size[0], : size[1]]
        logits = F.interpolate(logits, original, mode="bilinear", align_corners=False)[0, 0]
        mask = logits > 0
        confidence = float(best[i] * (logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6))
        if confidence > CONFIDENCE:
            result.setdefault(label, []).append(Found(box_of(mask), confidence, mask.cpu().numpy()))
    return result


def box_of(mask: torch.Tensor) -> tuple[float, float, float, float]:
    """Returns (x0, y0, x1, y1) around a mask [H, W] bool that is not empty; the end is outside."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def load_colors(folder: Path, device: torch.device | str) -> NameColors:
    """Loads a CLIP that names colours, zero-shot over COLORS, in float32.

    Args:
        folder: Of save_pretrained, with its tokenizer and preprocessor_config.json.
        device: Where it computes.

    Returns:
        name_colors(picture, class, its objects), which gives the colour of each object.

    Raises:
        UserError: The folder is not a whole CLIP.
    """
    if read_json(folder / "config.json").get("model_type") != "clip":
        raise UserError(f"{folder} is no CLIP; give one such as clip-vit-large-patch14")
    model = load_model(CLIPModel, folder, torch.float32).to(device)
    tokenizer = load(AutoTokenizer, folder)
    # The source resizes by Pillow; where torchvision is installed, transformers would by it.
    processor = load(AutoImageProcessor, folder, backend="pil")
    texts: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def directions(name: str) -> torch.Tensor:
        """Returns [10, D]: of each colour the mean direction of its prompts."""
        prompts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(device)
        features = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
        return F.normalize(features.view(len(COLORS), len(TEMPLATES), -1).mean(1), dim=-1)

    @torch.inference_mode()
    def name_colors(picture: Image.Image, name: str, found: list[Found]) -> list[str]:
        if name not in texts:
            texts[name] = directions(name)
        crops, colors = [crop(picture, one) for one in found], []
        for start in range(0, len(crops), CROPS):
            pixels = processor(images=crops[start : start + CROPS], return_tensors="pt")["pixel_values"].to(device)
            features = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
            colors += [COLORS[i] for i in (features @ texts[name].T).argmax(1).tolist()]
        return colors

    return name_colors


def crop(picture: Image.Image, found: Found) -> Image.Image:
    """Cuts out an object's box, with BACKGROUND around its mask."""
    if found.mask is not None:
        blank = Image.new("RGB", picture.size, BACKGROUND)
        picture = Image.composite(picture, blank, Image.fromarray(found.mask))
    return picture.crop(found.box)
