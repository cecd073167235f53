"""Makes AdamW, also with states of 8 bits, and Muon (Jordan et al., 2024).

torch.optim.Muon iterates in bfloat16, one matrix at a time; on a CPU without bfloat16 products that doubled the time of
an update of the embedded network, where this one, which takes matrices of one shape together, costs a fifth.
"""

from importlib import import_module

import torch

from danceopd.support.errors import UserError

OPTIMIZERS = ("adamw", "adamw_8bit", "muon")


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is made orthogonal by five Newton-Schulz steps.

    The update's root mean square matches AdamW's (0.2 sqrt(max side)), so that AdamW's learning rates carry over (arXiv
    2502.16982).

    Args:
        params: Matrices, and convolutions' kernels, which are taken as matrices of one row an output channel.
        lr, momentum, weight_decay: As elsewhere.
        dtype: Of the Newton-Schulz products.

    Raises:
        ValueError: A tensor is a vector.
    """

    def __init__(
        self, params, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.01, dtype=torch.float32
    ):
        self._dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            if any(p.ndim < 2 for p in group["params"]):
                raise ValueError("Muon is for matrices and convolutions' kernels; give other tensors to AdamW")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                by_shape.setdefault(update.shape, []).append((p, update))
            for shape, items in by_shape.items():
                updates = orthogonalize(torch.stack([update for _, update in items]).to(self._dtype))
                scale = 0.2 * max(shape) ** 0.5
                for (p, _), update in zip(items, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view(p.shape), alpha=-group["lr"] * scale)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Brings the singular values of [N, rows, columns] near 1 by the quintic Newton-Schulz iteration."""
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


def adamw_class(name: str) -> type[torch.optim.Optimizer]:
    """Returns torch's AdamW, or for "adamw_8bit" that of bitsandbytes or torchao.

    A UserError where neither is there.
    """
    if name != "adamw_8bit":
        return torch.optim.AdamW
    for module in ("bitsandbytes.optim", "torchao.optim"):
        try:
            return _eager(import_module(module).AdamW8bit)
        except (ImportError, AttributeError):
            continue
    raise UserError("adamw_8bit needs bitsandbytes or torchao; pip install 'danceopd[8bit]', or use adamw")


def _eager(cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Makes an optimizer run without torch.compile: torchao's compiles each shape of parameters, at up to 20 s on a
    CPU.
    """

    class Eager(cls):
        def step(self, closure=None):
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return Eager


def make_optimizers(
    model: torch.nn.Module, name: str, learning_rate: float, weight_decay: float, betas=(0.9, 0.999)
) -> list[torch.optim.Optimizer]:
    """Makes the optimizers of a network.

    Args:
        model: The network.
        name: "adamw" or "adamw_8bit", one optimizer; "muon", Muon for the matrices in `model.blocks`, AdamW for the
            rest.
        learning_rate, weight_decay: Of all.
        betas: AdamW's.

    Raises:
        ValueError: There is no such optimizer.
        UserError: Its library is not installed.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; use one of {', '.join(OPTIMIZERS)}")
    blocks = getattr(model, "blocks", model)  # an adapter has none: all of its factors are matrices in products
    matrices = [p for key, p in blocks.named_parameters() if p.ndim == 2 and "modulation" not in key]
    chosen = {id(p) for p in matrices} if name == "muon" else set()
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [Muon(matrices, lr=learning_rate, weight_decay=weight_decay)] if name == "muon" else []
    if rest:
        optimizers.append(adamw_class(name)(rest, lr=learning_rate, betas=betas, weight_decay=weight_decay))
    return optimizers


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of an optimizer's only group.

    Torchao keeps it in a tensor, such that a new one compiles nothing again.
    """
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
