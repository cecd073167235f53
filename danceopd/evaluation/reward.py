"""Scores pictures by models of CLIP's architecture, and says how much of the gap to a source a student closed.

A reward is a function (pictures, prompts) -> [B] float32, the larger the better.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from danceopd.evaluation.geneval.layout import Drawn, read_pictures
from danceopd.models import loading
from danceopd.support.bars import bar
from danceopd.support.errors import UserError
from danceopd.support.paths import near_path
from danceopd.support.pictures import decode_picture

Reward = Callable[[Sequence[Image.Image], Sequence[str]], torch.Tensor]

# The layers of the aesthetic predictor on CLIP ViT-L/14 whose name ends in linearMSE: five in a row, and no activation
# between them; the places left out are dropout.
LINEAR_MSE = ("0", "2", "4", "6", "7")


def clip_similarity(folder: Path, device="cpu", dtype: torch.dtype = torch.float32) -> tuple[Reward, float]:
    """Loads the cosine similarity of picture and prompt by a CLIP; prompts are cut to the model's length.

    Args:
        folder: A CLIPModel's, with its processor.
        device, dtype: Of its weights.

    Returns:
        The similarity as a reward, and the model's logit scale.

    Raises:
        UserError: The folder is missing or incomplete.
    """
    from transformers import CLIPModel

    processor = _processor(folder)
    model = loading.load_model(CLIPModel, folder, dtype).to(device)
    length = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def similarity(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        inputs = processor(text=list(prompts), images=[p.convert("RGB") for p in pictures], **options).to(device)
        output = model(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})
        return (output.image_embeds.float() * output.text_embeds.float()).sum(-1).cpu()  # both are of unit length

    return similarity, float(model.logit_scale.detach().float().exp())


def clip_score(folder: Path, device="cpu", dtype: torch.dtype = torch.float32) -> Reward:
    """Loads 100 * max(cosine, 0), torchmetrics' CLIPScore (arXiv 2104.08718 has a factor of 2.5 in its place)."""
    similarity, _ = clip_similarity(folder, device, dtype)
    return lambda pictures, prompts: 100 * similarity(pictures, prompts).clamp(min=0)


def pick_score(folder: Path, device="cpu", dtype: torch.dtype = torch.float32) -> Reward:
    """Loads PickScore: the logit scale times the cosine (arXiv 2305.01569)."""
    similarity, scale = clip_similarity(folder, device, dtype)
    return lambda pictures, prompts: scale * similarity(pictures, prompts)


def hps_score(folder: Path, device="cpu", dtype: torch.dtype = torch.float32) -> Reward:
    """Loads HPSv2's score, the cosine (arXiv 2306.09341), by its weights converted to a CLIPModel's folder."""
    return clip_similarity(folder, device, dtype)[0]


def aesthetic_score(folder: Path, head: Path, device="cpu", dtype: torch.dtype = torch.float32) -> Reward:
    """Loads an aesthetic head on the normalised picture embeddings of a CLIP; prompts are not looked at.

    Args:
        folder: The CLIP's.
        head: A safetensors file, as read_head takes it.
        device, dtype: Of the weights.

    Raises:
        UserError: The two do not fit.
    """
    from transformers import CLIPModel

    layers, processor = read_head(head).to(device), _processor(folder)
    model = loading.load_model(CLIPModel, folder, dtype).to(device)
    width = model.config.projection_dim
    if layers[0].in_features != width:
        raise UserError(f"{head} takes {layers[0].in_features} features, and the CLIP in {folder} gives {width}")

    @torch.inference_mode()
    def score(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        inputs = processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt")
        seen = model.vision_model(pixel_values=inputs["pixel_values"].to(device, dtype)).pooler_output
        embeds = nn.functional.normalize(model.visual_projection(seen).float(), dim=-1)
        return layers(embeds)[:, 0].cpu()

    return score


def read_head(path: Path) -> nn.Sequential:
    """Reads the linear layers of an aesthetic head in float32: one, or the five of a linearMSE head, with any prefix.

    Raises:
        UserError: The file is of another kind, is damaged, or holds other layers.
    """
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path}: a head must be a safetensors file, since others may run code when read; convert it: save_file("
            'torch.load(FILE, weights_only=True), "head.safetensors")'
        )
    if not path.is_file():
        raise UserError(f"there is no file {path}{near_path(path)}")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors, copy it again: {error}") from None
    named = {re.sub(r"^.*?((\d+\.)?(weight|bias))$", r"\1", name): tensor.float() for name, tensor in tensors.items()}
    layers: list[nn.Linear] = []
    for prefix in [""] if "weight" in named else [f"{place}." for place in LINEAR_MSE]:
        weight, bias = named.pop(f"{prefix}weight", None), named.pop(f"{prefix}bias", None)
        inside = layers[-1].out_features if layers else None
        if weight is None or bias is None or weight.dim() != 2 or inside not in (None, weight.shape[1]):
            named[prefix] = None
            break
        layers.append(nn.Linear(weight.shape[1], weight.shape[0]))
        layers[-1].weight.data, layers[-1].bias.data = weight, bias
    if named or layers[-1].out_features != 1:
        raise UserError(
            f"{path} is no aesthetic head: one linear layer, or layers {', '.join(LINEAR_MSE)} without activations, to "
            f"one number; it holds {', '.join(sorted(tensors)[:4])}, ..."
        )
    return nn.Sequential(*layers).requires_grad_(False)


def _processor(folder: Path):
    from transformers import CLIPProcessor

    return loading.load(CLIPProcessor, folder)


