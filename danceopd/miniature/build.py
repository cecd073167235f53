"""Puts a run on the miniature together: a model's run whose students can be scored while they train."""

from dataclasses import replace

from danceopd.config.sections import Config
from danceopd.core.fields import Field
from danceopd.miniature.evaluate import Canvas, score_gedit, score_geneval
from danceopd.support.ranks import ALONE, Ranks
from danceopd.training.assembly.build import build_model
from danceopd.training.assembly.parts import Parts


def build(config: Config, ranks: Ranks = ALONE, settings: dict | None = None) -> Parts:
    """Loads the parts as training.assembly.build.build_model does, and adds their scores where they are asked.

    Args:
        config: The configuration, whose `model` is the miniature.
        ranks, settings: As for build_model.

    Raises:
        UserError: As build_model.
    """
    parts = build_model(config, ranks, settings)
    if not config.evaluation.times:
        return parts  # without its text encoder and VAE
    canvas = Canvas(config.model, config.evaluation.num_inference_steps)

    def score(field: Field) -> dict[str, float]:
        draw, seed, pictures = canvas.drawer(field), config.evaluation.seed + 7, config.evaluation.quick
        return {
            "geneval_overall": score_geneval(draw, seed, pictures)["overall"],
            "gedit_average": score_gedit(draw, seed, pictures)["average"],
        }

    return replace(parts, score=score)
