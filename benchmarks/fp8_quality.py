"""How far FP8, int8 or NF4 moves a velocity: relative error and cosine on rollout states, by noise level and block.

    python benchmarks/fp8_quality.py                        # the shipped sources, and small random transformers
    python benchmarks/fp8_quality.py --only shipped --samples 128 --json results.json
    python benchmarks/fp8_quality.py --precision nf4

The plain network rolls out its samples; at each state asked, its velocity v and the narrow network's w are compared.
Error is |w - v| / |v| and cosine is between w and v, each the mean over a bin's samples and steps; worst is the
smallest cosine of any sample. A block's error is of its own output on the plain network's input. Random transformers
are of the real classes and small, with random weights and prompts; nothing learned makes up for their errors.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import diffusers
import torch
from torch import nn

from danceopd.core.schedule import sigma_grid
from danceopd.models.backbones import flux, qwen_image, sd3, z_image
from danceopd.models.blocks import block_lists
from danceopd.models.eight_bit import to_eight_bit
from danceopd.models.fp8 import to_fp8
from danceopd.models.nf4 import to_nf4
from danceopd.world.files import SHIPPED, load_model, shipped_sources
from danceopd.world.sources import SHIFT, STAGES, training_batch

STEPS, BINS = 16, ((1.0, 0.9), (0.9, 0.7), (0.7, 0.5), (0.5, 0.0))  # of the noise level, from above
PRECISIONS = {"fp8": to_fp8, "int8": to_eight_bit, "nf4": to_nf4}
HEADS, WIDE, TEXT = 4, 256, 32  # of a random transformer: heads, channels, prompt tokens


@dataclass(frozen=True)
class Measured:
    """Holds what one part, "velocity" or a block, gave in one bin; worst is the smallest cosine of a sample."""

    network: str
    part: str
    bin: str
    error: float
    cosine: float
    worst: float


def compare(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """[B, 2]: relative error and cosine of each sample."""
    got, want = got.double().flatten(1), want.double().flatten(1)
    return torch.stack([(got - want).norm(dim=1) / want.norm(dim=1), nn.functional.cosine_similarity(got, want)], 1)


def parts_of(network: nn.Module) -> dict[str, nn.Module]:
    return {f"{name}.{i}": block for name, blocks in block_lists(network).items() for i, block in enumerate(blocks)}


@torch.no_grad()
def measure(
    name: str, network: nn.Module, ask: Callable, latents: torch.Tensor, bins=BINS, precision: str = "fp8"
) -> list[Measured]:
    """ask(network, latents, sigma [B]) -> velocity; latents: noise."""
    narrow = PRECISIONS[precision](copy.deepcopy(network))
    twins, found = parts_of(narrow), {}

    def watch(part):
        def hook(block, args, kwargs, output):
            outputs = [o if isinstance(o, tuple) else (o,) for o in (twins[part](*args, **kwargs), output)]
            pairs = [pair for pair in zip(*outputs, strict=True) if isinstance(pair[1], torch.Tensor)]
            seen.setdefault(part, []).append(torch.stack([compare(*pair) for pair in pairs]).mean(0))

        return hook

    hooks = [b.register_forward_hook(watch(part), with_kwargs=True) for part, b in parts_of(network).items()]
    levels = sigma_grid(STEPS, SHIFT)
    for now, after in pairwise(levels):
        seen, sigma = {}, now.expand(len(latents))
        velocity = ask(network, latents, sigma)
        seen["velocity"] = [compare(ask(narrow, latents, sigma), velocity)]
        high, low = next((high, low) for high, low in bins if low < now <= high)
        for part, values in seen.items():
            found.setdefault((part, f"{high} to {low}"), []).extend(values)
        latents = latents + (after - now) * velocity
    for hook in hooks:
        hook.remove()
    result = []
    for (part, where), values in found.items():
        error, cosine = torch.cat(values).mean(0).tolist()
        result.append(Measured(name, part, where, error, cosine, float(torch.cat(values)[:, 1].min())))
    return result


def shipped(samples: int, precision: str = "fp8") -> list[Measured]:
    """The picture world's networks on their own prompts and pictures; the base's are the text-to-image source's."""
    result = []
    for name in shipped_sources():
        network, stage = load_model(SHIPPED / f"{name}.safetensors").requires_grad_(False), STAGES[name]
        capability = max(stage.mix, key=stage.mix.get)
        generator = torch.Generator().manual_seed(3)
        clean, conditioning = training_batch(capability, samples, stage, network.config.text_length, generator)
        noise = torch.randn(clean.shape, generator=generator)
        result += measure(name, network, lambda n, z, s, c=conditioning: n(z, s, c), noise, precision=precision)
    return result


