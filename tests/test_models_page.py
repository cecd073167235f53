"""docs/models.md has every pipeline that is served, and what its family's module says."""

from pathlib import Path

import make_models

from danceopd.models.backbones import FAMILIES, family_module

ROOT = Path(__file__).parents[1]


def test_its_table_is_what_the_modules_say():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert page == make_models.page(), "make docs writes docs/models.md again"
    assert all(f"| {name} |" in page for family in FAMILIES for name in family_module(family).PIPELINES)


def test_every_name_of_a_module_is_explained():
    page = (ROOT / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        module = family_module(family)
        own = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        constants = {name for name, value in vars(module).items() if name.isupper() and isinstance(value, tuple)}
        for name in own | constants:
            assert name.startswith("_") or f"`{name}" in page, f"{family}.{name}"
