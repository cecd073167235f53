"""One update's samples."""

from dataclasses import dataclass

import torch

from danceopd.core.conditioning import Conditioning


@dataclass
class Batch:
    """B samples of any mixture of capabilities: noise [B, ...], their conditioning, route [B] int64.

    clean [B, ...]: the data's own pictures, where a method asks for them; sigmas [N + 1]: as in Group.
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
        clean = None if self.clean is None else self.clean.to(device)
        conditioning, route = self.conditioning.to(device), self.route.to(device)
        return Batch(self.noise.to(device), conditioning, route, clean, self.sigmas)
