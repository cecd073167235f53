"""The methods by the name that a configuration gives them.

A method is a function `loss(student, sources, batch, *, ...) -> Observed`, or a class of such callables that is
made with the student's network and keeps a state between updates (state_dict, load_state_dict). Of what the loop
can provide, `PROVIDED`, it is given what it names by keyword; every other keyword, with its default, is an option
of the configuration's `options` section.
"""

import inspect
from functools import cache

from pydantic import BaseModel, ConfigDict, create_model

from danceopd.methods.consistency import consistency_loss
from danceopd.methods.danceopd import danceopd_loss
from danceopd.methods.danceopd_fast import danceopd_fast_loss
from danceopd.methods.diffusion_opd import diffusion_opd_loss
from danceopd.methods.flow_opd import flow_opd_loss
from danceopd.methods.joint import joint_loss
from danceopd.methods.off_policy import off_policy_loss
from danceopd.methods.pooled import Pooled
from danceopd.methods.score_distillation import DMD, sds_loss

METHODS = {
    "danceopd": danceopd_loss,
    "danceopd_fast": danceopd_fast_loss,
    "joint": joint_loss,
    "off_policy": off_policy_loss,
    "diffusion_opd": diffusion_opd_loss,
    "flow_opd": flow_opd_loss,
    "consistency": consistency_loss,
    "sds": sds_loss,
    "dmd": DMD,
    "pooled": Pooled,
}

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


@cache
def options(name: str) -> type[BaseModel]:
    """A method's options, their types and defaults, as a model that a configuration is checked against."""
    fields = {key: (p.annotation, p.default) for key, p in _keywords(name).items() if key not in PROVIDED}
    return create_model(f"{name}_options", __config__=ConfigDict(extra="forbid", frozen=True), **fields)
