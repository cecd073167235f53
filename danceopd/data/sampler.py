"""One update's samples: routes, data rows and noise, as a function of the seed and the step alone."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from danceopd.conditioning import Conditioning, concatenate
from danceopd.routing import round_robin, route
from danceopd.tokenizer import tokenize


@dataclass
class Batch:
    """B samples of any mixture of capabilities: noise [B, ...], their conditioning, route [B] int64.

    clean [B, ...]: the data's own pictures, where a method asks for them; sigmas [N + 1]: as in Group.
    """

    noise: torch.Tensor
    conditioning: Conditioning
    route: torch.Tensor
    clean: torch.Tensor | None = None
    sigmas: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index) -> "Batch":
        clean = None if self.clean is None else self.clean[index]
        return Batch(self.noise[index], self.conditioning[index], self.route[index], clean, self.sigmas)

    def to(self, device: torch.device | str) -> "Batch":
        clean = None if self.clean is None else self.clean.to(device)
        conditioning, route = self.conditioning.to(device), self.route.to(device)
        return Batch(self.noise.to(device), conditioning, route, clean, self.sigmas)


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The generator of one step: a resumed run needs no random state but the step number."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 16 + stream)


def make_conditioning(prompts: list[str], source: torch.Tensor | None, text_length: int) -> Conditioning:
    """Tokenize prompts and attach their source pictures [B, 3, H, W] (or None)."""
    return Conditioning(tokenize(prompts, text_length), source, torch.full((len(prompts),), source is not None))


@dataclass(frozen=True)
class Group:
    """Samples that may share a batch: one data set a capability, their latents' shape, and how many rows there are.

    sigmas: the noise levels of a rollout of this shape, where they are the model's and not the configuration's.
    """

    data: list
    shape: tuple[int, ...]
    rows: int
    sigmas: torch.Tensor | None = None


@dataclass(frozen=True)
class Samples:
    """Where batches come from. condition(data, indices, without_prompt): what rows of a data set are conditioned on."""

    groups: list[Group]
    condition: Callable[[object, list[int], list[bool]], Conditioning]


def embedded_samples(data: list, text_length: int, image_size: int) -> Samples:
    """For the embedded network: pictures of one size, prompts tokenized as they are drawn."""

    def condition(rows, indices, without_prompt):
        prompts = ["" if empty else p for p, empty in zip(rows.prompts(indices), without_prompt, strict=True)]
        return make_conditioning(prompts, rows.sources(indices), text_length)

    return Samples([Group(data, (3, image_size, image_size), sum(map(len, data)))], condition)


def draw_batch(
    samples: Samples,
    weights: list[float],
    batch_size: int,
    generator: torch.Generator,
    guidance_scales: list[float | None] | None = None,
    in_turn: bool = False,
    prompt_dropout: list[float] | None = None,
    with_clean: bool = False,
) -> Batch:
    """Draw a group by its rows, a capability per sample, then a row of its data, then its noise [B, ...].

    weights, guidance_scales, prompt_dropout: one of each capability, in the order of the routes: how often it is
    drawn; the student's own scale for its samples, or None; the share of its prompts that is left empty. in_turn:
    equal parts of the capabilities whatever their weights. with_clean: the data's own pictures.
    """
    group = samples.groups[0]
    if len(samples.groups) > 1:
        rows = torch.tensor([float(g.rows) for g in samples.groups])
        group = samples.groups[int(torch.multinomial(rows, 1, generator=generator))]
    routes = route(batch_size, torch.tensor(weights), generator)
    if in_turn:  # drawn all the same, so that a seed's data and noise do not depend on it
        routes = round_robin(batch_size, len(group.data))
    fraction = torch.rand(batch_size, generator=generator, dtype=torch.float64)
    noise = torch.randn(batch_size, *group.shape, generator=generator)
    empty = torch.rand(batch_size, generator=generator, dtype=torch.float64) if prompt_dropout else None
    parts, position, clean = [], [], []
    for m, rows in enumerate(group.data):
        drawn = (routes == m).nonzero()[:, 0]
        if not len(drawn):
            continue
        indices = (fraction[drawn] * len(rows)).long().tolist()
        without = (empty[drawn] < prompt_dropout[m]).tolist() if prompt_dropout else [False] * len(drawn)
        part = samples.condition(rows, indices, without)
        if guidance_scales is not None and guidance_scales[m] is not None:
            part.guidance_scale = torch.full((len(drawn),), float(guidance_scales[m]))
        if with_clean:
            clean.append(rows.targets(indices))
        parts.append(part)
        position.append(drawn)
    order = torch.cat(position).argsort()
    pictures = torch.cat(clean)[order] if with_clean else None
    return Batch(noise, concatenate(parts)[order], routes, pictures, group.sigmas)
