"""Puts a run of the embedded network together."""

from danceopd.support.errors import UserError
from danceopd.world.data import WorldData
from danceopd.world.dit import DiT
from danceopd.world.files import load_model, resolve_weights
from danceopd.world.own_data import ManifestData


def _load(weights: str) -> DiT:
    return load_model(resolve_weights(weights))


def load_data(name: str, capability, image_size: int, with_clean: bool):
    """The rows of a capability of the embedded network. Raises UserError for rows that do not fit it."""
    data = capability.data
    if data.world:
        return WorldData(data.world, data.size, data.seed)
    rows = ManifestData(data.manifest, capability.capability or name, image_size, root=data.root)
    if capability.task == "edit" and not rows.has_source:
        raise UserError(f"task is edit, but no row of {capability.capability or name!r} has a source_image")
    if capability.task == "t2i" and rows.has_source:
        raise UserError(f"task is t2i, but the rows of {capability.capability or name!r} have a source_image")
    if with_clean and rows.targets([0]) is None:
        raise UserError(f"the method learns from finished pictures, but no row of {name!r} has a target_image")
    return rows
