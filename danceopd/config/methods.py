"""The options of each method, as a section that a configuration is checked against."""

from functools import cache

from pydantic import BaseModel, ConfigDict, create_model

from danceopd.core.methods.provided import PROVIDED, _keywords


@cache
def options(name: str) -> type[BaseModel]:
    """A method's options, their types and defaults, as a model that a configuration is checked against."""
    fields = {key: (p.annotation, p.default) for key, p in _keywords(name).items() if key not in PROVIDED}
    return create_model(f"{name}_options", __config__=ConfigDict(extra="forbid", frozen=True), **fields)
