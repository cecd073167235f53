"""What a run of the embedded network takes."""

import math

import torch

from danceopd.config.sections import Config
from danceopd.core.conditioning import Conditioning
from danceopd.core.methods import needs
from danceopd.models.fp8 import to_fp8
from danceopd.planning.backward import kept_for_backward, operations
from danceopd.planning.memory import FLOAT, Plan, _add_activations, _add_states, _trained, count, nbytes
from danceopd.world.build import load_data
from danceopd.world.dit import DiT
from danceopd.world.files import read_config, resolve_weights


def _embedded(config: Config, plan: Plan) -> None:
    attempt = plan.attempt

    def network(weights: str) -> DiT:
        with torch.device("meta"):
            return DiT(read_config(resolve_weights(weights)))

    student = attempt("student.init_from", network, config.student.init_from)
    sources = {name: attempt(f"sources.{name}.weights", network, s.weights) for name, s in config.sources.items()}
    for name, source in sources.items():
        if source and student and source.config != student.config:
            plan.problems.append(f"sources.{name}.weights: its network {source.config} is not the student's")
    size = student.config.image_size if student else 32
    for name, capability in config.capabilities.items():
        rows = attempt(f"capabilities.{name}.data", load_data, name, capability, size, "clean" in needs(config.method))
        if rows is not None:
            plan.found.append(f"{name}: {len(rows)} rows")
    plan.parameters |= {f"source {name}": count(source) for name, source in sources.items() if source}
    total, how = sum(count(source) for source in sources.values() if source), "4 bytes, float32"
    size_of_sources = FLOAT * total
    if config.training.base_precision == "fp8":
        how = "1 byte in the blocks' linear layers, 4 elsewhere"
        size_of_sources = sum(nbytes(to_fp8(source)) for source in sources.values() if source)
    plan.memory["source weights"] = size_of_sources, f"{total:,} x {how}"
    if student is None:
        return
    _trained(config, plan, student)
    tokens = torch.zeros(1, student.config.text_length, dtype=torch.int64)
    edits = any(capability.task == "edit" for capability in config.capabilities.values())
    shape = (3, size, size)
    source = torch.zeros(1, *shape)
    conditioning = Conditioning(tokens, source if edits else None, torch.tensor([edits]))
    plan.operations = lambda: {
        name: operations(student, shape, Conditioning(tokens, source, torch.tensor([c.task == "edit"])))
        for name, c in config.capabilities.items()
    }
    _add_activations(config, plan, *kept_for_backward(student, None, shape, conditioning))
    _add_states(config, plan, FLOAT * math.prod(shape))
