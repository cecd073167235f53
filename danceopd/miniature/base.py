"""Trains the miniature's base: transformer and text encoder together, by flow matching on pictures and edits."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import nn

from danceopd.core.schedule import shift_sigma
from danceopd.miniature.latents import shard, words
from danceopd.miniature.pipeline import TRANSFORMER, make_text_encoder, make_tokenizer
from danceopd.models.backbones import flux2
from danceopd.world.stages import generator_of, run_stage

SHARES = {"t2i": 0.7, "local-half": 0.2, "global-half": 0.1}  # of the updates

SHARDS = {"t2i": 16, "local-half": 6, "global-half": 3}  # of 4096 samples

STEPS, BATCH, LEARNING_RATE, DECAY, SEED = 11_000, 64, 1.5e-3, 0.3, 12

SHIFT = 5.0  # of the training noise levels: layout is decided near noise


class Drawer(nn.Module):
    """The transformer with the text encoder that is trained beside it."""

    def __init__(self, transformer: Flux2Transformer2DModel, text_encoder):
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder.model


def prompt_embeds(text_encoder, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns {"prompt_embeds": [B, L, 3 * 96]} of a batch's input_ids and attention_mask [B, L]; the text encoder is
    the one of four layers."""
    states = text_encoder(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    return {"prompt_embeds": torch.cat(states[1:4], dim=-1)}


def noised(clean: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns states z = (1 - sigma) x + sigma eps of latents x [B, 64, 4, 4], sigma [B], and the velocity eps - x that
    flow matching asks for there; the generator draws sigma and eps."""
    n = len(clean)
    sigma = shift_sigma(torch.rand(n, generator=generator), SHIFT).clamp(min=1e-3)
    noise, s = torch.randn(clean.shape, generator=generator), sigma.view(n, 1, 1, 1)
    return (1 - s) * clean + s * noise, sigma, noise - clean


def denoising(transformer: Flux2Transformer2DModel, text_encoder: nn.Module, teacher: nn.Module | None = None):
    """Compiles a transformer and its text encoder, in bfloat16 products.

    Attention is left to plain products: on a CPU the fused one has a backward in bfloat16 ten times slower than in
    float32, which was half of an update.

    Args:
        transformer, text_encoder: What is trained.
        teacher: A transformer whose velocities are matched in place of flow matching's.

    Returns:
        (batch, generator) -> the mean squared error of the velocity on a batch as Batches draws it.
    """
    for network in (transformer, teacher):
        if network is not None:
            network.set_attention_backend("_native_math")
    text_encoder.config._attn_implementation = "eager"
    drawn, read = torch.compile(transformer, dynamic=False), torch.compile(text_encoder, dynamic=False)
    taught = None if teacher is None else torch.compile(teacher, dynamic=False)

    def loss(batch: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            prompt = prompt_embeds(read, batch)
            sources = (batch["sources"].float(),) if "sources" in batch else ()
            state, sigma, target = noised(batch["latents"].float(), generator)
            if taught is not None:
                with torch.no_grad():
                    target = flux2.velocity(taught, state, sigma, prompt, sources)
            return (flux2.velocity(drawn, state, sigma, prompt, sources) - target).square().mean()

    return loss


class Batches:
    """Draws training batches from the shards of some capabilities.

    Args:
        folder: Where the shards are kept.
        vae, tokenizer: Make those that are not there.
        shares: The share of updates of each capability.
        shards: The number of shards of each.
        size: Samples of a batch.
        seed: Of the samples' order and the noise.
    """

    def __init__(self, folder: Path, vae, tokenizer, shares: dict[str, float], shards: dict[str, int], size, seed):
        self.names, self.shares, self.size, self.seed = list(shares), torch.tensor(list(shares.values())), size, seed
        self.data = {}
        for name in self.names:
            parts = [shard(folder, vae, tokenizer, name, i) for i in range(shards[name])]
            self.data[name] = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def __call__(self, step: int) -> tuple[dict[str, torch.Tensor], torch.Generator]:
        """Returns the tensors of an update's batch, and the generator for its noise; the step decides both."""
        generator = generator_of(self.seed, step)
        data = self.data[self.names[int(torch.multinomial(self.shares, 1, generator=generator))]]
        index = torch.randint(len(data["latents"]), (self.size,), generator=generator)
        return {key: tensor[index] for key, tensor in data.items()}, generator


def train(folder: Path, vae: AutoencoderKLFlux2) -> tuple:
    """Trains the base, going on from what the folder holds.

    Returns:
        The tokenizer, the text encoder of three layers and the transformer.
    """
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer(words())
    encoder = make_text_encoder(tokenizer)
    drawer = Drawer(Flux2Transformer2DModel(**TRANSFORMER), encoder)
    batches = Batches(folder / "data", vae, tokenizer, SHARES, SHARDS, BATCH, SEED)
    loss_of = denoising(drawer.transformer, drawer.text_encoder)

    def loss(step: int) -> torch.Tensor:
        return loss_of(*batches(step))

    average = run_stage(
        folder,
        "base",
        drawer,
        loss,
        steps=STEPS,
        learning_rate=LEARNING_RATE,
        decay=DECAY,
        matrices=lambda key, _: "blocks." in key or ".layers." in key,
        products=torch.bfloat16,
    )
    encoder.model.load_state_dict(average.text_encoder.state_dict())
    return tokenizer, encoder.eval(), average.transformer
