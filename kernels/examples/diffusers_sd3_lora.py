"""Diffusers: LoRA training of SD3, here a tiny one with random weights on pictures of one colour."""

import argparse

import torch
from danceopd_kernels import routed_velocity_mse

try:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
    from peft import LoraConfig
except ModuleNotFoundError as error:
    raise SystemExit(f"this example needs {error.name}: pip install diffusers transformers peft") from None


def main(backend=None, updates=40):
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32}
    shapes = {"sample_size": 8, "in_channels": 4, "joint_attention_dim": 16, "pooled_projection_dim": 8}
    transformer = SD3Transformer2DModel(**sizes, **shapes, out_channels=4, pos_embed_max_size=8).requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    optimizer = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], lr=3e-2)
    scheduler, losses = FlowMatchEulerDiscreteScheduler(shift=3.0), []
    latents = 2 * torch.randn(1, 4, 1, 1).expand(8, 4, 8, 8)  # in a real run the VAE's and the text encoders'
    prompt, pooled = torch.randn(8, 5, 16), torch.randn(8, 8)
    for _ in range(updates):
        noise, u = torch.randn_like(latents), compute_density_for_timestep_sampling("logit_normal", 8, 0.0, 1.0)
        index = (u * scheduler.config.num_train_timesteps).long()
        sigma, t = scheduler.sigmas[index], scheduler.timesteps[index]
        v = transformer(latents.lerp(noise, sigma.view(-1, 1, 1, 1)), prompt, pooled, t).sample
        weight = compute_loss_weighting_for_sd3("cosmap", sigma)
        loss = routed_velocity_mse(v, noise - latents, weight=weight, backend=backend)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"{loss.item():.5f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", help="torch: without the kernels; the fastest if not given")
    main(parser.parse_args().backend)
