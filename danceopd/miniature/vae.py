"""Trains the miniature's VAE: pictures of 64 x 64 to latents of 16 x 8 x 8 and back."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2
from torch import nn

from danceopd.miniature.looks import BACKGROUNDS, EMPTY, IMAGE_SIZE, PAINTS, PLACES, SIZES, STYLES, THINGS, TONES
from danceopd.miniature.scene import Scene, blank, put, render
from danceopd.world.stages import generator_of, run_stage

CONFIG = {
    "block_out_channels": (16, 32, 64, 96),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": IMAGE_SIZE,
    "mid_block_add_attention": False,
}

STEPS, BATCH, LEARNING_RATE, SEED = 3_500, 16, 4e-3, 11

KL_WEIGHT = 1e-4  # of the mean over latents


def any_scene(n: int, generator: torch.Generator) -> Scene:
    """Draws scenes of all looks, more of them photos in the natural tone."""

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape or (n,), generator=generator)

    def seldom(high: int) -> torch.Tensor:
        return torch.where(torch.rand(n, generator=generator) < 0.35, draw(high), 0)

    scene, count = blank(n), 1 + draw(PLACES)
    scene.background, scene.tone, scene.style = draw(len(BACKGROUNDS)), seldom(len(TONES)), seldom(len(STYLES))
    used = torch.arange(PLACES)[None] < count[:, None]
    scene.things = torch.where(used, draw(len(THINGS), n, PLACES), EMPTY)
    natural = torch.rand(n, PLACES, generator=generator) < 0.4
    scene.paints = torch.where(natural, 0, draw(len(PAINTS), n, PLACES))
    scene.sizes = draw(len(SIZES), n, PLACES)
    put(scene, used, generator)
    return scene


def loss_of(vae: AutoencoderKLFlux2, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns the mean squared error of the pictures [B, 3, 64, 64] plus KL_WEIGHT times the latents' divergence."""
    posterior = vae.encode(pictures).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    decoded = vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]
    divergence = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
    return (decoded - pictures).square().mean() + KL_WEIGHT * divergence


def train(folder: Path) -> AutoencoderKLFlux2:
    """Trains the VAE, going on from what the folder holds, and sets the spread of its latents."""
    torch.manual_seed(SEED)
    vae = AutoencoderKLFlux2(**CONFIG).to(memory_format=torch.channels_last)

    def loss(step: int) -> torch.Tensor:
        generator = generator_of(SEED, step)
        pictures = render(any_scene(BATCH, generator)).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):  # for speed; the weights stay in float32
            return loss_of(vae, pictures, generator)

    vae = run_stage(
        folder,
        "vae",
        vae,
        loss,
        steps=STEPS,
        learning_rate=LEARNING_RATE,
        decay=0.7,
        matrices=lambda _, p: min(p.shape[:2]) > 3,
        products=torch.bfloat16,
    )
    return normalised(vae)


@torch.no_grad()
def normalised(vae: AutoencoderKLFlux2) -> AutoencoderKLFlux2:
    """Rounds the weights to bfloat16, as they are kept, and sets the batch norm to the latents' mean and variance, with
    which the pipelines normalise them."""
    vae.to(torch.bfloat16).to(torch.float32)
    latents = vae.encode(render(any_scene(512, generator_of(SEED, STEPS)))).latent_dist.mean
    patches = nn.functional.pixel_unshuffle(latents, 2)
    vae.bn.running_mean.copy_(patches.mean((0, 2, 3)))
    vae.bn.running_var.copy_(patches.var((0, 2, 3)))
    vae.bn.to(torch.bfloat16).to(torch.float32)
    return vae
