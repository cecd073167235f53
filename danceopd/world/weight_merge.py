"""Merges networks without training: means of their parameters, and of LoRA adapters by PEFT's own combinations."""

import copy

import torch

from danceopd.world.dit import DiT

COMBINATIONS = ("linear", "cat", "svd", "ties", "dare_ties")


@torch.no_grad()
def weight_merge(networks: list[DiT], weights: list[float] | None = None) -> DiT:
    """Returns a network whose every parameter is the weighted mean (uniform without weights) of the others'.

    Raises:
        ValueError: The configurations differ, or the weights do not sum to a positive number.
    """
    if any(network.config != networks[0].config for network in networks):
        raise ValueError("only networks of one configuration can be merged")
    share = torch.tensor(weights if weights is not None else [1.0] * len(networks), dtype=torch.float64)
    if len(share) != len(networks) or not share.sum() > 0:
        raise ValueError(f"need one weight per network with a positive sum, got {share.tolist()}")
    share = (share / share.sum()).tolist()
    merged, states = copy.deepcopy(networks[0]), [network.state_dict() for network in networks]
    merged.load_state_dict(
        {key: sum(w * state[key] for w, state in zip(share, states, strict=True)) for key in states[0]}
    )
    return merged


@torch.no_grad()
def as_lora(base: DiT, networks: list[DiT], rank: int):
    """Makes a PEFT model of the base with an adapter "0", "1", ... for each network: the best of that rank.

    Each is the truncated SVD of what the network's linear layers differ in; everything else stays the base's.
    """
    from peft import LoraConfig, get_peft_model

    names = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    # A layer's own rank may be smaller; PEFT wants one rank for all, and the rest is zeros.
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, lora_bias=False)
    model = get_peft_model(copy.deepcopy(base), config, adapter_name="0")
    for i in range(1, len(networks)):
        model.add_adapter(str(i), config)
    layers = dict(model.base_model.model.named_modules())
    for i, network in enumerate(networks):
        theirs = dict(network.named_modules())
        for name, module in base.named_modules():
            if name not in names:
                continue
            u, s, vh = torch.linalg.svd(theirs[name].weight - module.weight, full_matrices=False)
            root, layer = s[:rank].sqrt(), layers[name]
            down, up = layer.lora_A[str(i)].weight, layer.lora_B[str(i)].weight
            down.zero_()[: len(root)] = root[:, None] * vh[:rank]
            up.zero_()[:, : len(root)] = u[:, :rank] * root
    return model


@torch.no_grad()
def lora_merge(
    base: DiT,
    networks: list[DiT],
    combination: str,
    weights: list[float],
    *,
    rank: int | None = None,
    density: float = 0.5,
) -> DiT:
    """Merges the networks' adapters (see `as_lora`) into the base by PEFT's add_weighted_adapter.

    Args:
        base: The network that the others began as.
        networks: The others.
        combination: One of COMBINATIONS.
        weights: Of each adapter.
        rank: The smallest side of any layer if not given, above which svd cannot go.
        density: The share of entries that ties and dare_ties keep.

    Raises:
        ValueError: There is no such combination.
    """
    if combination not in COMBINATIONS:
        raise ValueError(f"unknown combination {combination!r}; use one of {', '.join(COMBINATIONS)}")
    sides = (min(m.weight.shape) for m in base.modules() if isinstance(m, torch.nn.Linear))
    model = as_lora(base, networks, rank or min(sides))
    return combined(model, combination, weights, density)


def combined(model, combination: str, weights: list[float], density: float):
    """Merges the adapters "0", "1", ... of a PEFT model into its weights, by PEFT's add_weighted_adapter.

    Args:
        model: A PeftModel.
        combination: PEFT's name of it.
        weights: Of each adapter.
        density: The share of entries that a combination keeps which prunes.

    Returns:
        The network in eval mode.
    """
    prunes = any(word in combination for word in ("ties", "dare", "prune"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # dare drops entries at random
        names = [str(i) for i in range(len(weights))]
        model.add_weighted_adapter(
            names, weights, "merged", combination_type=combination, density=density if prunes else None
        )
    model.set_adapter("merged")
    return model.merge_and_unload().eval()
