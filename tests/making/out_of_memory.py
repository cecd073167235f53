"""Networks that ask for memory that is not there."""

import torch


class Full:
    """Asks a network; in one phase it first asks for memory that is not there, `times` times.

    Args:
        network: Is asked; a network's forward.
        device: Where the memory is asked for.
        phase: "rollout" and "query" are forwards without gradient, "match" one with it, "backward" is its backward.
        times: How often there is no memory.
        fits: The number of samples for which there is.
    """

    def __init__(self, network, device, phase, times, fits=1):
        self.network, self.device, self.phase, self.times, self.fits = network, device, phase, times, fits

    def __call__(self, *asked):
        gradient = self.phase in ("match", "backward")
        if self.phase != "backward" and torch.is_grad_enabled() == gradient:
            self.ask(len(asked[0]))
        found = self.network(*asked)
        return _Fails.apply(found, self) if self.phase == "backward" and torch.is_grad_enabled() else found

    def ask(self, samples: int) -> None:
        if self.times and samples > self.fits:
            self.times -= 1
            if torch.device(self.device).type == "cuda":
                torch.empty(2**50, dtype=torch.uint8, device=self.device)
            raise torch.OutOfMemoryError("no memory")


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, full):
        ctx.full = full
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.full.ask(len(gradient))
        return gradient, None
