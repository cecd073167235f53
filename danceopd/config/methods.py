"""The options of each method, as a section that a configuration is checked against."""

from functools import cache
from typing import Annotated

from pydantic import BaseModel, Field, create_model

from danceopd.config.section import Section
from danceopd.core.methods import PROVIDED, keywords

# What an option may be beyond its type, by its name.
BOUNDS = {
    "warm_start": Field(ge=0, le=1),
    "noise_level": Field(gt=0, allow_inf_nan=False),
    "group_size": Field(ge=2),  # a group of one has no deviation
    "max_advantage": Field(gt=0, allow_inf_nan=False),
    "clip_range": Field(gt=0, allow_inf_nan=False),
    "anchor_weight": Field(ge=0, allow_inf_nan=False),
    "visits": Field(ge=1),
}


@cache
def options(name: str) -> type[BaseModel]:
    """Makes a section of a method's options, with their types, bounds and defaults."""
    fields = {
        key: (Annotated[p.annotation, BOUNDS[key]] if key in BOUNDS else p.annotation, p.default)
        for key, p in keywords(name).items()
        if key not in PROVIDED
    }
    return create_model(f"{name}_options", __base__=Section, **fields)
