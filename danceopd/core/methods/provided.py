"""What the loop provides to a method, by keyword."""

import inspect

from danceopd.core.methods import METHODS

# Why a method's rollout cannot be that of a network near the student (training.rollout_precision).
OWN_ROLLOUT = {
    "joint": "rolls nothing out",
    "off_policy": "does not roll the student out",
    "flow_opd": "compares its rollout's log-probabilities with the student's own",
}

PROVIDED = {
    "sigmas": "noise levels of the rollout [N + 1]",
    "shift": "their shift towards noise",
    "solver": "of the rollout",
    "bias": "of the query",
    "k": "queries a trajectory",
    "gap": "error at each trajectory index [N], or None before the first update",
    "progress": "of the run, 0 to 1",
    "part": "number of the micro-batch in its update",
    "clean": "the data's pictures [B, ...]",
    "ema": "the student's average as a field",
    "anchor": "the untrained student as a field",
    "counter": "network evaluations by name",
    "generator": "of this update's randomness",
}


def _keywords(name: str) -> dict[str, inspect.Parameter]:
    method = METHODS[name]
    signature = inspect.signature(method.__call__ if inspect.isclass(method) else method)
    return {key: p for key, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}


def needs(name: str) -> set[str]:
    """What a method wants from the loop."""
    return PROVIDED.keys() & _keywords(name).keys()
