"""What every section of a configuration is made of."""

from typing import Annotated

import pydantic
from pydantic import BaseModel, ConfigDict, FiniteFloat

PositiveFinite = Annotated[FiniteFloat, pydantic.Field(gt=0)]

NonNegativeFinite = Annotated[FiniteFloat, pydantic.Field(ge=0)]

Share = Annotated[FiniteFloat, pydantic.Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