def random_transformers() -> dict[str, tuple]:
    """{family: (backbone, transformer, latents' shape)}."""
    head = WIDE // HEADS
    rope = (head // 4, 3 * head // 8, 3 * head // 8)
    shared = {"attention_head_dim": head, "num_attention_heads": HEADS, "joint_attention_dim": WIDE}
    made = {
        "SD3": (
            sd3,
            diffusers.SD3Transformer2DModel(
                **shared, sample_size=16, num_layers=4, caption_projection_dim=WIDE, pooled_projection_dim=WIDE,
                pos_embed_max_size=16, dual_attention_layers=(0, 1), qk_norm="rms_norm",
            ),
            (16, 16, 16),
        ),
        "FLUX": (
            flux,
            diffusers.FluxTransformer2DModel(
                **shared, num_layers=2, num_single_layers=4, pooled_projection_dim=WIDE, axes_dims_rope=rope,
            ),
            (16, 16, 16),
        ),
        "Qwen-Image": (
            qwen_image,
            diffusers.QwenImageTransformer2DModel(**shared, num_layers=4, axes_dims_rope=rope),
            (16, 16, 16),
        ),
        "Z-Image": (
            z_image,
            diffusers.ZImageTransformer2DModel(
                dim=WIDE, n_layers=4, n_refiner_layers=1, n_heads=HEADS, n_kv_heads=HEADS, cap_feat_dim=WIDE,
                axes_dims=list(rope), axes_lens=[512, 64, 64],
            ),
            (16, 16, 16),
        ),
    }  # fmt: skip
    for _, transformer, _ in made.values():
        for parameter in transformer.parameters():
            if parameter.dim() == 1:  # norms and biases begin at constants
                parameter.data += 0.2 * torch.randn_like(parameter)
            elif not parameter.any():  # a last projection of zeros
                parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    return made


def random(samples: int, precision: str = "fp8") -> list[Measured]:
    torch.manual_seed(0)
    result = []
    for name, (backbone, transformer, shape) in random_transformers().items():
        transformer = transformer.eval().requires_grad_(False)
        prompt = {"prompt_embeds": torch.randn(samples, TEXT, WIDE)}
        if name in ("SD3", "FLUX"):
            prompt["pooled_prompt_embeds"] = torch.randn(samples, WIDE)
        else:
            prompt["prompt_mask"] = torch.ones(samples, TEXT, dtype=torch.bool)

        def ask(network, latents, sigma, backbone=backbone, prompt=prompt):
            return backbone.velocity(network, latents, sigma, prompt)

        noise = torch.randn(samples, *shape)
        result += measure(f"{name}, random", transformer, ask, noise, precision=precision)
    return result


def table(rows: list[Measured], blocks: bool) -> str:
    """Markdown: of the whole network, or of its blocks over all noise levels."""
    lines = []
    if not blocks:
        lines = ["| network | sigma | relative error | cosine | worst sample |", "| --- | --- | ---: | ---: | ---: |"]
        for r in rows:
            if r.part == "velocity":
                lines.append(f"| {r.network} | {r.bin} | {r.error:.4f} | {r.cosine:.5f} | {r.worst:.5f} |")
        return "\n".join(lines)
    lines = ["| network | relative error of each block's output, over all noise levels |", "| --- | --- |"]
    for name in dict.fromkeys(r.network for r in rows):
        errors = {}
        for r in rows:
            if r.network == name and r.part != "velocity":
                errors.setdefault(r.part, []).append(r.error)
        cells = ", ".join(f"{part} {sum(e) / len(e):.4f}" for part, e in errors.items())
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[Measured]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="of each shipped source; a sixteenth of random ones")
    parser.add_argument("--only", choices=("shipped", "random"))
    parser.add_argument("--precision", choices=PRECISIONS, default="fp8", help="(%(default)s)")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args(argv)
    if args.samples < 1:
        parser.error("--samples must be at least 1")
    rows = [] if args.only == "random" else shipped(args.samples, args.precision)
    rows += [] if args.only == "shipped" else random(max(1, args.samples // 16), args.precision)
    print(table(rows, blocks=False) + "\n\n" + table(rows, blocks=True))
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
