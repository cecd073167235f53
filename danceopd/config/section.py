"""What every section of a configuration is made of."""

from typing import Annotated

import pydantic
from pydantic import BaseModel, ConfigDict, FiniteFloat
from pydantic_core import PydanticCustomError

PositiveFinite = Annotated[FiniteFloat, pydantic.Field(gt=0)]

# What no run has and would fill the memory before anything is said: a digit too many is a mistake.
Steps = Annotated[pydantic.PositiveInt, pydantic.Field(le=10_000)]
Samples = Annotated[pydantic.PositiveInt, pydantic.Field(le=1_000_000)]

# Those of an update are made of it by products that must fit 64 bits.
Seed = Annotated[pydantic.NonNegativeInt, pydantic.Field(lt=2**32)]

NonNegativeFinite = Annotated[FiniteFloat, pydantic.Field(ge=0)]

Share = Annotated[FiniteFloat, pydantic.Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, info: pydantic.ValidationInfo) -> object:
        """Refuses true and false where a number stands: pydantic would take them for 1 and 0."""
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[info.field_name or ""].annotation):
            raise PydanticCustomError("no_boolean", "must be a number")
        return value
