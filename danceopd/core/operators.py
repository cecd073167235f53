"""Operators over fields: sources made of other sources.

v is the velocity of a field, c the sample's prompt. Another text is given in one of two forms: encoded, one sample's
`Conditioning.prompt` without the batch, or by name, the key of each sample's own in `Conditioning.texts`. Everything
here is without gradient: an operator is a source.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from danceopd.core.conditioning import Tensors
from danceopd.core.expressions import Mixed, Text, Weights, summed
from danceopd.core.fields import Field, Operator, as_operator

Interval = tuple[float, float]
Rule = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
EVERYWHERE: Interval = (0.0, 1.0)


# ------------------------------------------------------------------------------------------- rules of guidance


def _scalar(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.view(-1, *(1,) * (like.dim() - 1))


def zero_star(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Guides by CFG-Zero* (arXiv 2503.18886).

        a u + s (v - a u),  a = <v, u> / |u|^2

    The paper's other part, a velocity of zero in a sampler's first steps, belongs to that sampler and not to the field.

    Args:
        cond: Float tensor [n, ...], v.
        uncond: Float tensor [n, ...], u.
        scale: s.

    Returns:
        Float tensor [n, ...].
    """
    v, u = cond.flatten(1), uncond.flatten(1)
    a = _scalar((v * u).sum(1) / (u.square().sum(1) + 1e-8), cond)
    return a * uncond + scale * (cond - a * uncond)


def projected(cond: torch.Tensor, uncond: torch.Tensor, scale: float, eta: float, norm: float) -> torch.Tensor:
    """Guides by adaptive projected guidance, APG (arXiv 2410.02416).

        u + s (d_orthogonal + eta d_parallel),  to v and along it, d = v - u

    d is shortened to the norm where it is longer, and as in diffusers v stands where the paper has the clean estimate.
    The paper's momentum is left out: it remembers a sampler's
    earlier steps, which a field does not know.

    Args:
        cond: Float tensor [n, ...], v.
        uncond: Float tensor [n, ...], u.
        scale: s.
        eta: The share of what is parallel to v; 1 is plain guidance.
        norm: The longest d; 0 leaves it as it is.

    Returns:
        Float tensor [n, ...].
    """
    d = (cond - uncond).flatten(1)
    if norm > 0:
        d = d * (norm / d.norm(dim=1, keepdim=True)).clamp(max=1)
    v = F.normalize(cond.flatten(1).double(), dim=1)
    parallel = ((d.double() * v).sum(1, keepdim=True) * v).to(d.dtype)
    return uncond + scale * (d - parallel + eta * parallel).view_as(cond)


def rescaled(guided: torch.Tensor, cond: torch.Tensor, share: float) -> torch.Tensor:
    """Brings guided velocities back to the deviation of v (arXiv 2305.08891, section 3.4).

        share g std(v) / std(g) + (1 - share) g

    Args:
        guided: Float tensor [n, ...], g.
        cond: Float tensor [n, ...], v.
        share: From 0, g itself, to 1.

    Returns:
        Float tensor [n, ...].
    """
    ratio = cond.flatten(1).std(1) / guided.flatten(1).std(1)
    return guided * _scalar(share * ratio + (1 - share), guided)


# --------------------------------------------------------------------------------------------------- operators


def _text(given: str | Tensors | Text) -> Text:
    if isinstance(given, Text):
        return given
    return Text(given) if isinstance(given, str) else Text(f"the text at {id(given)}", given)


def _sum(parts: Sequence[Field], weights: Sequence[float] | Weights) -> Operator:
    """Makes sum_i weights_i part_i; weights: numbers, or a function of noise levels [n] -> [n, parts]."""
    own = [as_operator(part) for part in parts]
    if callable(weights):
        return Operator(*summed(own, weights))
    numbers = torch.tensor([list(weights)], dtype=torch.float64)
    return Operator(*summed(own, lambda sigma: numbers.expand(len(sigma), -1)))


def _guided(field: Field, other: Field, scale: float, interval: Interval) -> Operator:
    """Makes other + s (field - other), and the field itself outside the interval."""
    return _in(interval, _sum([field, other], [scale, 1 - scale]), field)


def _in(interval: Interval, field: Field, otherwise: Field) -> Operator:
    """Asks one field inside an interval and another outside."""

    def weights(sigma: torch.Tensor) -> torch.Tensor:
        inside = _inside(sigma, interval)
        return torch.stack([inside, 1 - inside], dim=1)

    return _sum([field, otherwise], weights)


def _inside(sigma: torch.Tensor, interval: Interval) -> torch.Tensor:
    """Tells which noise levels lie in an interval, its ends among them: float64 [n], 1 or 0."""
    low, high = (torch.tensor(end, dtype=torch.float32).double() for end in interval)  # a batch's sigma is float32
    return ((sigma >= low) & (sigma <= high)).double()


