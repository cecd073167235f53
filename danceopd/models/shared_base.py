"""One frozen transformer that answers for several LoRA sources and the student's adapter."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from danceopd.core.conditioning import Conditioning
from danceopd.core.copies import to_device
from danceopd.core.fields import Field
from danceopd.models.blocks import block_layers
from danceopd.models.fp8 import Fp8Linear
from danceopd.models.lora_algebra import Lora
from danceopd.models.lora_layers import _constant, _Route, _RoutedLinear, dtype_of
from danceopd.models.packing import by_sources
from danceopd.models.swapping import Swap
from danceopd.support.errors import UserError


class SharedBase:
    """Puts the LoRAs of several sources on one frozen transformer.

    ``shared(latents, sigma, conditioning, adapter) -> velocity`` serves in one forward a batch whose samples ask
    different sources. The transformer is changed in place: it is frozen, and its layers that a LoRA targets, which keep
    their parameters, get the adapters of all sources beside them, in the weight's dtype.

    Args:
        transformer: The model's.
        loras: The adapters, one for each source.
        velocity: The backbone's.
        layers: Names of more layers, for a LoraStudent.

    Raises:
        UserError: For a LoRA of another transformer.
        ValueError: For a transformer that is shared already.
    """

    def __init__(
        self,
        transformer: nn.Module,
        loras: Sequence[Lora],
        velocity: Callable[..., torch.Tensor],
        layers: Sequence[str] = (),
    ):
        if any(isinstance(module, _RoutedLinear) for module in transformer.modules()):
            raise ValueError("the transformer is shared already; give all its LoRAs at once")
        self.transformer, self.count, self._velocity = transformer.requires_grad_(False), len(loras), velocity
        self.swap: Swap | None = None  # where blocks wait in host memory
        # With zero_cond_t, Qwen-Image's modulation sees the times of the batch and then as many zeros: 2 B rows.
        self._route = _Route(2 if getattr(getattr(transformer, "config", None), "zero_cond_t", False) else 1)
        for name in dict.fromkeys([*(name for lora in loras for name in lora), *layers]):
            try:
                linear = transformer.get_submodule(name)
            except AttributeError:
                raise UserError(f"{type(transformer).__name__} has no layer {name}, which a LoRA changes") from None
            like = {"dtype": dtype_of(linear), "device": linear.weight.device}
            # An adapter of rank 0 stands for a source that leaves the layer as it is.
            none = (torch.zeros(0, linear.in_features), torch.zeros(linear.out_features, 0), 1.0)
            parts = [lora.get(name, none) for lora in loras]
            adapters = [(a.to(**like), b.to(**like), scale) for a, b, scale in parts]
            transformer.set_submodule(name, _RoutedLinear(name, linear, adapters, self._route))

    def enable_gradient_checkpointing(self, within: Callable = nullcontext) -> None:
        """Lets a backward compute each block again instead of keeping what the forward had inside it.

        Args:
            within: Makes the context that a block is computed again in.
        """

        def run(block, *args):
            contexts = partial(self._route.again, within)
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

        self.transformer.enable_gradient_checkpointing(run)

    def swap_blocks(self, count: int, device: torch.device) -> None:
        """Moves the transformer to a device but for blocks that wait in host memory until they are asked.

        A backward needs `enable_gradient_checkpointing`, else it would keep every block there.

        Args:
            count: How many blocks wait.
            device: Where it computes.

        Raises:
            UserError: It has fewer blocks, or so few would wait that none is spared.
        """
        self.swap = Swap(self.transformer, count, device, lambda: self._route.backwards)

    def in_fp8(self) -> "SharedBase":
        """Copies the transformer with the blocks' linear layers in FP8, for students alone.

        Returns:
            The copy, all of whose other tensors are this one's.
        """
        tensors = (*self.transformer.parameters(), *self.transformer.buffers())
        copied = deepcopy(self, {id(t): t for t in tensors})
        for name, linear, modulates in block_layers(copied.transformer):
            narrow = Fp8Linear(linear, modulates)
            if isinstance(linear, _RoutedLinear):
                narrow = _RoutedLinear(name, narrow, [], copied._route)
            copied.transformer.set_submodule(name, narrow)
        copied.count = 0
        return copied

    def __call__(self, latents, sigma, conditioning: Conditioning, adapter: torch.Tensor) -> torch.Tensor:
        """Asks each sample's own source.

        Where only some samples have source pictures, these and the others are two forwards.

        Args:
            latents: Float tensor [B, ...].
            sigma: Float tensor [B].
            conditioning: What the B samples are conditioned on.
            adapter: int64 tensor [B] on the CPU, the source of each sample; -1 for the base alone.

        Returns:
            The velocity [B, ...].

        Raises:
            ValueError: For an adapter of another shape or dtype, on the CPU for one that is not there, and for a layer
                whose input's first axis is not the batch.
        """
        if adapter.shape != (len(latents),) or adapter.dtype != torch.int64:
            raise ValueError(f"adapter must be int64 [{len(latents)}], got {adapter.dtype} {list(adapter.shape)}")
        self._check(adapter)
        return self._ask(latents, sigma, conditioning, adapter, same=False)

    def field(self, m: int) -> Field:
        """Makes one source a field.

        Args:
            m: The source's number; -1 for the base.

        Returns:
            The field (latents, sigma, conditioning) -> velocity.

        Raises:
            ValueError: For a source that is not there.
        """
        self._check(torch.tensor([m]))

        def velocity(latents, sigma, conditioning):
            adapter = _constant((m,), torch.int64, latents.device)
            return self._ask(latents, sigma, conditioning, adapter, same=True)

        return velocity

    def _check(self, adapter: torch.Tensor) -> None:
        """Checks on the host, where the numbers are there, that they name sources."""
        if adapter.device.type == "cpu" and len(adapter) and not -1 <= adapter.min() <= adapter.max() < self.count:
            raise ValueError(f"adapter must name one of {self.count} sources, or -1 for the base, got {adapter}")

    def student(self, latents, sigma, conditioning: Conditioning, student: nn.Module) -> torch.Tensor:
        """Asks the transformer with a student's adapter, differentiable in it.

        Args:
            latents: Float tensor [B, ...].
            sigma: Float tensor [B].
            conditioning: What the B samples are conditioned on.
            student: The `LoraStudent`.

        Returns:
            The velocity [B, ...].
        """
        return self._ask(latents, sigma, conditioning, None, same=True, student=student)

    def _ask(self, latents, sigma, conditioning, adapter, same, student=None):
        """Asks the transformer by `by_sources`, with the route set for each forward."""

        def ask(latents, sigma, conditioning, sources, rows):
            part = adapter if same or rows is None else adapter[rows]
            part = None if part is None else to_device(part, latents.device)
            with self._route.of(part, same, student):
                return self._velocity(
                    self.transformer, latents, sigma, conditioning.prompt, sources, conditioning.embedded_guidance
                )

        return by_sources(ask, latents, sigma, conditioning)


def target_layers(transformer: nn.Module, targets: Sequence[str], every: bool = True) -> list[str]:
    """Finds the linear layers whose names end in one of the targets, at a dot; a * in a target stands for anything.

    Args:
        transformer: The transformer.
        targets: Ends of names, such as ``attn.to_q`` or ``transformer_blocks.*.attn.to_q``.
        every: Whether each target must be found; else one of them.

    Returns:
        The layers' names, in the transformer's order.

    Raises:
        UserError: For a target that no layer has, or if not `every` one must be found, where none has any.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    found = {target: [n for n in linear if fnmatchcase(f".{n}", f"*.{target}")] for target in targets}
    unmatched = [target for target, names in found.items() if not names]
    if unmatched and (every or len(unmatched) == len(targets)):
        ends = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise UserError(f"no linear layer ends in {', '.join(unmatched)}; there are {', '.join(ends)}")
    return [name for name in linear if any(name in names for names in found.values())]