def check_prompt(metadata: dict, where: str) -> dict:
    """Checks that a line has a prompt, all that a reward asks for, and returns it; a UserError begins with `where`."""
    if not isinstance(metadata, dict) or not isinstance(metadata.get("prompt"), str):
        raise UserError(f'{where}: no text under "prompt"; draw the folder again')
    return metadata


def reward_of(drawn: list[Drawn], reward: Reward, batch_size: int = 16, name: str = "reward") -> np.ndarray:
    """Returns the mean reward of each prompt's pictures, [prompts] float64; a UserError for one that cannot be read."""
    pairs = [(path, entry.metadata["prompt"]) for entry in drawn for path in entry.pictures.values()]
    values: list[torch.Tensor] = []
    for start in bar(range(0, len(pairs), batch_size), name, unit="batch"):
        part = pairs[start : start + batch_size]
        values.append(reward([_decode(path) for path, _ in part], [prompt for _, prompt in part]))
    each = torch.cat(values).double().numpy()
    if not np.isfinite(each).all():
        raise UserError(f"{name} is not finite for {pairs[int(np.argmin(np.isfinite(each)))][0]}; try --dtype float32")
    ends = np.cumsum([len(entry.pictures) for entry in drawn])
    return np.array([part.mean() for part in np.split(each, ends[:-1])])


def _decode(path: Path) -> Image.Image:
    try:
        return decode_picture(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Gap:
    """How far a student went from base to source.

    Attributes:
        share: 0 is none of the way, 1 is all of it.
        low, high: The ends of its interval.
        open_gap: Whether the source's own lead over the base is above zero in as many resamples.
    """

    share: float
    low: float
    high: float
    open_gap: bool


def gap_closed(
    base: np.ndarray,
    source: np.ndarray,
    student: np.ndarray,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Gap:
    """Works out (mean student - mean base) / (mean source - mean base), with a paired percentile bootstrap.

    Args:
        base, source, student: [prompts], of the same prompts in the same order; a resample draws prompts, and all
            three with them.
        resamples: Their number.
        confidence: Of the interval.
        seed: Of the resamples.

    Returns:
        The share and its interval. Where open_gap is false the share says nothing: the source is hardly better.
    """
    values = np.stack([base, source, student]).astype(np.float64)
    generator, n = np.random.default_rng(seed), values.shape[1]
    means = np.empty((3, resamples))
    for start in range(0, resamples, 500):  # [3, 500, prompts] at a time
        size = min(500, resamples - start)
        means[:, start : start + size] = values[:, generator.integers(0, n, (size, n))].mean(-1)
    tail = (1 - confidence) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = _share(means)
        share = float(_share(values.mean(-1)))
    low, high = (
        np.quantile(shares[np.isfinite(shares)], [tail, 1 - tail]) if np.isfinite(shares).any() else [np.nan] * 2
    )
    lead = np.quantile(means[1] - means[0], tail)
    return Gap(share, float(low), float(high), bool(lead > 0))


def _share(means: np.ndarray) -> np.ndarray:
    base, source, student = means
    return (student - base) / (source - base)


def evaluate_reward(
    rewards: dict[str, Callable[[], Reward]],
    student: Path,
    base: Path | None = None,
    source: Path | None = None,
    batch_size: int = 16,
) -> dict:
    """Scores pictures by several rewards.

    Args:
        rewards: By name, what loads each, so that one is in memory at a time.
        student, base, source: Folders of GenEval's layout.
        batch_size: Pictures at a time.

    Returns:
        {reward: {"student": mean, ...}}; with base and source also their means and "gap", the share closed.

    Raises:
        UserError: The folders' prompts are not the same.
    """
    folders = {"base": base, "source": source, "student": student}
    drawn = {name: read_pictures(at, check=check_prompt) for name, at in folders.items() if at is not None}
    prompts = {name: {entry.index: entry.metadata["prompt"] for entry in entries} for name, entries in drawn.items()}
    for name, there in prompts.items():
        both = there.keys() | prompts["student"].keys()
        if other := [index for index in both if there.get(index) != prompts["student"].get(index)]:
            raise UserError(
                f"{folders[name]} and {student} were not drawn for the same prompts: {len(other)} differ, such as "
                f"{min(other):05d}; draw both of one --metadata"
            )
    results = {}
    for reward_name, load in rewards.items():
        reward = load()
        values = {
            name: reward_of(entries, reward, batch_size, f"{reward_name} of {name}") for name, entries in drawn.items()
        }
        results[reward_name] = {name: float(value.mean()) for name, value in values.items()}
        if len(values) == 3:
            gap = gap_closed(values["base"], values["source"], values["student"])
            results[reward_name]["gap"] = {"share": gap.share, "low": gap.low, "high": gap.high, "open": gap.open_gap}
    return results


def format_rewards(results: dict) -> str:
    """Writes the results as a table for the terminal."""
    names = [name for name in ("base", "source", "student") if any(name in row for row in results.values())]
    lines = ["reward".ljust(12) + "".join(name.rjust(10) for name in names)]
    for reward, row in results.items():
        line = reward.ljust(12) + "".join(f"{row[name]:10.4f}" for name in names)
        if gap := row.get("gap"):
            line += f"   gap closed {100 * gap['share']:.1f} % [{100 * gap['low']:.1f}, {100 * gap['high']:.1f}]"
            line += "" if gap["open"] else "   but the source is not clearly better than the base"
        lines.append(line)
    return "\n".join(lines)