def guided_source(
    field: Field,
    scale: float,
    negative: str | Tensors,
    *,
    interval: Interval = EVERYWHERE,
    rule: Rule | None = None,
    rescale: float = 0.0,
) -> Operator:
    """Guides a source inside an interval of noise levels; outside it is as it was.

        u + s (v - u),  u = v(negative)

    Classifier-free guidance (arXiv 2207.12598), in an interval (arXiv 2404.07724), with another prompt in the place of
    the empty one, or by another rule. The plain rule is combined in the loss, others are written. Two evaluations, one
    outside the interval.

    Args:
        field: The source.
        scale: s.
        negative: The other prompt, encoded or by name; "" is each sample's own empty prompt.
        interval: The noise levels (low, high) at which it is guided, both among them.
        rule: ``rule(v, u, s) -> velocity``, such as `zero_star`, or `projected` with its options; the plain rule if not
            given.
        rescale: The share of `rescaled` after the rule.

    Returns:
        The guided source.

    Example:
        >>> def field(latents, sigma, conditioning):  # its velocity is its prompt
        ...     return conditioning.prompt[:, None].expand_as(latents)
        >>> strong = guided_source(field, 3.0, torch.tensor(1.0), interval=(0.5, 1.0))
        >>> strong(torch.zeros(2, 1), torch.tensor([0.9, 0.1]), Conditioning(torch.tensor([2.0, 2.0])))
        tensor([[4.],
                [2.]])
    """
    own = as_operator(field)
    without = own.at(_text(negative), fixed=True)
    if rule is None:
        strong = _guided(own, without, scale, interval)
    else:
        strong = _in(interval, _mixed((own, without), lambda cond, uncond: rule(cond, uncond, scale)), own)
    return rescaled_source(strong, own, rescale, intervals=[interval]) if rescale else strong


def rescaled_source(
    field: Field, source: Field, share: float, *, intervals: Sequence[Interval] = (EVERYWHERE,)
) -> Operator:
    """Brings a guided source back to the deviation of the source that is guided, by `rescaled`.

    It comes last, over all that guides, as in diffusers' guiders. No evaluation more.

    Args:
        field: The guided source.
        source: What is guided.
        share: The share of what is brought back.
        intervals: The noise levels (low, high) at which it is; outside all of them the field stays as it is.

    Returns:
        The source of that deviation.

    Example:
        >>> def plain(gain):
        ...     return lambda latents, sigma, conditioning: gain * latents
        >>> strong = rescaled_source(plain(4.0), plain(2.0), 0.5)
        >>> strong(torch.tensor([[-1.0, 1.0]]), torch.ones(1), Conditioning(torch.zeros(1)))
        tensor([[-3.,  3.]])
    """
    own, strong = as_operator(source), as_operator(field)
    back = _mixed((strong, own), lambda guided, cond: rescaled(guided, cond, share))

    def weights(sigma: torch.Tensor) -> torch.Tensor:
        inside = torch.stack([_inside(sigma, interval) for interval in intervals]).amax(0)
        return torch.stack([inside, 1 - inside], dim=1)

    return _sum([back, strong], weights)


def _mixed(parts: tuple[Operator, ...], combine: Callable[..., torch.Tensor]) -> Operator:
    """Makes a combination that is not linear."""
    return Operator((Mixed(parts, combine),), lambda sigma: torch.ones(len(sigma), 1, dtype=torch.float64))


def autoguided(field: Field, weak: Field, scale: float, *, interval: Interval = EVERYWHERE) -> Operator:
    """Guides a source by a weaker one inside an interval of noise levels; outside it is as it was.

        w + s (v - w),  w the weaker one's velocity

    Autoguidance (arXiv 2406.02507). Combined in the loss. Two evaluations, one outside the interval.

    Args:
        field: The source.
        weak: The weaker one: of fewer updates, less capacity, or with blocks left out.
        scale: s.
        interval: The noise levels (low, high) at which it is guided, both among them.

    Returns:
        The guided source.

    Example:
        >>> def plain(gain):
        ...     return lambda latents, sigma, conditioning: gain * latents
        >>> autoguided(plain(2.0), plain(1.5), 3.0)(torch.ones(1, 1), torch.ones(1), Conditioning(torch.zeros(1)))
        tensor([[3.]])
    """

    return _guided(field, weak, scale, interval)


def without_layers(field: Field, source: Field, skipped: Field, scale: float, *, interval: Interval) -> Operator:
    """Adds skip-layer guidance to a source inside an interval of noise levels.

        field + s (v - v_skipped)

    As in Stable Diffusion 3.5; arXiv 2411.18664 does the same with other blocks. One evaluation more, or two where v is
    not among the field's.

    Args:
        field: What it is added to: the source, guided or not.
        source: v.
        skipped: The same network without some of its blocks.
        scale: s.
        interval: The noise levels (low, high) at which it is added, both among them.

    Returns:
        The guided source.

    Example:
        >>> def plain(gain):
        ...     return lambda latents, sigma, conditioning: gain * latents
        >>> v = plain(2.0)
        >>> without_layers(v, v, plain(1.5), 2.0, interval=(0.0, 1.0))(
        ...     torch.ones(1, 1), torch.ones(1), Conditioning(torch.zeros(1))
        ... )
        tensor([[3.]])
    """

    def weights(sigma: torch.Tensor) -> torch.Tensor:
        s = scale * _inside(sigma, interval)
        return torch.stack([torch.ones_like(s), s, -s], dim=1)

    return _sum([field, source, skipped], weights)


