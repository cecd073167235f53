"""The package flow_matching: its path and its solver around the loss. Its t is 1 - sigma, its velocity data - noise."""

import argparse

import torch
from danceopd_kernels import routed_velocity_mse
from torch import nn

try:
    from flow_matching.path import CondOTProbPath
    from flow_matching.solver import ODESolver
except ModuleNotFoundError as error:
    raise SystemExit(f"this example needs {error.name}: pip install flow_matching (licence CC BY-NC 4.0)") from None


class Velocity(nn.Sequential):
    def forward(self, x, t):
        return super().forward(torch.cat([x, t.expand(len(x))[:, None]], 1))


def main(backend=None, updates=60):
    torch.manual_seed(0)
    model = Velocity(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    path, losses = CondOTProbPath(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(updates):
        data = 2 + 0.1 * torch.randn(256, 2)
        sample = path.sample(x_0=torch.randn_like(data), x_1=data, t=torch.rand(256))
        loss = routed_velocity_mse(model(sample.x_t, sample.t), sample.dx_t, backend=backend)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"{loss.item():.5f}")
    drawn = ODESolver(model).sample(torch.randn(256, 2), step_size=0.1)
    print(f"drawn: mean {drawn.mean():.2f} of 2.00")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", help="torch: without the kernels; the fastest if not given")
    main(parser.parse_args().backend)
