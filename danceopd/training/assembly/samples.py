"""Groups the prepared rows of a model's run by what may share a batch."""

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch

from danceopd.config.expressions import texts_by_route
from danceopd.config.sections import Config
from danceopd.core.methods import needs
from danceopd.data.prepare import check_encoders, fingerprints
from danceopd.data.prepared import PreparedData, PreparedFile, mix
from danceopd.data.sampler import Group, Samples
from danceopd.models.loading import check_weights, class_name_of
from danceopd.support.errors import UserError


def model_samples(config: Config, backbone: ModuleType, attempt: Callable) -> Samples | None:
    """Reads the prepared rows of every capability, in groups that may share a batch.

    Args:
        config: The run's.
        backbone: The module of the model's family.
        attempt: Calls a function, and notes under a key what a user can mend.

    Returns:
        The samples; None where some rows cannot be used.
    """
    steps = config.rollout.num_inference_steps
    encoders, said = fingerprints(config.model), dict(zip(config.capabilities, texts_by_route(config), strict=True))
    for name, capability in config.capabilities.items():
        attempt(f"capabilities.{name}.task", _check_task, capability.task, backbone, config.model)
    data, read = {}, cache(PreparedFile)
    for name, capability in config.capabilities.items():
        key, path = f"capabilities.{name}.data.prepared", capability.data.prepared
        file = attempt(key, read, path)
        data[name] = rows = file and attempt(key, rows_of, file, name, capability, "clean" in needs(config.method))
        if rows:
            attempt(key, check_encoders, path, rows.head, config.model, encoders)
            rows.texts = tuple(said[name])
    for path in dict.fromkeys(capability.data.prepared for capability in config.capabilities.values()):
        names = [name for name, capability in config.capabilities.items() if capability.data.prepared == path]
        every = dict.fromkeys(text for name in names for text in said[name])  # so that one command adds all of them
        if data[names[0]]:
            attempt(f"capabilities.{names[0]}.data.prepared", data[names[0]].check_texts, list(every))
    mixing = None if None in data.values() else attempt("capabilities", mix, data)
    if mixing is None:
        return None
    groups, part = [], cache(lambda name, kind: data[name].part(kind))  # one data set for equal rows of two groups
    for kind, rows in mixing.rows.items():
        shape, *sources = (attempt("model", backbone.latent_shape, config.model, *size) for size in (kind[0], *kind[1]))
        sigmas = attempt("model", backbone.sigmas, config.model, steps, *kind[0])
        if None in (shape, *sources) or sigmas is None:
            return None
        group = [part(name, own.own(kind)) for name, own in data.items()]
        groups.append(Group(group, shape, rows, sigmas, tuple(sources)))
    return Samples(
        groups, lambda rows, indices, without_prompt: rows.condition(indices, without_prompt), tuple(mixing.never_drawn)
    )


def drawing_sigmas(config: Config, backbone: ModuleType, samples: Samples) -> dict[tuple[int, ...], torch.Tensor]:
    """Works out the noise levels of pictures drawn in evaluation.num_inference_steps.

    Args:
        config: The run's.
        backbone: The module of the model's family.
        samples: The run's samples, of whose sizes pictures are drawn.

    Returns:
        {the latents' shape: float32 tensor [N + 1]}.
    """
    steps = config.evaluation.num_inference_steps
    sizes = {g.shape: next(tuple(rows.rows[0]["size"]) for rows in g.data if len(rows)) for g in samples.groups}
    return {tuple(shape): backbone.sigmas(config.model, steps, *size) for shape, size in sizes.items()}


def check_decoder(config: Config) -> None:
    """Checks that the VAE is there, which sample grids need.

    Args:
        config: The run's.

    Raises:
        UserError: Sample grids are drawn and it is not there.
    """
    if config.training.sample_every and (config.model / "vae" / "config.json").is_file():  # else latent_shape says it
        try:
            check_weights(config.model / "vae")
        except UserError as error:
            raise UserError(f"sample grids are decoded by the VAE, but {error}; or give 0 for none") from None


def _check_task(task: str, backbone: ModuleType, model) -> None:
    """Checks that the model does a capability's task."""
    if task not in backbone.tasks(model):
        raise UserError(
            f"{task}, but a {class_name_of(model)} has no source pictures; use the family's model that edits"
        )


def rows_of(file: PreparedFile, name: str, capability, with_clean: bool) -> PreparedData:
    """Finds the prepared rows of a capability.

    Args:
        file: What they are in.
        name: The capability's key in the configuration.
        capability: Its section there.
        with_clean: Whether the method learns from finished pictures.

    Returns:
        The rows.

    Raises:
        UserError: The rows cannot be used.
    """
    data = PreparedData(file, capability.capability or name)
    if (capability.task == "edit") != data.has_source:
        raise UserError(
            f"task is {capability.task}, but its rows have {'' if data.has_source else 'no '}source pictures"
        )
    lacking = sum(row["target"] is None for row in data.rows)
    if with_clean and lacking:
        raise UserError(
            f"the method learns from finished pictures, but {lacking} of its {len(data)} rows have no target_image"
        )
    return data
