"""Puts a model's run together before its first step; everything that is missing is listed at once."""

import copy
from pathlib import Path

from danceopd.config.sections import Config
from danceopd.core.conditioning import placed
from danceopd.core.methods import needs
from danceopd.models.attention import attention_backend, set_torch_kernels
from danceopd.models.backbones import backbone_of, combine_of, pipeline_class_of
from danceopd.models.lora_files import save_lora
from danceopd.models.precision import PRECISIONS
from danceopd.models.saving import save_transformer
from danceopd.models.twins import without_values
from danceopd.models.weights import either, of_tensors
from danceopd.support.ranks import ALONE, Ranks
from danceopd.training.assembly.bases import distilled_bases
from danceopd.training.assembly.networks import load_networks, make_student
from danceopd.training.assembly.parts import Parts, Problems, averaged_student
from danceopd.training.assembly.room import check_alone, check_machine
from danceopd.training.assembly.samples import check_decoder, drawing_sigmas, model_samples
from danceopd.training.assembly.sources import (
    Unread,
    model_fields,
    own_networks,
    place_sources,
    read,
    shared_texts,
)
from danceopd.training.checkpoints import Checkpoint, of_checkpoint
from danceopd.training.zero.lockstep import Lockstep
from danceopd.training.zero.sharding import shares_sources


# Long: the order of its checks is its content: each stops the run before the next one loads more.
def build_model(config: Config, ranks: Ranks = ALONE, settings: dict | None = None) -> Parts:
    """Loads the student, the sources and the prepared rows of a run on a diffusers model.

    Args:
        config: The configuration; its `model` names the pipeline's folder.
        ranks: The processes of the run; every rank calls this.
        settings: DeepSpeed's, under which the ranks may share the sources and the student in shards.

    Returns:
        The parts of the run.

    Raises:
        UserError: Lists every file, row or device that is missing or does not fit.
    """
    problems = Problems()
    attempt = problems.attempt
    device = check_machine(config, attempt)
    attempt("training.swap_blocks", check_alone, config, settings)
    backbone = attempt("model", backbone_of, config.model)
    problems.stop()
    samples = model_samples(config, backbone, attempt)
    attempt("training.sample_every", check_decoder, config)
    attends = attempt("training.attention_backend", run_attention, config, backbone, device)
    problems.stop()
    sigmas = attempt("model", drawing_sigmas, config, backbone, samples)
    lockstep = None if settings is None else Lockstep(ranks)
    empty = own_networks(config, backbone, attempt)
    problems.stop(ranks)  # all or none: what is sharded takes every rank
    in_shards = set()
    distinct = list({id(network): network for network in empty.values()}.values())
    if settings is not None and shares_sources(config, distinct, device, lockstep):
        in_shards.add("sources")
    stage = 0 if settings is None else settings.get("zero_optimization", {}).get("stage", 0)
    if stage == 3 and not config.student.lora and "anchor" not in needs(config.method):  # an anchor is a copy of it
        in_shards.add("student")
    student, networks = load_networks(config, backbone, device, attempt, empty, in_shards)
    problems.stop(ranks)
    if "student" in in_shards:
        student = make_student(config, backbone, read(student, ranks, settings), device)
    whole = {name: n[0].transformer if isinstance(n, tuple) else n for name, n in networks.items()}
    transformers = {name: network for name, network in whole.items() if not isinstance(network, Unread)}
    networks = place_sources(config, backbone, device, networks, lockstep, settings)
    if attends != "native" or config.training.attention_backend == "native":
        student.transformer.set_attention_backend(attends)  # and with it what every other transformer here attends by
    encoded = placed(shared_texts(config, samples), device)
    empty_prompt, combine = encoded[""], combine_of(config.model)
    make = model_fields(config, combine, networks, encoded, transformers)
    fields = [attempt(f"sources.{c.source}", make, c.source) for c in config.capabilities.values()]
    problems.stop(ranks)
    anchor = copy.deepcopy(student).requires_grad_(False) if "anchor" in needs(config.method) else None
    without = without_values(student)

    def save(checkpoint: Checkpoint, folder: Path) -> None:
        if config.student.lora:
            lora = averaged_student(without, checkpoint).lora()
            save_lora(lora, folder / "student", pipeline_class_of(config.model))
        else:
            buffers = of_tensors(dict(without.transformer.named_buffers()))
            weights = either(of_checkpoint(checkpoint, "ema/transformer."), buffers)
            save_transformer(without.transformer, weights, folder / "student")

    def load_decoder():
        return backbone.picture_codec(config.model, device, PRECISIONS[config.training.precision])[1]

    warnings = (*distilled_bases(config, backbone), *samples.never_drawn)
    return Parts(
        student, fields, samples, anchor, empty_prompt, device, save, combine, sigmas, load_decoder, lockstep, warnings
    )


def run_attention(config: Config, backbone, device) -> str:
    """Finds the attention backend of a run, by `models.attention.attention_backend` for these settings; torch's own
    leaves cuDNN out where prompts have masks (`models.attention.set_torch_kernels`).

    Args:
        config: The run's.
        backbone: The module of the model's family.
        device: Where the run computes.

    Returns:
        The backend's name, as diffusers calls it.

    Raises:
        UserError: If the backend that the configuration names cannot be had.
    """
    set_torch_kernels(backbone, device)
    # A student of all weights is in float32: autocast casts for torch's attention, and for no other.
    half = config.training.precision == "bf16" and config.student.lora is not None
    return attention_backend(config.training.attention_backend, config.model, half, backbone, device)
