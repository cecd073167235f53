"""Warns of a base, or of a source, that was distilled to a few steps."""

from types import ModuleType

from danceopd.config.sections import Config
from danceopd.models.distilled import why_distilled
from danceopd.support.texts import many


def distilled_bases(config: Config, backbone: ModuleType) -> list[str]:
    """Says of a run's model and of its sources' own weights which of them were distilled to a few steps.

    Args:
        config: The run's configuration, of a diffusers model.
        backbone: The module of the model's family.

    Returns:
        A line for each, none with `allow_distilled_base`.
    """
    if config.allow_distilled_base:
        return []
    named = {"model": config.model}
    named |= {f"sources.{name}.weights": source.weights for name, source in config.sources.items()}
    lines, steps = [], config.rollout.num_inference_steps
    for key, weights in named.items():
        if weights in (None, "base") or not (why := why_distilled(weights, backbone)):
            continue
        lines.append(
            f"{key}: {weights} was distilled to a few steps ({why}): it answers with jumps towards a finished picture, "
            f"not with the velocity at each noise level, so a rollout of {many(steps, 'step')} leaves the path that "
            "it knows, guidance is applied to it a second time, and training undoes the distillation. Take "
            f"{backbone.BASE}, or give allow_distilled_base: true, which goes on without this line"
        )
    return lines
