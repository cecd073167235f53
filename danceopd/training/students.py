"""A diffusers model's student: what it begins as, and a whole transformer that is trained and saved."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from uuid import uuid4

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import nn

from danceopd.checkpoint import sync, write_atomic
from danceopd.conditioning import Conditioning
from danceopd.config import Config
from danceopd.errors import UserError
from danceopd.fields import by_sources
from danceopd.lora import Lora, LoraStudent, average
from danceopd.weights import Weights, mean, of_folder, plus, save_pretrained

# ---------------------------------------------------------------------------------------------- all weights


class FullStudent(nn.Module):
    """A trainable transformer of its own: student(latents, sigma, conditioning) -> velocity, as a LoraStudent.

    transformer: in float32, changed into one that is trained; velocity: the backbone's; embedded_guidance: of all its
    samples, where the transformer takes one; autocast: the dtype that its products run in, None for the weights' own.
    """

    def __init__(
        self,
        transformer: nn.Module,
        velocity: Callable[..., torch.Tensor],
        embedded_guidance: float | None = None,
        autocast: torch.dtype | None = None,
    ):
        super().__init__()
        self.transformer = transformer.requires_grad_(True)
        transformer.takes = torch.float32
        self.embedded_guidance, self.autocast, self._velocity = embedded_guidance, autocast, velocity

    @property
    def blocks(self) -> nn.ModuleList:
        """The products over tokens in the blocks, without those that modulate: what Muon is for."""
        lists = [name for name, module in self.transformer.named_children() if isinstance(module, nn.ModuleList)]
        return nn.ModuleList(
            module
            for name, module in self.transformer.named_modules()
            if isinstance(module, nn.Linear)
            and name.split(".")[0] in lists
            and not any(part in name for part in ("norm", "mod"))
        )

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        def ask(latents, sigma, conditioning, sources, _):
            return self._velocity(
                self.transformer, latents, sigma, conditioning.prompt, sources, conditioning.embedded_guidance
            )

        autocast = torch.autocast(latents.device.type, self.autocast) if self.autocast else nullcontext()
        with autocast:
            return by_sources(ask, latents, sigma, conditioning.embedding(self.embedded_guidance))


def start_weights(config: Config, loras: dict[str, Lora], own: Callable[[str], Weights]) -> Weights:
    """What the transformer that a full student begins as holds.

    loras: what each source on the model's own transformer adds to it, by its name; own: the weights of any other
    source. Raises UserError for weights that cannot be loaded, and for a merge of transformers that differ.
    """
    start, base = config.student.init_from, of_folder(config.model)
    if start == "base":
        return base
    if start != "merge":
        return plus(base, loras[start]) if start in loras else own(start)
    parts = {f"source {name}": (1, own(name)) for name in config.sources if name not in loras}
    if loras:
        parts = {"model": (len(loras), plus(base, average(list(loras.values()))))} | parts
    (first, (_, one)), *others = parts.items()
    for name, (_, other) in others:
        check_alike(first, one.shapes, name, other.shapes)
    return mean([(number / len(config.sources), weights) for number, weights in parts.values()])


def check_alike(one: str, shapes: Mapping[str, torch.Size], other: str, others: Mapping[str, torch.Size]) -> None:
    """Raises UserError where two networks have not the same tensors, so that no mean of them can be taken."""
    differing = sorted(key for key in shapes.keys() | others.keys() if shapes.get(key) != others.get(key))
    if differing:
        raise UserError(
            f"{one} and {other} differ in shape ({differing[0]} and {len(differing) - 1} more), so that they have no "
            "mean; begin as base, or as one of them"
        )


def save_transformer(transformer: nn.Module, weights: Weights, folder: Path) -> None:
    """Write a transformer as its save_pretrained does, over an older one: a process that dies leaves either whole.

    transformer: of diffusers, on any device; weights: what it holds, in float32. The shards get names of their own each
    time, and the index that names them is replaced in one move. Raises UserError where the disk is full or the folder
    read-only; what was there before stays good.
    """
    temporary = folder / ".new"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_pretrained(transformer, weights, temporary, torch.float32)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write {folder}: {error}; what was written there before is still good. Make room or choose another "
            "training.output_dir, then run the same command again"
        ) from error
    index = temporary / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
    else:  # one file, which diffusers reads through an index too
        size = 4 * sum(shape.numel() for shape in weights.shapes.values())
        names = dict.fromkeys(weights.shapes, SAFETENSORS_WEIGHTS_NAME)
        content = {"metadata": {"total_size": size}, "weight_map": names}
    tag = uuid4().hex[:8]
    names = {old: f"{tag}-{old}" for old in sorted(set(content["weight_map"].values()))}
    for old, new in names.items():
        sync(temporary / old)
        os.replace(temporary / old, folder / new)
    content["weight_map"] = {key: names[old] for key, old in content["weight_map"].items()}
    write_atomic(folder / "config.json", (temporary / "config.json").read_bytes())
    write_atomic(folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(content, indent=2, sort_keys=True).encode())
    shutil.rmtree(temporary)
    for file in folder.glob("*.safetensors"):
        if file.name not in names.values():
            file.unlink()


# ------------------------------------------------------------------------------------------------- adapters


def start_lora(config: Config, loras: dict[str, Lora], layers: list[str]) -> Lora:
    """What a LoRA student on these layers begins as; empty for the base.

    loras: each source's, by its name; one of the base alone is empty. Raises UserError that names the layers which
    the student does not have.
    """
    start = config.student.init_from
    if start == "base":
        return {}
    lora = average(list(loras.values())) if start == "merge" else loras[start]
    missing = [name for name in lora if name not in layers]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{start} changes {', '.join(missing[:3])}{more}, which student.lora.targets has not; add the ends of "
            "these names to the targets, or begin as base"
        )
    return lora


@torch.no_grad()
def begin(student: LoraStudent, lora: Lora) -> None:
    """Make an adapter add what lora adds, as nearly as its rank can: exactly where lora's is no larger.

    What of the rank is not needed stays as it was, random in A and zero in B, so that it can be trained.
    """
    for name, factors in lora.items():
        a, b = truncated(*factors, student.rank)
        own_a, own_b = student.factors_of(name)
        own_a[: len(a)] = a.to(own_a)
        own_b.zero_()[:, : len(a)] = (b * (student.rank / student.alpha)).to(own_b)


def truncated(a: torch.Tensor, b: torch.Tensor, scale: float, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [r, in], B [out, r]) in float32 whose product B A is the best of rank r <= `rank` of scale b a.

    a [n, in], b [out, n]; with n <= rank themselves, scaled. The SVD is of the n x n product of their triangular
    parts; r is smaller where the product's rank is.
    """
    a, b = a.float(), b.float() * scale
    if len(a) <= rank:
        return a, b
    q_a, r_a = torch.linalg.qr(a.mT)
    q_b, r_b = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    r = min(rank, int((s > 1e-6 * s[0]).sum()))  # the rest is rounding
    root = s[:r].sqrt()
    return (root[:, None] * vh[:r]) @ q_a.mT, q_b @ (u[:, :r] * root)
