"""The student as a field: in its precision, guided, in parts that fit."""

import torch

from danceopd.config.sections import Config
from danceopd.core.batch import Batch
from danceopd.core.fields import Field, guided
from danceopd.training.assembly.parts import Parts


def micro_batches(config: Config, batch: Batch) -> list[Batch]:
    """Parts no larger than those of an update, so that where training fits this does too."""
    size = config.training.batch_size // config.training.gradient_accumulation_steps
    return [batch[i : i + size] for i in range(0, len(batch), size)]


def guidance_scales(config: Config) -> list[float] | None:
    """The student's own scale for each capability's samples; None where all are 1."""
    scales = [capability.student_guidance_scale for capability in config.capabilities.values()]
    return None if all(scale == 1 for scale in scales) else scales


def as_trained(config: Config, parts: Parts, network: Field) -> Field:
    """The student's network, or another in its place, as the field that is trained: in its precision, guided."""
    velocity = in_precision(config, parts, network)
    if guidance_scales(config) is None:
        return velocity
    return guided(velocity, parts.empty_prompt, combine=parts.combine)


def in_precision(config: Config, parts: Parts, network: Field) -> Field:
    """A network as a field in the student's precision."""
    bf16 = config.training.precision == "bf16" and not config.model

    def velocity(latents, sigma, conditioning):
        with torch.autocast(parts.device.type, dtype=torch.bfloat16, enabled=bf16):
            return network(latents, sigma, conditioning)

    return velocity
