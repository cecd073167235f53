"""Puts a configuration's sources together from their operators."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from danceopd.config.sections import Config
from danceopd.core.expressions import Text
from danceopd.core.fields import Field, as_operator, soft
from danceopd.core.operators import (
    Rule,
    autoguided,
    by_sigma,
    compose,
    difference,
    guided_source,
    projected,
    rescaled_source,
    slider,
    teacher_at,
    without_layers,
    zero_star,
)

Leaf = Callable[[str, tuple[int, ...]], Field]


def parts(config: Config, name: str) -> Iterator[tuple[str, str]]:
    """Lists what a source is made of.

    Args:
        config: The run's.
        name: The source.

    Yields:
        The key, under the source's own, that names another source, and the source that it names.
    """
    source = config.sources[name]
    kind = source.operator()
    if kind == "mean":
        yield from ((f"mean.{i}", part) for i, part in enumerate(source.mean))
    elif kind:
        own = getattr(source, kind)
        for key in ("base", "source", "weak", "above", "below"):
            if hasattr(own, key):
                yield f"{kind}.{key}", getattr(own, key)
        if kind == "compose":
            yield from ((f"compose.sources.{part}", part) for part in own.sources)


def expression(config: Config, name: str, leaf: Leaf, text: Callable[[str], Text], rule: Rule | None = None) -> Field:
    """Makes a source a field.

    Args:
        config: The run's, whose sources have no circle.
        name: The source.
        leaf: ``leaf(name, skipped)`` gives the field of a network without guidance, without some of its blocks.
        text: Gives what stands for a text of the configuration.
        rule: The model family's own rule of guidance.

    Returns:
        The field.

    Raises:
        ValueError: An operator cannot be of what it is of.
    """
    source = config.sources[name]
    kind = source.operator()
    if kind is None:
        network = leaf(name, ())
        if source.guidance_scale == 1:
            return network
        return guided_source(network, source.guidance_scale, text(""), rule=rule)
    own = getattr(source, kind)

    def of(part: str) -> Field:
        return expression(config, part, leaf, text, rule)

    if kind == "guided":
        return _guided(own, of, leaf, text, rule)
    if kind == "autoguided":
        return autoguided(of(own.source), of(own.weak), own.scale, interval=own.interval)
    if kind == "difference":
        return difference(of(own.base), of(own.source), own.weight)
    if kind == "compose":
        return compose(of(own.base), [of(part) for part in own.sources], list(own.sources.values()))
    if kind == "slider":
        return slider(of(own.source), text(own.positive), text(own.negative), own.eta)
    if kind == "mean":
        return soft([of(part) for part in own])
    if kind == "by_sigma":
        return by_sigma(of(own.above), of(own.below), own.sigma)
    return teacher_at(of(own.source), text(own.prompt))


def _guided(own, of: Callable[[str], Field], leaf: Leaf, text: Callable[[str], Text], rule: Rule | None) -> Field:
    """Makes guidance with its options."""
    if own.zero_star:
        rule = zero_star
    elif own.apg:
        rule = partial(projected, eta=own.apg.eta, norm=own.apg.norm)
    source, skip, intervals = of(own.source), own.skip_layers, []
    field = source
    if own.scale != 1:
        intervals.append(own.interval)
        field = guided_source(field, own.scale, text(own.negative), interval=own.interval, rule=rule)
    if skip:
        intervals.append(skip.interval)
        whole, without = leaf(own.source, ()), leaf(own.source, tuple(skip.layers))
        field = without_layers(field, whole, without, skip.scale, interval=skip.interval)
    # The deviation is that of all that guides together, so it comes last.
    return rescaled_source(field, source, own.rescale, intervals=intervals) if own.rescale else field


def outline(config: Config, name: str) -> Field:
    """Makes a source an expression of fields that cannot be asked, to see what it would ask.

    Args:
        config: The run's.
        name: The source.

    Returns:
        The expression.

    Raises:
        ValueError: An operator cannot be of what it is of.
    """
    leaves = {}

    def leaf(name: str, skipped: tuple[int, ...]) -> Field:
        return leaves.setdefault((name, skipped), lambda *_: None)

    return as_operator(expression(config, name, leaf, Text))


def texts(config: Config, name: str) -> list[str]:
    """Lists the texts that a source is asked with in the place of a row's prompt, without the empty one.

    Args:
        config: The run's.
        name: The source.

    Returns:
        The texts, each once.
    """
    return [text for text in outline(config, name).texts() if text]


def texts_by_route(config: Config) -> list[list[str]]:
    """Lists the texts of each capability's source; of all of them where every sample asks all sources.

    Args:
        config: The run's.

    Returns:
        The texts, in the order of the capabilities.
    """
    own = [texts(config, capability.source) for capability in config.capabilities.values()]
    if config.method_options().get("routing") != "soft":
        return own
    return [list(dict.fromkeys(text for some in own for text in some))] * len(own)


def evaluations(config: Config, name: str, sigma: torch.Tensor) -> torch.Tensor:
    """Counts the evaluations of one sample that a source takes at each noise level.

    Args:
        config: The run's.
        name: The source.
        sigma: Float tensor [n].

    Returns:
        int64 tensor [n].
    """
    return outline(config, name).evaluations(sigma)
