"""Frozen sources of weights of their own over several ranks: whole on each, or in shards by ZeRO-3."""

from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import AutoModel
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

from danceopd.config.sections import Config
from danceopd.core.fields import Field
from danceopd.models.weights import Weights
from danceopd.support.errors import UserError
from danceopd.support.memory import format_bytes, free_bytes
from danceopd.support.ranks import Ranks
from danceopd.training.checkpoints import bounds
from danceopd.training.zero.lockstep import Lockstep


def shares_sources(config: Config, sources: list[nn.Module], device: torch.device, lockstep: Lockstep) -> bool:
    """Decides whether the sources are kept in shards; all ranks agree, and rank 0 says why.

    Args:
        config: The run's; training.shard_sources ``auto`` shards them where they take half of what is free.
        sources: The sources' networks, on the meta device.
        device: Where the run computes.
        lockstep: Holds the ranks.

    Returns:
        Whether they are.

    Raises:
        UserError: For what cannot be sharded.
    """
    wanted, ranks, training = config.training.shard_sources, lockstep.ranks, config.training
    fixed = [key for key in ("base_precision", "offload_sources") if getattr(training, key)]
    if wanted is True and fixed:
        raise UserError(f"training.shard_sources: not with training.{fixed[0]}; leave one of them out")
    if not sources or ranks.size == 1 or fixed:
        return False
    needed = sum(p.nbytes for network in sources for p in network.parameters())
    free = -ranks.most(-free_bytes(device))
    chosen = wanted is True or (wanted == "auto" and needed > free / 2)
    if ranks.rank == 0:
        how = f"in {ranks.size} shards" if chosen else "whole on each rank"
        names = f"{len(sources)} source" + "s" * (len(sources) > 1)
        print(
            f"{names} of {format_bytes(needed)} lie {how}: {format_bytes(free)} are free, "
            f"training.shard_sources is {wanted}"
        )
    return chosen


@torch.no_grad()
def built(folder: Path, weights: Weights, dtype: torch.dtype, ranks: Ranks, settings: dict | None) -> nn.Module:
    """Builds a transformer with these weights; all ranks do it at once.

    Args:
        folder: The folder with its configuration.
        weights: What it holds.
        dtype: The dtype of its parameters.
        ranks: The processes of the run.
        settings: DeepSpeed's, under which each rank reads and holds its shard alone, and no more than one layer whole
            while the network is made; None for the whole of it.

    Returns:
        The transformer, on the CPU, in eval mode.
    """
    where = nullcontext()
    if settings is not None:
        import deepspeed

        # The configuration gives the dtype: by Init's own argument a device without float16 gets bfloat16 in any case.
        zero = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": settings["zero_optimization"],
            "bf16": {"enabled": dtype == torch.bfloat16},
        }
        where = deepspeed.zero.Init(config_dict_or_path=zero)
    with where, no_init_weights():
        network = AutoModel.from_config(str(folder), local_files_only=True)
    if settings is None:
        nn.Module.to(network, dtype)
    for name, p in network.named_parameters():
        if settings is None:
            p.copy_(weights.tensor(name))
        else:
            own = p.ds_tensor.view(-1)
            start, stop = bounds(p.ds_numel, ranks.rank, ranks.size)
            own.zero_()[: stop - start].copy_(weights.read(name, start, stop))
    for name, buffer in network.named_buffers():
        if name in weights.shapes:
            buffer.copy_(weights.tensor(name))
    return network.eval()


def sharded(network: nn.Module, settings: dict) -> nn.Module:
    """Shards a frozen network, of which each rank has a part; a forward gathers the weights layer by layer.

    Args:
        network: The network, as `built` gives it.
        settings: DeepSpeed's.

    Returns:
        The network, in eval mode.
    """
    import deepspeed

    zero = settings.get("zero_optimization", {})
    kept = ("offload_param", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    own = {key: zero[key] for key in (*kept, "stage3_max_live_parameters", "stage3_max_reuse_distance") if key in zero}
    dtype = next(network.parameters()).dtype
    engine, *_ = deepspeed.initialize(
        model=network.requires_grad_(False).eval(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, **own},
            "bf16": {"enabled": dtype == torch.bfloat16},
            "steps_per_print": 2**31,
        },
    )
    return engine.module.eval()


def in_turn(field: Field, lockstep: Lockstep) -> Field:
    """Makes the field of a sharded network, which all ranks ask wherever one asks it.

    Args:
        field: The network as a field.
        lockstep: Keeps the ranks in step.

    Returns:
        The field.
    """

    @torch.no_grad()
    def ask(asked):
        return [field(*one) for one in asked]

    number = lockstep.add(ask)
    return lambda latents, sigma, conditioning: lockstep.ask(number, latents, sigma, conditioning)
