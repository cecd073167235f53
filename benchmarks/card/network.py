"""A diffusion transformer of two streams in plain PyTorch, of the sizes of released ones, where diffusers is not there.

Its parts and names are those of SD3's: joint attention of pictures and prompts with normed queries and keys, a second
attention of the pictures alone in the first blocks, modulation by the noise level. Weights are random.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from danceopd.core.conditioning import Conditioning

# Ends of the names of the layers that a LoRA changes, as in danceopd.models.backbones.sd3.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Size:
    """dual: blocks with a second attention; side: of the latents; text: tokens of a prompt, and their width."""

    width: int
    layers: int
    heads: int
    dual: int
    side: int
    channels: int
    text: int
    text_width: int

    def flops(self) -> int:
        """Operations of one sample's forward: its products and its attention."""
        w, n, t = self.width, self.side**2 // 4, self.text
        block = 2 * (12 * w * w * (n + t) + 12 * w * w) + 4 * (n + t) ** 2 * w  # streams, modulation, attention
        second = 2 * (4 * w * w * n + 3 * w * w) + 4 * n * n * w
        ends = 2 * (2 * 4 * self.channels * w * n + self.text_width * w * t + 256 * w + w * w)
        return self.layers * block + self.dual * second + ends


# SD3.5-medium at 1024 and 512 pixels, two of a 12-billion one's blocks at 1024, and what a CPU can do.
MEDIUM = Size(1536, 24, 24, 13, 128, 16, 333, 4096)
MEDIUM_512 = Size(1536, 24, 24, 13, 64, 16, 333, 4096)
TWELVE_BILLION = Size(3072, 2, 24, 0, 128, 16, 512, 4096)
TINY = Size(64, 2, 4, 1, 8, 4, 8, 32)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, joint: bool):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
            self.to_add_out = nn.Linear(width, width)
            self.norm_added_q, self.norm_added_k = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))

    def _split(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, text=None):
        q, k, v = (self._split(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        if text is not None:
            more = [self._split(layer(text)) for layer in (self.add_q_proj, self.add_k_proj, self.add_v_proj)]
            more[0], more[1] = self.norm_added_q(more[0]), self.norm_added_k(more[1])
            q, k, v = (torch.cat(pair, 2) for pair in zip((q, k, v), more, strict=True))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if text is None:
            return self.to_out[0](out)
        return self.to_out[0](out[:, : x.shape[1]]), self.to_add_out(out[:, x.shape[1] :])


class _Modulated(nn.Module):
    """The modulations of a sample: shift, scale and gate of each branch."""

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts, self.linear = parts, nn.Linear(width, parts * width)

    def forward(self, time):
        return self.linear(F.silu(time))[:, None].chunk(self.parts, 2)


def _modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dual: bool):
        super().__init__()
        self.attn = _Attention(width, heads, joint=True)
        self.attn2 = _Attention(width, heads, joint=False) if dual else None
        self.norm1, self.norm1_context = _Modulated(width, 9 if dual else 6), _Modulated(width, 6)
        self.ff, self.ff_context = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
            for _ in range(2)
        )

    def forward(self, x, text, time):
        shift, scale, gate, shift2, scale2, gate2, *second = self.norm1(time)
        t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = self.norm1_context(time)
        out, t_out = self.attn(_modulate(x, shift, scale), _modulate(text, t_shift, t_scale))
        if self.attn2 is not None:
            x = x + second[2] * self.attn2(_modulate(x, *second[:2]))
        x, text = x + gate * out, text + t_gate * t_out
        x = x + gate2 * self.ff(_modulate(x, shift2, scale2))
        return x, text + t_gate2 * self.ff_context(_modulate(text, t_shift2, t_scale2))


class Transformer(nn.Module):
    """The network; velocity asks it."""

    def __init__(self, size: Size):
        super().__init__()
        self.size, patch = size, 4 * size.channels
        self.patch, self.text = nn.Linear(patch, size.width), nn.Linear(size.text_width, size.width)
        self.time = nn.Sequential(nn.Linear(256, size.width), nn.SiLU(), nn.Linear(size.width, size.width))
        self.transformer_blocks = nn.ModuleList(
            _Block(size.width, size.heads, i < size.dual) for i in range(size.layers)
        )
        self.proj_out = nn.Linear(size.width, patch)
        self.register_buffer("places", torch.randn(size.side**2 // 4, size.width) / 10)
        self.register_buffer("waves", torch.exp(-math.log(10_000) * torch.arange(128) / 128).float())

    def forward(self, latents, sigma, text):
        dtype, (side, channels) = self.patch.weight.dtype, (self.size.side // 2, self.size.channels)
        x = latents.to(dtype).unflatten(3, (side, 2)).unflatten(2, (side, 2))  # [B, C, h, 2, w, 2]
        x = self.patch(x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)) + self.places
        angle = 1000 * sigma.float()[:, None] * self.waves.float()
        time, text = self.time(torch.cat([angle.cos(), angle.sin()], 1).to(dtype)), self.text(text.to(dtype))
        for block in self.transformer_blocks:
            x, text = block(x, text, time)
        out = self.proj_out(F.layer_norm(x, x.shape[-1:])).unflatten(2, (channels, 2, 2)).unflatten(1, (side, side))
        return out.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def velocity(transformer: Transformer, latents, sigma, prompt, sources=(), embedded_guidance=None) -> torch.Tensor:
    """[B, C, h, w] in the latents' dtype; what the models' families have a function of the same form for."""
    return transformer(latents, sigma, prompt["prompt_embeds"]).to(latents.dtype)


def make(size: Size, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A network with random weights, frozen; the same ones each time."""
    torch.manual_seed(0)
    with device:
        return Transformer(size).to(dtype).requires_grad_(False).eval()


def samples(size: Size, n: int, device: torch.device) -> tuple[torch.Tensor, Conditioning]:
    """Noise [n, C, h, w] and prompts of n samples."""
    noise = torch.randn(n, size.channels, size.side, size.side, device=device)
    prompt = {"prompt_embeds": torch.randn(n, size.text, size.text_width, device=device)}
    return noise, Conditioning(prompt, None, torch.zeros(n, dtype=torch.bool))
