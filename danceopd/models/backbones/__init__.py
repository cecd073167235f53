"""Makes diffusers' models velocity fields: one module for each family, named in FAMILIES.

docs/adding-a-model.md says what a family's module has; danceopd/models/backbones/sd3.py is the plainest.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

from danceopd.models.loading import class_name_of, transformer_folder
from danceopd.models.tensor_files import in_its_place
from danceopd.support.errors import UserError
from danceopd.support.hints import did_you_mean
from danceopd.support.texts import parse_object

FAMILIES = (
    "sd3",
    "flux",
    "flux2",
    "qwen_image",
    "z_image",
    "longcat_image",
    "qwen_image_21",
    "krea2",
    "prx",
    "dreamlite",
    "flux3",
)


def pipeline_class_of(folder: Path | str) -> type:
    """Returns diffusers' class of a pipeline's folder, which knows its LoRA layouts.

    A UserError as from backbone_of.
    """
    import diffusers

    backbone_of(folder)
    return getattr(diffusers, class_name_of(folder))


def empty_transformer(folder: Path | str):
    """Makes the transformer of a folder on the meta device: layers and shapes, without a weight.

    Args:
        folder: A pipeline's, or a transformer's own.

    Raises:
        UserError: There is no transformer in it.
    """
    import diffusers
    import torch

    path = transformer_folder(folder)
    try:
        with torch.device("meta"):
            return diffusers.AutoModel.from_config(str(path), local_files_only=True)
    except Exception as error:  # on a configuration of odd values it raises almost anything
        raise UserError(f"{path}: no transformer that diffusers knows: {error}") from None


def transformer_class(folder: Path | str, backbone: ModuleType) -> type:
    """Finds diffusers' class of a transformer by its own folder's configuration.

    Raises:
        UserError: The configuration is missing, damaged, or of a class that the backbone does not serve.
    """
    path = Path(folder) / "config.json"
    try:
        name = parse_object(path.read_text(encoding="utf-8"))["_class_name"]
    except FileNotFoundError:
        raise UserError(f"no transformer in {folder}: there is no {path}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} {in_its_place(path) or f'is damaged ({error}); copy it again'}") from None
    cls = getattr(backbone, str(name), None)  # a backbone's module has the one class that it loads
    if not hasattr(cls, "from_config"):
        raise UserError(f"{path}: a {name} is not a transformer of this family; give one of the model's own")
    return cls


def meta_transformer(folder: Path | str, backbone: ModuleType, dtype):
    """Makes an empty_transformer of the class that the backbone serves, in this dtype, frozen, in eval mode.

    Raises:
        UserError: As transformer_class.
    """
    import torch

    transformer_class(transformer_folder(folder), backbone)
    return torch.nn.Module.to(empty_transformer(folder), dtype).eval().requires_grad_(False)


def backbone_of(folder: Path | str) -> ModuleType:
    """Finds the module that serves a pipeline's folder, by the class named in its model_index.json.

    Raises:
        UserError: The folder is not a pipeline's, or of a family that none serves.
    """
    name = class_name_of(folder)
    served = _served()
    if name not in served:
        raise UserError(f"{folder} is a {name}, which no backbone serves{did_you_mean(name, served)}")
    return served[name]


def combine_of(folder: Path | str) -> Callable | None:
    """Finds a pipeline's own rule of guidance, for `core.fields.guided`; None for the usual one.

    Raises:
        UserError: As backbone_of.
    """
    backbone = backbone_of(folder)
    own = class_name_of(folder) in getattr(backbone, "COMBINE_PIPELINES", backbone.PIPELINES)
    return getattr(backbone, "combine", None) if own else None


def family_of(pipeline: str) -> ModuleType | None:
    """Finds the module that serves a pipeline's class, by its name; None where none does."""
    return _served().get(pipeline)


def _served() -> dict[str, ModuleType]:
    """Collects the families' modules by the pipelines that they serve."""
    modules = map(family_module, FAMILIES)
    return {pipeline: module for module in modules for pipeline in module.PIPELINES}


def family_module(family: str) -> ModuleType:
    """Imports one of FAMILIES; a UserError names a package that is not installed."""
    try:
        return import_module(f"danceopd.models.backbones.{family}")
    except ModuleNotFoundError as error:
        raise UserError(f"diffusers' models need {error.name}; pip install 'danceopd[models]'") from None
