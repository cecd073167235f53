"""The types that an option of a method may have."""

from typing import Annotated

from pydantic import Field

# What an option of a method may be.
Share = Annotated[float, Field(ge=0, le=1)]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Count = Annotated[int, Field(ge=1)]

GroupSize = Annotated[int, Field(ge=2)]  # a group of one has no deviation
