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
    """Whether the sources are kept in shards: as training.shard_sources says, or where they take half of what is free.

    sources: on the meta device. All ranks agree; rank 0 says why. Raises UserError for what cannot be sharded.
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
    """A transformer with these weights, on the CPU, in eval mode.

    folder: with its configuration; settings: DeepSpeed's, under which each rank reads and holds its shard alone, and
    no more than one layer whole while the network is made; None for the whole of it. All ranks make it at once.
    """
    where = nullcontext()
    if settings is not None:
        import deepspeed

        # By the configuration: with Init's own dtype a device without float16 gets bfloat16, whatever is asked.
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
    """A frozen network, each rank with a part of its weights; a forward gathers them layer by layer."""
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
    """A sharded network's field, asked on all ranks wherever one asks it."""

    @torch.no_grad()
    def ask(asked):
        return [field(*one) for one in asked]

    number = lockstep.add(ask)
    return lambda latents, sigma, conditioning: lockstep.ask(number, latents, sigma, conditioning)
