"""The embedded network: a small diffusion transformer over one sequence of prompt, source and noisy picture tokens."""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from danceopd.core.conditioning import Conditioning
from danceopd.core.copies import to_device


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the network; `text_length` is the fixed number of prompt tokens (padded or cut to it)."""

    image_size: int = 32
    patch_size: int = 16
    width: int = 128
    depth: int = 5
    heads: int = 4
    mlp_ratio: int = 3
    vocab_size: int = 400
    text_length: int = 10

    def to_dict(self) -> dict:
        """Returns plain values."""
        return asdict(self)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scales and shifts by a vector a sample, as adaptive layer norm does after its norm: [B, N, C] with [B, 1, C]."""
    return torch.addcmul(x + shift, x, scale)


class Block(nn.Module):
    """Pre-norm attention and MLP, each modulated and gated by the conditioning vector (adaLN-zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, mlp_ratio * width)
        self.down = nn.Linear(mlp_ratio * width, width)

    def forward(self, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(vector)[:, None].chunk(6, dim=-1)
        h = modulate(F.layer_norm(x, (width,)), shift_a, scale_a)
        q, k, v = self.qkv(h).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = F.rms_norm(q, (q.shape[-1],)), F.rms_norm(k, (k.shape[-1],))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = torch.addcmul(x, gate_a, self.out(h))
        h = modulate(F.layer_norm(x, (width,)), shift_m, scale_m)
        return torch.addcmul(x, gate_m, self.down(F.silu(self.up(h))))


class DiT(nn.Module):
    """velocity = DiT(latents, sigma, conditioning).

    The network estimates the clean picture x, and the velocity follows from z = (1 - sigma) x + sigma eps
    as (z - x) / sigma. At this size that gives clean pictures where estimating the velocity does not.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.grid = config.image_size // patch
        tokens, pixels = self.grid**2, 3 * patch**2
        self.text_embedding = nn.Embedding(config.vocab_size, width)
        self.text_position = nn.Parameter(torch.randn(config.text_length, width) * 0.5)
        # The prompt as one vector that keeps the word order: what "left of" needs.
        self.text_pool = nn.Sequential(nn.Linear(config.text_length * width, width), nn.SiLU(), nn.Linear(width, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.patch_in = nn.Linear(pixels, width)
        self.source_in = nn.Linear(pixels, width)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.5)
        self.source_position = nn.Parameter(torch.randn(tokens, width) * 0.5)
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(2 * width, pixels)
        for module in (*(block.modulation for block in self.blocks), self.final_modulation, self.patch_out):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """Cuts pictures [B, 3, H, W] into tokens [B, tokens, 3 * patch * patch]."""
        grid, patch = self.grid, self.config.patch_size  # as F.unfold, which is slower
        cut = images.reshape(-1, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        return cut.reshape(len(images), grid**2, -1)

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """Puts pictures together from tokens: the inverse of patchify."""
        grid, patch, size = self.grid, self.config.patch_size, self.config.image_size
        return tokens.reshape(-1, grid, grid, 3, patch, patch).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, size, size)

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Returns the velocity [B, 3, H, W] in the latents' dtype, of latents [B, 3, H, W] at sigma [B] in (0, 1].

        Samples with and without a source picture may be mixed: each kind makes one pass, so that no sample pays for
        tokens it does not have.
        """
        sourced, has_source = conditioning.sourced(), conditioning.has_source
        if sourced is False:
            return self._forward(latents, sigma, conditioning.prompt, None)
        if sourced:
            return self._forward(latents, sigma, conditioning.prompt, conditioning.source)
        marks = (has_source, ~has_source)
        with_source, without = (to_device(mark.nonzero()[:, 0], latents.device) for mark in marks)
        tokens, source = conditioning.prompt, conditioning.source
        edited = self._forward(latents[with_source], sigma[with_source], tokens[with_source], source[with_source])
        drawn = self._forward(latents[without], sigma[without], tokens[without], None)
        return torch.empty_like(latents).index_copy(0, with_source, edited).index_copy(0, without, drawn)

    def _forward(self, latents, sigma, tokens, source):
        text = self.text_embedding(tokens)
        angle = 1000 * sigma[:, None] * self.frequencies
        time = torch.cat([angle.cos(), angle.sin()], dim=-1).to(text.dtype)
        vector = F.silu(self.time(time) + self.text_pool(text.flatten(1)))
        patches = self.patchify(latents)
        sequence = [self.patch_in(patches.to(text.dtype)) + self.position, text + self.text_position]
        if source is not None:
            sequence.append(self.source_in(self.patchify(source).to(text.dtype)) + self.source_position)
        x = torch.cat(sequence, dim=1)
        for block in self.blocks:
            x = block(x, vector)
        x = x[:, : patches.shape[1]]
        shift, scale = self.final_modulation(vector)[:, None].chunk(2, dim=-1)
        h = self.head(modulate(F.layer_norm(x, x.shape[-1:]), shift, scale))
        clean = self.patch_out(F.silu(h))
        velocity = (patches - clean) / sigma[:, None, None].to(latents.dtype)
        return self.unpatchify(velocity.to(latents.dtype))
