"""The sections of sources that are made of other sources; docs/operators.md has their equations."""

from typing import Annotated

import pydantic
from pydantic import AfterValidator, FiniteFloat, NonNegativeInt

from danceopd.config.section import NonNegativeFinite, Section, Share
from danceopd.support.texts import columns_of


def _ordered(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError("the lower noise level comes first")
    return interval


def _filled_in(text: str) -> str:
    columns_of(text)
    return text


Interval = Annotated[tuple[Share, Share], AfterValidator(_ordered)]  # of noise levels

Text = Annotated[str, AfterValidator(_filled_in)]  # {prompt} in it is the row's


class Apg(Section):
    """eta: the share of the guidance along the velocity; norm: its longest, 0 for any (`operators.projected`)."""

    eta: FiniteFloat = 0.0
    norm: NonNegativeFinite = 0.0


class SkipLayers(Section):
    """Skip-layer guidance: scale (v - v without these blocks) is added; blocks count from 0 in the main list."""

    layers: Annotated[list[NonNegativeInt], pydantic.Field(min_length=1)]
    scale: FiniteFloat
    interval: Interval = (0.0, 1.0)


class Guided(Section):
    """Guidance of a source.

    Attributes:
        source: A key of `sources`.
        scale: 1 is none.
        negative: What stands in the place of the empty prompt.
        interval: The noise levels at which it is guided.
        rescale: The share that is brought back to the deviation of the velocity.
        zero_star: By the rule of CFG-Zero*.
        apg: By the rule of APG.
        skip_layers: Is added to it.
    """

    source: str
    scale: FiniteFloat
    negative: Text = ""
    interval: Interval = (0.0, 1.0)
    rescale: Share = 0.0
    zero_star: bool = False
    apg: Apg | None = None
    skip_layers: SkipLayers | None = None


class Autoguided(Section):
    """Guidance of a source by a weaker one, `weak`."""

    source: str
    weak: str
    scale: FiniteFloat
    interval: Interval = (0.0, 1.0)


class Difference(Section):
    """weight times what `source` changes of `base`."""

    base: str
    source: str
    weight: FiniteFloat


class Compose(Section):
    """The sum of what several sources change of one base; sources: the weight of each."""

    base: str
    sources: Annotated[dict[str, FiniteFloat], pydantic.Field(min_length=1)]


class Slider(Section):
    """A source, moved eta times from the text of less of a concept to that of more."""

    source: str
    positive: Text
    negative: Text
    eta: FiniteFloat


class BySigma(Section):
    """One source from the noise level sigma up, another below it."""

    above: str
    below: str
    sigma: Annotated[FiniteFloat, pydantic.Field(gt=0, le=1)]


class TeacherAt(Section):
    """A source that is asked with other text than the student: its trigger, a translation, a longer description."""

    source: str
    prompt: Text
