"""Students of a diffusers model: an adapter on a shared transformer, or all weights of one."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy

import torch
from danceopd_kernels.lora import frozen_linear
from peft.utils.other import get_pattern_key
from torch import nn

from danceopd.core.conditioning import Conditioning
from danceopd.models.blocks import block_layers
from danceopd.models.lora_algebra import Lora
from danceopd.models.lora_layers import _Factors, _flat
from danceopd.models.packing import by_sources
from danceopd.models.shared_base import SharedBase
from danceopd.support.errors import UserError


def layer_sizes(
    layers: Sequence[str],
    rank: int,
    alpha: float | None,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
) -> dict[str, tuple[int, float]]:
    """Works out the rank and alpha of each layer of an adapter, as PEFT does.

    Args:
        layers: The layers' names.
        rank: Of those that no pattern names.
        alpha: Of those that no pattern names; a layer's own rank if None.
        rank_pattern: Ranks by regular expressions for ends of names, at a dot.
        alpha_pattern: Alphas in the same way.

    Returns:
        {layer: (rank, alpha)}.

    Raises:
        UserError: A pattern names no layer.
    """
    sizes, unused = {}, {*rank_pattern, *alpha_pattern}
    for name in layers:
        own, other = get_pattern_key([*rank_pattern], name), get_pattern_key([*alpha_pattern], name)
        unused -= {own, other}
        size = rank_pattern.get(own, rank)
        sizes[name] = size, float(alpha_pattern.get(other, size if alpha is None else alpha))
    if unused:
        raise UserError(f"no layer of the adapter ends in {', '.join(sorted(unused))}, which a pattern names")
    return sizes


class LoraStudent(nn.Module):
    """Trains an adapter on a shared transformer: student(latents, sigma, conditioning) -> velocity.

    Its parameters are the adapter alone, in float32; a deep copy is another adapter on the same transformer. A is drawn
    as PEFT draws it and B is zero, so that it begins as the base; what it adds is scaled by alpha / rank.

    Args:
        shared: The transformer.
        layers: Names of the layers that it changes, as given to the SharedBase too.
        rank: The rank of A and B.
        alpha: The adapter's scale, times rank.
        generator: Draws A.
        embedded_guidance: The input of all its samples, where the transformer takes one.
        sizes: {layer: (rank, alpha)} of those that have their own, as layer_sizes gives them.
        gaussian: Draws A from a normal distribution of standard deviation 1 / rank.
    """

    def __init__(
        self,
        shared: SharedBase,
        layers: Sequence[str],
        rank: int,
        alpha: float,
        generator: torch.Generator | None = None,
        embedded_guidance: float | None = None,
        sizes: Mapping[str, tuple[int, float]] | None = None,
        gaussian: bool = False,
    ):
        super().__init__()
        self.embedded_guidance = embedded_guidance
        self._shared, self.rank, self.alpha = (shared,), rank, alpha  # in a tuple: no submodule, and no copy
        self.factors = nn.ModuleDict()
        for name in layers:
            linear = shared.transformer.get_submodule(name)
            own_rank, own_alpha = (sizes or {}).get(name, (rank, alpha))
            shape = own_rank, linear.in_features
            if gaussian:
                a = torch.randn(shape, generator=generator) / own_rank
            else:
                a = (2 * torch.rand(shape, generator=generator) - 1) * linear.in_features**-0.5
            self.factors[_flat(name)] = _Factors(a, torch.zeros(linear.out_features, own_rank), own_alpha / own_rank)

    def __deepcopy__(self, memo) -> "LoraStudent":
        copied = LoraStudent(self._shared[0], [], self.rank, self.alpha, embedded_guidance=self.embedded_guidance)
        copied.factors = deepcopy(self.factors, memo)
        return copied

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self._shared[0].student(latents, sigma, conditioning.embedding(self.embedded_guidance), self)

    def enable_gradient_checkpointing(self, within: Callable = nullcontext) -> None:
        """Lets a backward compute each block of the transformer again.

        Args:
            within: Makes the context that it is computed again in.
        """
        self._shared[0].enable_gradient_checkpointing(within)

    def on_fp8(self) -> None:
        """Goes over to a copy of the transformer in FP8."""
        self._shared = (self._shared[0].in_fp8(),)

    @property
    def transformer(self) -> nn.Module:
        """Returns the frozen transformer that the adapter is of."""
        return self._shared[0].transformer

    def layer(self, name: str, x, weight, bias=None, weight_scale=None) -> torch.Tensor:
        """Applies one linear layer as frozen_linear does, with its adapter where the student has one there.

        Args:
            name: The layer's.
            x: Float tensor [..., in].
            weight: Tensor [out, in], the frozen layer's.
            bias: Tensor [out], or None.
            weight_scale: Tensor [out] of a weight in FP8, or None.

        Returns:
            Float tensor [..., out].
        """
        if _flat(name) not in self.factors:
            return frozen_linear(x, weight, bias, weight_scale)
        return self.factors[_flat(name)](x, weight, bias, weight_scale)

    def factors_of(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Returns the factors of a layer's adapter.

        Args:
            name: The layer's.

        Returns:
            A [rank, in] and B [out, rank].
        """
        own = self.factors[_flat(name)]
        return own.lora_A, own.lora_B

    def scale_of(self, name: str) -> float:
        """Returns what a layer's B A is multiplied by: its alpha / rank."""
        return self.factors[_flat(name)].scale

    def lora(self) -> Lora:
        """Returns the adapter by module.

        Returns:
            A, B and the scale of each layer by its name, detached, on the CPU.
        """
        return {
            name.replace("/", "."): (own.lora_A.detach().cpu(), own.lora_B.detach().cpu(), own.scale)
            for name, own in self.factors.items()
        }


class FullStudent(nn.Module):
    """Trains all weights of a transformer of its own: student(latents, sigma, conditioning) -> velocity.

    Args:
        transformer: The transformer in float32; it is changed into one that is trained.
        velocity: The backbone's.
        embedded_guidance: The input of all its samples, where the transformer takes one.
        autocast: The dtype that its products run in; None for the weights' own.
    """

    def __init__(
        self,
        transformer: nn.Module,
        velocity: Callable[..., torch.Tensor],
        embedded_guidance: float | None = None,
        autocast: torch.dtype | None = None,
    ):
        super().__init__()
        self.transformer = transformer.requires_grad_(True)
        transformer.takes = torch.float32
        self.embedded_guidance, self.autocast, self._velocity = embedded_guidance, autocast, velocity

    @property
    def blocks(self) -> nn.ModuleList:
        """Lists the linear layers over tokens in the blocks, without those that modulate: Muon trains these."""
        return nn.ModuleList(layer for _, layer, modulates in block_layers(self.transformer) if not modulates)

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        def ask(latents, sigma, conditioning, sources, _):
            return self._velocity(
                self.transformer, latents, sigma, conditioning.prompt, sources, conditioning.embedded_guidance
            )

        autocast = torch.autocast(latents.device.type, self.autocast) if self.autocast else nullcontext()
        with autocast:
            return by_sources(ask, latents, sigma, conditioning.embedding(self.embedded_guidance))
