"""What every section of a configuration is made of."""

from typing import Annotated

import pydantic
from pydantic import BaseModel, ConfigDict, FiniteFloat

PositiveFinite = Annotated[FiniteFloat, pydantic.Field(gt=0)]

# What no run has and would fill the memory before anything is said: a digit too many is a mistake.
Steps = Annotated[pydantic.PositiveInt, pydantic.Field(le=10_000)]
Samples = Annotated[pydantic.PositiveInt, pydantic.Field(le=1_000_000)]

NonNegativeFinite = Annotated[FiniteFloat, pydantic.Field(ge=0)]

Share = Annotated[FiniteFloat, pydantic.Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