def compose(base: Field, fields: Sequence[Field], weights: Sequence[float]) -> Operator:
    """Adds up what several sources change of one base.

        v_base + sum_i w_i (v_i - v_base)

    Composition of scores (arXiv 2206.01714) with a base in the place of the unconditional one. An evaluation for the
    base, unless the weights sum to 1, and one for each source.

    Args:
        base: The field that all of them are changes of.
        fields: The sources.
        weights: w, a number each.

    Returns:
        The sum.

    Raises:
        ValueError: If there are not as many weights as sources.

    Example:
        >>> def plain(gain):
        ...     return lambda latents, sigma, conditioning: gain * latents
        >>> both = compose(plain(1.0), [plain(2.0), plain(4.0)], [0.5, 1.0])
        >>> both(torch.ones(1, 1), torch.ones(1), Conditioning(torch.zeros(1)))
        tensor([[4.5000]])
    """
    if len(fields) != len(weights):
        raise ValueError(f"{len(weights)} weights for {len(fields)} sources")
    return _sum([base, *fields], [1 - sum(weights), *weights])


def difference(base: Field, field: Field, weight: float) -> Operator:
    """Takes more or less of what one source changes of a base.

        v_base + w (v - v_base)

    Combined in the loss. Two evaluations.

    Args:
        base: The field that the source is a change of.
        field: The source.
        weight: w; negative takes the change away.

    Returns:
        The sum.

    Example:
        >>> def plain(gain):
        ...     return lambda latents, sigma, conditioning: gain * latents
        >>> difference(plain(1.0), plain(2.0), 1.5)(torch.ones(1, 1), torch.ones(1), Conditioning(torch.zeros(1)))
        tensor([[2.5000]])
    """
    return compose(base, [field], [weight])


def slider(field: Field, positive: str | Tensors, negative: str | Tensors, eta: float) -> Operator:
    """Moves a source along a concept.

        v(c) + eta (v(positive) - v(negative))

    Concept Sliders (arXiv 2311.12092, equation 7). Three evaluations.

    Args:
        field: The source.
        positive, negative: The texts of more and of less of the concept, encoded or by name.
        eta: How far; negative goes the other way.

    Returns:
        The moved source.

    Example:
        >>> def field(latents, sigma, conditioning):  # its velocity is its prompt
        ...     return conditioning.prompt[:, None].expand_as(latents)
        >>> moved = slider(field, torch.tensor(3.0), torch.tensor(2.0), 0.5)
        >>> moved(torch.zeros(1, 1), torch.ones(1), Conditioning(torch.tensor([1.0])))
        tensor([[1.5000]])
    """
    own = as_operator(field)
    return _sum([own, own.at(_text(positive), fixed=True), own.at(_text(negative), fixed=True)], [1.0, eta, -eta])


def by_sigma(above: Field, below: Field, sigma: float) -> Operator:
    """Asks one source from a noise level up and another below it.

        v_above where the noise level is sigma or more, v_below where it is less

    An ensemble of expert denoisers (arXiv 2211.01324). One evaluation.

    Args:
        above: The source nearer to noise.
        below: The source nearer to data.
        sigma: The noise level.

    Returns:
        The two as one source.

    Example:
        >>> def plain(gain):
        ...     return lambda latents, sigma, conditioning: gain * latents
        >>> both = by_sigma(plain(1.0), plain(-1.0), 0.5)
        >>> both(torch.ones(2, 1), torch.tensor([0.9, 0.1]), Conditioning(torch.zeros(2)))
        tensor([[ 1.],
                [-1.]])
    """

    return _in((sigma, math.inf), above, below)


def teacher_at(field: Field, text: str | Tensors) -> Operator:
    """Asks a source with another prompt than the student's: its own trigger, a translation, a longer description.

        v(text)

    What a part of the source is asked with already, by a `teacher_at` of its own or as an operator's text, stays. One
    evaluation.

    Args:
        field: The source.
        text: The prompt, encoded or by name.

    Returns:
        The source at that prompt.

    Raises:
        ValueError: If nothing of the source is asked with the sample's own prompt.

    Example:
        >>> def field(latents, sigma, conditioning):  # its velocity is its prompt
        ...     return conditioning.prompt[:, None].expand_as(latents)
        >>> teacher_at(field, torch.tensor(5.0))(torch.zeros(1, 1), torch.ones(1), Conditioning(torch.tensor([1.0])))
        tensor([[5.]])
    """
    own = as_operator(field)
    if all(term.text is not None for term in own.every_term()):
        raise ValueError("it is asked with a text of its own already, and would not be asked with another")
    return own.at(_text(text))
