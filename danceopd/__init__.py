"""On-policy generative field distillation: route, roll out, query, match.

The names here are stable; docs/api.md lists them. `distill` runs a whole training from a configuration; the rest is
the update for a training loop of one's own.

    import danceopd

    loss = danceopd.danceopd_loss(student, sources, batch, sigmas=danceopd.sigma_grid(16, shift=3.0), generator=g)
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if sys.version_info < (3, 11):  # noqa: UP036 (an older Python runs this file all the same)
    raise ImportError(f"danceopd needs Python 3.11 or newer, this is {sys.version.split()[0]}")

if TYPE_CHECKING:
    from danceopd.api import distill
    from danceopd.core.answers import Answers, Field
    from danceopd.core.batch import Batch
    from danceopd.core.conditioning import Conditioning
    from danceopd.core.fields import guided, hard, routed, soft
    from danceopd.core.methods.danceopd import danceopd_loss
    from danceopd.core.operators import (
        autoguided,
        by_sigma,
        compose,
        difference,
        guided_source,
        slider,
        teacher_at,
        without_layers,
    )
    from danceopd.core.query import query
    from danceopd.core.questions import Questions, matched
    from danceopd.core.rollout import rollout, sample
    from danceopd.core.routing import route
    from danceopd.core.schedule import sigma_grid
    from danceopd.support.errors import UserError

__all__ = [
    "Answers",
    "Batch",
    "Conditioning",
    "Field",
    "Questions",
    "UserError",
    "autoguided",
    "by_sigma",
    "compose",
    "danceopd_loss",
    "difference",
    "distill",
    "guided",
    "guided_source",
    "hard",
    "matched",
    "query",
    "rollout",
    "route",
    "routed",
    "sample",
    "sigma_grid",
    "slider",
    "soft",
    "teacher_at",
    "without_layers",
]


# Where each name lives: it is imported when it is first asked for, since torch takes its time.
_HOMES = {
    "danceopd.api": ("distill",),
    "danceopd.core.batch": ("Batch",),
    "danceopd.core.conditioning": ("Conditioning",),
    "danceopd.core.answers": ("Answers", "Field"),
    "danceopd.core.fields": ("guided", "hard", "routed", "soft"),
    "danceopd.core.methods.danceopd": ("danceopd_loss",),
    "danceopd.core.operators": (
        "autoguided",
        "by_sigma",
        "compose",
        "difference",
        "guided_source",
        "slider",
        "teacher_at",
        "without_layers",
    ),
    "danceopd.core.query": ("query",),
    "danceopd.core.questions": ("Questions", "matched"),
    "danceopd.core.rollout": ("rollout", "sample"),
    "danceopd.core.routing": ("route",),
    "danceopd.core.schedule": ("sigma_grid",),
    "danceopd.support.errors": ("UserError",),
}


if not TYPE_CHECKING:  # a type checker reads the imports above; with this it would believe in any name

    def __getattr__(name: str):
        if name == "__version__":
            return import_module("danceopd.support.versions").number()
        for home, names in _HOMES.items():
            if name in names:
                return getattr(import_module(home), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
