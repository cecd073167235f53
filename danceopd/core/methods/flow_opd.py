"""Flow-OPD (arXiv 2605.08063): policy gradient on SDE rollouts, the negative per-step KL to the source as reward."""

import torch

from danceopd.core.batch import Batch
from danceopd.core.fields import Field, routed
from danceopd.core.methods.options import GroupSize, Positive, Weight
from danceopd.core.randomness import Generator
from danceopd.core.sde import kl, log_probability, sde_rollout, transition
from danceopd.core.watch import Observed
from danceopd.support.errors import UserError


def flow_opd_loss(
    student: Field,
    sources: list[Field],
    batch: Batch,
    *,
    sigmas: torch.Tensor,
    anchor: Field,
    generator: Generator,
    noise_level: Positive = 0.7,
    group_size: GroupSize = 16,
    max_advantage: Positive = 5.0,
    clip_range: Positive = 1e-4,
    anchor_weight: Weight = 0.0,
    detach_advantage: bool = True,
) -> Observed:
    """The clipped policy loss of B samples: B / group_size prompts, group_size SDE rollouts of each; mean over steps.

    The reward of a step is minus its KL to the same step by the routed source; its advantage is normalised over
    the group and clipped. detach_advantage False keeps the reward's gradient, as the released code does: what it
    then descends is the distillation loss itself, over the group's deviation. anchor_weight: of the per-step KL to
    the untrained student.
    Raises UserError if group_size does not divide B.
    """
    if len(batch) % group_size:
        raise UserError(f"options.group_size: {group_size} does not divide the {len(batch)} samples of a micro-batch")
    prompt = torch.arange(len(batch) // group_size).repeat_interleave(group_size)
    conditioning, prompt_route = batch.conditioning[prompt], batch.route[prompt]
    steps = len(sigmas) - 1
    states, old = sde_rollout(student, batch.noise, conditioning, sigmas, noise_level, generator)
    z, following = states[:, :-1].flatten(0, 1), states[:, 1:].flatten(0, 1)
    depth = torch.arange(steps).repeat(len(batch))
    conditioning, route = conditioning.repeat(steps), prompt_route.repeat_interleave(steps)
    target = routed(sources, route, z, sigmas[depth], conditioning)
    velocity = student(z, sigmas[depth], conditioning)

    mean, deviation = transition(velocity, z, depth, sigmas, noise_level)
    reward = -kl(mean, transition(target, z, depth, sigmas, noise_level)[0], deviation)
    grouped = reward.view(-1, group_size, steps)
    group = grouped.detach()  # its statistics never carry a gradient, or what the rewards carry would cancel
    advantage = (grouped - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-6)
    advantage = advantage.clamp(-max_advantage, max_advantage).flatten()
    if detach_advantage:
        advantage = advantage.detach()
    ratio = torch.exp(log_probability(following, mean, deviation) - old.flatten())
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    if anchor_weight:
        with torch.no_grad():
            kept = transition(anchor(z, sigmas[depth], conditioning), z, depth, sigmas, noise_level)[0]
        loss = loss + anchor_weight * kl(mean, kept, deviation)
    return Observed(loss.view(-1, steps).mean(1), prompt_route, depth, z, velocity.detach(), target)
