"""Counts the network evaluations of an update."""

import torch

from danceopd.config.expressions import evaluations, parts
from danceopd.config.sections import Config
from danceopd.core.query import expected_depth, expected_shares
from danceopd.core.schedule import sigma_grid
from danceopd.training.previews import MODEL_SAMPLES, PREVIEW_SAMPLES


def evaluations_per_step(config: Config, sigmas: torch.Tensor | None = None) -> dict[str, float] | None:
    """Works out the expected forwards of one sample in an update of DanceOPD, by what they are for.

    It is the mean over a run, whose warm start rolls nothing out, with the capabilities' weights; a backward counts as
    two. Sources are asked at the noise levels of the queries, on which some depend.

    Args:
        config: The run's.
        sigmas: float32 tensor [N + 1], a model's noise levels; the configuration's if not given.

    Returns:
        None for other methods.
    """
    options = config.method_options()
    if config.method not in ("danceopd", "danceopd_fast"):
        return None
    capabilities, k = list(config.capabilities.values()), min(config.query.k, config.rollout.num_inference_steps)
    weights = [1.0 if config.route == "round_robin" else c.weight for c in capabilities]
    shares = [weight / sum(weights) for weight in weights]
    # Guidance asks the network twice: with the prompt, and with the empty one.
    own = sum(s * (1 + (c.student_guidance_scale != 1)) for s, c in zip(shares, capabilities, strict=True))
    if sigmas is None:
        sigmas = sigma_grid(config.rollout.num_inference_steps, config.rollout.shift)
    at = expected_shares(config.rollout.num_inference_steps, bias=config.query.bias, k=k)
    asked = [float(evaluations(config, c.source, sigmas[:-1]).double() @ at) for c in capabilities]
    routed = sum(s * n for s, n in zip(shares, asked, strict=True))
    source = sum(asked) if options.get("routing") == "soft" else routed
    steps = expected_depth(config.rollout.num_inference_steps, bias=config.query.bias, k=k)
    if config.rollout.solver == "heun":
        steps *= 2
    warm = options["warm_start"]
    queries = warm + (1 - warm) * k
    counts = {
        "rollout to the deepest state asked": (1 - warm) * steps * own,
        "source": warm * routed + (1 - warm) * k * source,
        "student, forward": queries * own,
        "student, backward": 2 * queries * own,
    }
    if config.training.gradient_checkpointing:
        counts["student, forward again"] = queries * own
    return {name: config.training.batch_size * count for name, count in counts.items()}


def operator_lines(config: Config) -> list[str]:
    """Says of each source that is made of others what it is made of, and how many evaluations a query of it takes."""
    lines = []
    for name in dict.fromkeys(capability.source for capability in config.capabilities.values()):
        if kind := config.sources[name].operator():
            of = ", ".join(part for _, part in parts(config, name))
            counts = evaluations(config, name, torch.linspace(0, 1, 1001))
            least, most = int(counts.min()), int(counts.max())
            each = f"{most}" if least == most else f"{least} to {most}, by the noise level"
            lines.append(f"source {name}: {kind} of {of}; evaluations of a query: {each}")
    return lines


def grid_evaluations(config: Config) -> tuple[int, int]:
    """Counts the forwards of one sample for a sample grid, and for the sources' rows, which are drawn once in a run.

    Of a source that depends on the noise level it takes the mean over the configuration's.
    """
    count = (MODEL_SAMPLES if config.model else PREVIEW_SAMPLES) * config.evaluation.num_inference_steps
    if config.evaluation.solver == "heun":
        count = 2 * count - count // config.evaluation.num_inference_steps  # its last step is Euler's
    own = sum(1 + (c.student_guidance_scale != 1) for c in config.capabilities.values())
    sigmas = sigma_grid(config.evaluation.num_inference_steps, config.rollout.shift)[:-1]
    asked = [evaluations(config, c.source, sigmas).double().mean() for c in config.capabilities.values()]
    return count * own, round(count * float(sum(asked)))
