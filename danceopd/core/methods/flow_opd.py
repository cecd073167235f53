"""Flow-OPD (arXiv 2605.08063): policy gradient on SDE rollouts, the negative per-step KL to the source as reward."""

from functools import partial

import torch
from danceopd_kernels.routed_velocity_mse import Matched

from danceopd.core.batch import Batch
from danceopd.core.copies import to_device
from danceopd.core.fields import Field, routed
from danceopd.core.objectives import velocity_mse
from danceopd.core.questions import Questions
from danceopd.core.randomness import Generator
from danceopd.core.sde import kl, log_probability, sde_rollout, transition


def flow_opd(
    student: Field,
    sources: list[Field],
    batch: Batch,
    *,
    sigmas: torch.Tensor,
    anchor: Field,
    generator: Generator,
    noise_level: float = 0.7,
    group_size: int = 16,
    max_advantage: float = 5.0,
    clip_range: float = 1e-4,
    anchor_weight: float = 0.0,
    detach_advantage: bool = True,
    normalize_advantage: bool = True,
) -> Questions:
    """Rolls out groups of one prompt stochastically, and asks the routed source at every state.

    The reward of a step is minus its KL to the same step by the source; its advantage is normalised over the group and
    clipped. The group's mean and deviation carry no gradient, so they are worked out here, from the velocities that
    the rollout asked.

    Args:
        student, sources, batch, sigmas, generator: As in `danceopd`; each `group_size` samples in a row take the
            prompt and route of their first.
        anchor: The untrained student.
        noise_level: a of the transition's deviation.
        group_size: Number of SDE rollouts of one prompt.
        max_advantage: Bounds the advantage to +- this.
        clip_range: Bounds the ratio of probabilities to 1 +- this.
        anchor_weight: The factor of the per-step KL to the untrained student.
        detach_advantage: False keeps the reward's gradient, as the released code does: what it then descends is the
            distillation loss itself, over the group's deviation.
        normalize_advantage: False takes the reward itself as the advantage, times the step's length -dt, as the
            authors of DanceOPD run this baseline.

    Returns:
        B N questions; each weighs 1 / N.

    Raises:
        ValueError: If group_size does not divide B.
    """
    # Long: half of it says what the options are.
    if len(batch) % group_size:
        raise ValueError(f"group_size {group_size} does not divide {len(batch)} samples")
    sigmas = sigmas.cpu()
    steps, first = len(sigmas) - 1, torch.arange(len(batch)) // group_size * group_size
    conditioning = batch.conditioning[first]
    states, velocity, old = sde_rollout(student, batch.noise, conditioning, sigmas, noise_level, generator)
    z, after, velocity = (x.flatten(0, 1) for x in (states[:, :-1], states[:, 1:], velocity))
    depth, sample = torch.arange(steps).repeat(len(batch)), first.repeat_interleave(steps)
    levels = sigmas[depth]
    sigma = to_device(levels, z.device)
    answers = routed(sources, batch.route[sample], z, levels, batch.conditioning, sample)

    mean, deviation = transition(velocity, z, depth, sigmas, noise_level)
    wanted = transition(answers.target(), z, depth, sigmas, noise_level)[0]
    reward = -kl(mean, wanted, deviation).view(-1, group_size, steps)
    if normalize_advantage:
        centre, spread = reward.mean(1, keepdim=True), reward.std(1, keepdim=True) + 1e-6
    else:
        centre, spread = torch.zeros_like(reward), to_device(1 / (sigmas[:-1] - sigmas[1:]), z.device)
    rest = {"after": after, "old": old.flatten()}
    rest |= {"centre": centre.expand_as(reward).flatten(), "spread": spread.expand_as(reward).flatten()}
    rest["reward"] = reward.flatten()
    if anchor_weight:
        kept = anchor(z, sigma, batch.conditioning[sample])
        rest["kept"] = transition(kept, z, depth, sigmas, noise_level)[0]
    match = partial(
        clipped_policy,
        sigmas=sigmas,
        noise_level=noise_level,
        max_advantage=max_advantage,
        clip_range=clip_range,
        anchor_weight=anchor_weight,
        detach_advantage=detach_advantage,
    )
    weight = torch.full((len(z),), 1 / steps, device=z.device)
    return Questions(z, sigma, batch.conditioning, batch.route, sample, answers, weight, depth, match, rest)


def clipped_policy(
    velocity: torch.Tensor,
    q: Questions,
    *,
    sigmas: torch.Tensor,
    noise_level: float,
    max_advantage: float,
    clip_range: float,
    anchor_weight: float,
    detach_advantage: bool,
) -> Matched:
    """Takes the clipped policy loss of each step, max(-A r, -A clip(r)), r the ratio of its probabilities.

    Args:
        velocity: Float tensor [Q, ...], the student's, with gradient.
        q: The questions that `flow_opd` made.
        sigmas: float32 tensor [N + 1] on the CPU, the noise levels.
        noise_level, max_advantage, clip_range, anchor_weight, detach_advantage: As in `flow_opd`.

    Returns:
        The loss, and what is watched of the velocities.
    """
    assert q.depth is not None  # asked on the rollout
    target = q.answers.target()
    mean, deviation = transition(velocity, q.states, q.depth, sigmas, noise_level)
    reward = q.rest["reward"]
    if not detach_advantage:
        reward = -kl(mean, transition(target, q.states, q.depth, sigmas, noise_level)[0], deviation)
    advantage = ((reward - q.rest["centre"]) / q.rest["spread"]).clamp(-max_advantage, max_advantage)
    ratio = torch.exp(log_probability(q.rest["after"], mean, deviation) - q.rest["old"])
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
    if anchor_weight:
        loss = loss + anchor_weight * kl(mean, q.rest["kept"], deviation)
    seen = velocity.detach().to(target.dtype)
    norms = (seen.flatten(1).norm(dim=1), target.flatten(1).norm(dim=1))
    return Matched(loss * q.weight, velocity_mse(seen, target), *norms)
