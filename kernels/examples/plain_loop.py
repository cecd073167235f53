"""Plain PyTorch: a student learns from two guided teachers, at states of its own trajectories."""

import argparse

import torch
from danceopd_kernels import euler_step_, routed_velocity_mse
from torch import nn


def main(backend=None, updates=60, b=16, steps=4):
    torch.manual_seed(0)
    student, *teachers = (nn.Sequential(nn.Linear(37, 64), nn.SiLU(), nn.Linear(64, 32)) for _ in range(3))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    levels, losses = torch.linspace(1, 0, steps + 1)[:, None].repeat(1, b), []
    for _ in range(updates):
        z, label, depth = torch.randn(b, 32), torch.randint(4, (b,)), torch.randint(steps, (b,))
        condition, route = torch.eye(4)[label], label // 2
        with torch.no_grad():
            for i in range(steps - 1):  # each sample as far as its depth
                v = student(torch.cat([z, levels[i, :, None], condition], 1))
                euler_step_(z, v, levels[i], levels[i + 1], active=i < depth, backend=backend)
            asked = torch.cat([z, levels[depth, 0, None], condition], 1)
            free = torch.cat([z, levels[depth, 0, None], 0 * condition], 1)
            target, uncond = ([f(x[route == m]) for m, f in enumerate(teachers)] for x in (asked, free))
        loss = routed_velocity_mse(student(asked), target, route, uncond=uncond, guidance_scale=3.0, backend=backend)
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
