# %% [markdown]
# # Two moons: two teachers, one student
# Each teacher is the exact velocity field of one moon. A small network learns both, by a prompt each, on its rollouts.

# %%
from functools import partial

import matplotlib.pyplot as plt
import torch
from torch import nn

from danceopd import Batch, Conditioning, danceopd_loss, hard, route, sample, sigma_grid

UPDATES, WIDTH, sigmas = 1000, 0.06, sigma_grid(16, shift=2.0)
angle, generator = torch.linspace(0, torch.pi, 64), torch.manual_seed(0)
moon = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)  # the other one is -moon
hidden = [layer for inputs in (5, 128, 128) for layer in (nn.Linear(inputs, 128), nn.SiLU())]
network = nn.Sequential(*hidden, nn.Linear(128, 2))


def teacher(points, z, sigma, conditioning):
    """The field of Gaussians around points [M, 2], of deviation WIDTH: v = E[noise - data | z]."""
    s = sigma[:, None, None]
    variance, away = s**2 + ((1 - s) * WIDTH) ** 2, z[:, None] - (1 - s) * points
    share = (-away.square().sum(2, keepdim=True) / (2 * variance)).softmax(1)
    return (share * ((s - (1 - s) * WIDTH**2) / variance * away - points)).sum(1)


def student(z, sigma, conditioning):
    return network(torch.cat([z, sigma[:, None], nn.functional.one_hot(conditioning.prompt, 2)], dim=1))


# %%
teachers = [partial(teacher, moon), partial(teacher, -moon)]
optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
for _ in range(UPDATES):
    routes = route(256, [1, 1], generator)
    batch = Batch(torch.randn(256, 2), Conditioning(routes), routes)
    optimizer.zero_grad()
    danceopd_loss(student, teachers, batch, sigmas=sigmas, generator=generator).backward()
    optimizer.step()
    schedule.step()

# %%
axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")[1]
side, routes, noise = torch.linspace(-2, 2, 40), route(2000, [1, 1], generator), torch.randn(2000, 2)
drawn = [sample(field, noise, Conditioning(routes), sigmas) for field in (hard(teachers, routes), student)]
print(f"From the same noise, teacher and student end {(drawn[0] - drawn[1]).norm(dim=1).mean():.3f} apart.")
for i, colour in enumerate(["#d1495b", "#00798c"]):
    for row, field in enumerate([teachers[i], student]):
        asked = torch.cartesian_prod(side, side), torch.full((1600,), 0.2), Conditioning(torch.full((1600,), i))
        u, v = -field(*asked).detach().view(40, 40, 2).permute(2, 1, 0).numpy()  # towards the data
        axes[row, i].streamplot(side.numpy(), side.numpy(), u, v, color=colour, linewidth=0.7, arrowsize=0.7)
        axes[row, i].set_title(f"{('teacher', 'student')[row]}, prompt {i}: field at sigma 0.2")
        axes[row, 2].scatter(*drawn[row][routes == i].T, s=3, color=colour, linewidths=0)
        axes[row, 2].set_title(f"{('teachers', 'student')[row]}: samples of both prompts")
plt.setp(axes.flat, aspect="equal", xlim=(-2, 2), ylim=(-1.5, 1.5), xticks=[], yticks=[])
plt.savefig("two_moons.png", dpi=120)
