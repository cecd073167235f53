"""Decides what a model's student begins as."""

from collections.abc import Callable, Mapping

import torch

from danceopd.config.sections import Config
from danceopd.models.lora_algebra import Lora, average, truncated
from danceopd.models.students import LoraStudent
from danceopd.models.weights import Weights, mean, of_folder, plus
from danceopd.support.errors import UserError


def start_weights(config: Config, loras: dict[str, Lora], own: Callable[[str], Weights]) -> Weights:
    """Finds the weights of the transformer that a full student begins as.

    Args:
        config: The run's.
        loras: What each source on the model's own transformer adds to it, by its name.
        own: Returns the weights of any other source.

    Returns:
        The weights.

    Raises:
        UserError: Weights cannot be loaded, or transformers to be merged differ.
    """
    start, base = config.student.init_from, of_folder(config.model)
    if start == "base":
        return base
    if start != "merge":
        return plus(base, loras[start]) if start in loras else own(start)
    parts = {f"source {name}": (1, own(name)) for name in config.networks() if name not in loras}
    if loras:
        parts = {"model": (len(loras), plus(base, average(list(loras.values()))))} | parts
    (first, (_, one)), *others = parts.items()
    for name, (_, other) in others:
        check_alike(first, one.shapes, name, other.shapes)
    return mean([(number / len(config.networks()), weights) for number, weights in parts.values()])


def check_alike(one: str, shapes: Mapping[str, torch.Size], other: str, others: Mapping[str, torch.Size]) -> None:
    """Checks that two networks have the same tensors, so that their mean can be taken.

    Args:
        one: What the first is called.
        shapes: Its tensors' shapes by name.
        other: What the second is called.
        others: Its tensors' shapes by name.

    Raises:
        UserError: They differ.
    """
    differing = sorted(key for key in shapes.keys() | others.keys() if shapes.get(key) != others.get(key))
    if differing:
        raise UserError(
            f"{one} and {other} differ in shape ({differing[0]} and {len(differing) - 1} more), so that they have no "
            "mean; begin as base, or as one of them"
        )


def start_lora(config: Config, loras: dict[str, Lora], layers: list[str]) -> Lora:
    """Finds the adapter that a LoRA student begins as.

    Args:
        config: The run's.
        loras: Each source's, by its name; one of the base alone is empty, and no part of a mean.
        layers: Those that the student changes.

    Returns:
        The adapter; empty for the base.

    Raises:
        UserError: Names the layers which the student does not have.
    """
    start = config.student.init_from
    if start == "base":
        return {}
    lora = average([lora for lora in loras.values() if lora]) if start == "merge" else loras[start]
    missing = [name for name in lora if name not in layers]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{start} changes {', '.join(missing[:3])}{more}, which student.lora.targets has not; add the ends of "
            "these names to the targets, or begin as base"
        )
    return lora


@torch.no_grad()
def begin(student: LoraStudent, lora: Lora) -> None:
    """Makes an adapter add what lora adds, as nearly as its rank can: exactly where lora's is no larger.

    What of the rank is not needed stays as it was, random in A and zero in B, so that it can be trained.

    Args:
        student: Whose factors are changed.
        lora: What it adds from then on.
    """
    for name, factors in lora.items():
        own_a, own_b = student.factors_of(name)
        a, b = truncated(*factors, len(own_a))
        own_a[: len(a)] = a.to(own_a)
        own_b.zero_()[:, : len(a)] = (b / student.scale_of(name)).to(own_b)
