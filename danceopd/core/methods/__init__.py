"""The methods by the name that a configuration gives them.

A method is a function `loss(student, sources, batch, *, ...) -> Observed`, or a class of such callables that is
made with the student's network and keeps a state between updates (state_dict, load_state_dict). Of what the loop
can provide, `PROVIDED`, it is given what it names by keyword; every other keyword, with its default, is an option
of the configuration's `options` section.
"""

from danceopd.core.methods.consistency import consistency_loss
from danceopd.core.methods.danceopd import danceopd_loss
from danceopd.core.methods.danceopd_fast import danceopd_fast_loss
from danceopd.core.methods.diffusion_opd import diffusion_opd_loss
from danceopd.core.methods.flow_opd import flow_opd_loss
from danceopd.core.methods.joint import joint_loss
from danceopd.core.methods.off_policy import off_policy_loss
from danceopd.core.methods.pooled import Pooled
from danceopd.core.methods.score_distillation import DMD, sds_loss

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
