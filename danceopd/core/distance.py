"""How far one field is from another along its rollouts."""

import torch

from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import Field
from danceopd.core.rollout import rollout


@torch.no_grad()
def velocity_errors(
    field: Field, source: Field, noise: torch.Tensor, conditioning: Conditioning, sigmas: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, N] mean squared differences from the source's velocity, [B, N] mean squares of the source's), float32.

    At every state of the field's own rollouts from noise [B, ...]; sigmas [N + 1], the last of which is not asked.
    """
    steps = len(sigmas) - 1
    states, at = rollout(field, noise, conditioning, sigmas, torch.arange(steps).expand(len(noise), -1))
    errors, powers = [], []
    for i in range(steps):
        asked = states[:, i], at[:, i], conditioning
        wanted = source(*asked).float()
        errors.append((field(*asked).float() - wanted).square().flatten(1).mean(1))
        powers.append(wanted.square().flatten(1).mean(1))
    return torch.stack(errors, 1).cpu(), torch.stack(powers, 1).cpu()


def velocity_error(
    field: Field, source: Field, noise: torch.Tensor, conditioning: Conditioning, sigmas: torch.Tensor
) -> float:
    """The mean of velocity_errors: the mean squared difference from a source's velocity, on the field's own way."""
    return float(velocity_errors(field, source, noise, conditioning, sigmas)[0].mean())
