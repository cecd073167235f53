"""The methods by the name that a configuration gives them, a file each."""

import inspect

from danceopd.core.methods.consistency import consistency
from danceopd.core.methods.danceopd import danceopd
from danceopd.core.methods.danceopd_fast import danceopd_fast
from danceopd.core.methods.diffusion_opd import diffusion_opd
from danceopd.core.methods.dmd import DMD
from danceopd.core.methods.flow_opd import flow_opd
from danceopd.core.methods.joint import joint
from danceopd.core.methods.off_policy import off_policy
from danceopd.core.methods.pooled import Pooled
from danceopd.core.methods.sds import sds

# A method turns the whole local batch into questions, without gradient:
# method(student, sources, batch, *, ...) -> Questions, or a dict of them where it trains more than the student. It is
# given by keyword what it names of PROVIDED; every other keyword, with its default, is an option of the configuration's
# "options" section. A method that keeps a state between updates is a class of such callables, made with the student's
# network, with state_dict and load_state_dict.
METHODS = {
    "danceopd": danceopd,
    "danceopd_fast": danceopd_fast,
    "joint": joint,
    "off_policy": off_policy,
    "diffusion_opd": diffusion_opd,
    "flow_opd": flow_opd,
    "consistency": consistency,
    "sds": sds,
    "dmd": DMD,
    "pooled": Pooled,
}

# Why a method's rollout cannot be that of a network near the student (training.rollout_precision).
OWN_ROLLOUT = {
    "joint": "rolls nothing out",
    "off_policy": "does not roll the student out",
    "flow_opd": "compares its rollout's log-probabilities with the student's own",
    "sds": "asks its sources at the student's own clean estimates",
    "dmd": "asks its sources at the student's own clean estimates",
}

PROVIDED = {
    "sigmas": "the noise levels of the rollout [N + 1]",
    "shift": "the shift of the noise levels towards noise",
    "solver": "the solver of the rollout",
    "bias": "the bias of the query",
    "k": "the number of queries a trajectory",
    "gap": "the error at each trajectory index [N], or None before the first update",
    "progress": "the share of the run that is done, 0 to 1",
    "clean": "the data's pictures [B, ...]",
    "ema": "the student's average as a field",
    "anchor": "the untrained student as a field",
    "fake": "the fake score network as a field, of a method that trains one",
    "generator": "the generator of this update's randomness",
}


def keywords(name: str) -> dict[str, inspect.Parameter]:
    """Lists the keyword parameters of a method.

    Args:
        name: A key of `METHODS`.

    Returns:
        The parameters by their names.
    """
    method = METHODS[name]
    signature = inspect.signature(method.__call__ if inspect.isclass(method) else method)
    return {key: p for key, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}


def needs(name: str) -> set[str]:
    """Names what a method wants of `PROVIDED`.

    Args:
        name: A key of `METHODS`.

    Returns:
        Keys of `PROVIDED`.
    """
    return PROVIDED.keys() & keywords(name).keys()
