"""One update's samples: routes, data rows and noise, as a function of the seed and the step alone."""

from dataclasses import dataclass

import torch

from danceopd.conditioning import Conditioning, concatenate
from danceopd.routing import round_robin, route
from danceopd.tokenizer import tokenize


@dataclass
class Batch:
    """B samples of any mixture of capabilities: noise [B, ...], their conditioning, route [B] int64.

    clean [B, ...]: the data's own pictures, where a method asks for them.
    """

    noise: torch.Tensor
    conditioning: Conditioning
    route: torch.Tensor
    clean: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index) -> "Batch":
        clean = None if self.clean is None else self.clean[index]
        return Batch(self.noise[index], self.conditioning[index], self.route[index], clean)

    def to(self, device: torch.device | str) -> "Batch":
        clean = None if self.clean is None else self.clean.to(device)
        return Batch(self.noise.to(device), self.conditioning.to(device), self.route.to(device), clean)


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The generator of one step: a resumed run needs no random state but the step number."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 16 + stream)


def make_conditioning(
    prompts: list[str], source: torch.Tensor | None, text_length: int, guidance_scale: float | None = None
) -> Conditioning:
    """Tokenize prompts and attach their source pictures [B, 3, H, W] (or None)."""
    n = len(prompts)
    scale = None if guidance_scale is None else torch.full((n,), float(guidance_scale))
    return Conditioning(tokenize(prompts, text_length), source, torch.full((n,), source is not None), scale)


def draw_batch(
    data: list,
    weights: list[float],
    batch_size: int,
    text_length: int,
    image_size: int,
    generator: torch.Generator,
    guidance_scales: list[float | None] | None = None,
    in_turn: bool = False,
    prompt_dropout: list[float] | None = None,
    with_clean: bool = False,
) -> Batch:
    """Draw a capability per sample, then a row of its data, then its noise [B, 3, image_size, image_size].

    data: one data set per capability, in the order of the routes; guidance_scales: the student's own scale
    for each capability's samples, or None; in_turn: equal parts of the capabilities whatever their weights;
    prompt_dropout: the share of each capability's prompts that is left empty; with_clean: the data's own pictures.
    """
    routes = route(batch_size, torch.tensor(weights), generator)
    if in_turn:  # drawn all the same, so that a seed's data and noise do not depend on it
        routes = round_robin(batch_size, len(data))
    fraction = torch.rand(batch_size, generator=generator, dtype=torch.float64)
    noise = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
    empty = torch.rand(batch_size, generator=generator, dtype=torch.float64) if prompt_dropout else None
    parts, position, clean = [], [], []
    for m, rows in enumerate(data):
        samples = (routes == m).nonzero()[:, 0]
        if not len(samples):
            continue
        index = (fraction[samples] * len(rows)).long().tolist()
        scale = None if guidance_scales is None else guidance_scales[m]
        prompts = rows.prompts(index)
        if prompt_dropout:
            dropped = (empty[samples] < prompt_dropout[m]).tolist()
            prompts = ["" if drop else prompt for prompt, drop in zip(prompts, dropped, strict=True)]
        if with_clean:
            clean.append(rows.targets(index))
        parts.append(make_conditioning(prompts, rows.sources(index), text_length, scale))
        position.append(samples)
    order = torch.cat(position).argsort()
    return Batch(noise, concatenate(parts)[order], routes, torch.cat(clean)[order] if with_clean else None)
