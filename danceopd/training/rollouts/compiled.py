"""Compiles the repeated blocks of a transformer."""

from collections.abc import Callable

from torch import nn

from danceopd.models.blocks import blocks
from danceopd.models.fp8 import Fp8Linear


def compile_blocks(network: nn.Module, backend: str | Callable = "inductor") -> int:
    """Compiles each repeated block of a transformer in place, by torch.compile: the modules in the lists at its top.

    Blocks of one class and layout share what is compiled. A second size of the batch makes the size a symbol, and no
    further one compiles anything but a single sample, which torch always takes apart. Layers with adapters, each of
    which is looked up by its name, run as they are: compiled, each block would be one of its own. So do those in FP8,
    whose kernels torch does not see into.

    Args:
        network: The transformer, or a student that has one.
        backend: As torch.compile takes it.

    Returns:
        The number of blocks.
    """
    import torch._dynamo  # takes its time

    transformer = getattr(network, "transformer", network)
    repeated = blocks(transformer)
    # Layouts, with and without source pictures, gradient or none: a few times the default.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in repeated:
        for module in block.modules():
            if hasattr(module, "route") or isinstance(module, Fp8Linear):
                module.forward = torch.compiler.disable(module.forward)
        block.compile(backend=backend)
    return len(repeated)
