"""Weight merge: the mean of the sources' parameters, no training."""

import copy

import torch

from danceopd.backbones.dit import DiT


@torch.no_grad()
def weight_merge(networks: list[DiT], weights: list[float] | None = None) -> DiT:
    """A network whose every parameter is the weighted mean (uniform without weights) of the others'.

    Raises ValueError if the configurations differ or the weights do not sum to a positive number.
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
