"""How far one field is from another along its rollouts."""

import torch

from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import Field
from danceopd.core.rollout import rollout


@torch.no_grad()
def velocity_errors(
    field: Field, source: Field, noise: torch.Tensor, conditioning: Conditioning, sigmas: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Measures how far a field is from a source at every state of the field's own rollouts.

    Args:
        field: The field that is rolled out.
        source: The field that it is compared with.
        noise: Float tensor [B, ...], where the rollouts begin.
        conditioning: What the B samples are conditioned on.
        sigmas: float32 tensor [N + 1], the noise levels; the last one is not asked.

    Returns:
        The mean squared differences of the two velocities, and the mean squares of the source's: float32 tensors [B, N]
        on the CPU.
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
    """Measures how far a field is from a source along the field's own rollouts, in one number.

    Args:
        field, source, noise, conditioning, sigmas: As in `velocity_errors`.

    Returns:
        The mean over samples and noise levels of the mean squared difference of the two velocities.
    """
    return float(velocity_errors(field, source, noise, conditioning, sigmas)[0].mean())
