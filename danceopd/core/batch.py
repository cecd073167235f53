"""One update's samples."""

from dataclasses import dataclass

import torch

from danceopd.core.conditioning import Conditioning
from danceopd.core.copies import to_device


@dataclass
class Batch:
    """Holds B samples of any mixture of capabilities.

    Args:
        noise: Float tensor [B, ...], the states at sigma = 1, in the shape of the student's latents.
        conditioning: The prompts and source pictures of the samples.
        route: int64 tensor [B] on the CPU: the number of the source that supervises each sample.
        clean: Float tensor [B, ...], the data's own pictures, for the methods that learn from them.
        sigmas: float32 tensor [N + 1] on the CPU, the noise levels of this batch's rollout where they depend on its
            picture size.

    Example:
        >>> routes = torch.tensor([0, 1, 1])
        >>> batch = Batch(torch.randn(3, 16, 32, 32), Conditioning(torch.tensor([[4, 2], [3, 1], [8, 5]])), routes)
        >>> len(batch[1:])
        2
    """

    noise: torch.Tensor
    conditioning: Conditioning
    route: torch.Tensor
    clean: torch.Tensor | None = None
    sigmas: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index) -> "Batch":
        clean = None if self.clean is None else self.clean[index]
        return Batch(self.noise[index], self.conditioning[index], self.route[index], clean, self.sigmas)

    def to(self, device: torch.device | str) -> "Batch":
        """Copies everything to a device but the routes, noise levels and marks, which the host reads.

        Args:
            device: Where the copies lie.

        Returns:
            The same samples there.
        """
        clean = None if self.clean is None else to_device(self.clean, device)
        return Batch(to_device(self.noise, device), self.conditioning.to(device), self.route, clean, self.sigmas)
