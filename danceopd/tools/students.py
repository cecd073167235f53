"""Finds a run's student, as it is now or as it was at a checkpoint.

What imports diffusers is imported where a model's student is asked for: an embedded network's is found without.
"""

from pathlib import Path

from danceopd.config.sections import Config
from danceopd.models.backbones import pipeline_class_of
from danceopd.models.lora_algebra import Lora
from danceopd.support.errors import UserError
from danceopd.training.checkpoints import Checkpoint, checkpoints

FACTORS = "ema/factors."  # of the averaged adapter, in a checkpoint


def checkpoint_of(run: Path, step: int) -> Checkpoint:
    """Reads the checkpoint of a step.

    Raises:
        UserError: The run keeps none of that step, or it is damaged.
    """
    there = {int(path.name.removeprefix("step-")): path for path in checkpoints(run / "checkpoints")}
    if step not in there:
        kept = f"it keeps {', '.join(map(str, there))}" if there else "it keeps none"
        raise UserError(f"{run} has no checkpoint of step {step}; {kept} (training.keep_checkpoints says how many)")
    try:
        return Checkpoint.read(there[step])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{there[step]} is damaged: {error}; name another checkpoint") from None


def lora_of(config: Config, checkpoint: Checkpoint) -> Lora:
    """Returns the averaged adapter of a checkpoint.

    Raises:
        UserError: The run trained all weights.
    """
    if not config.student.lora:
        raise UserError(
            "of a run that trained all weights only the newest student can be drawn with; leave out --checkpoint"
        )
    from danceopd.training.assembly.networks import student_sizes

    ends = ".lora_A"
    flat = [name[len(FACTORS) : -len(ends)] for name in checkpoint.shapes if name.startswith(FACTORS)]
    flat = list(dict.fromkeys(name for name in flat if f"{FACTORS}{name}{ends}" in checkpoint.shapes))
    layers = {name: name.replace("/", ".") for name in flat}
    sizes = student_sizes(config, list(layers.values()))
    rank = config.student.lora.rank
    lora = {}
    for name, layer in layers.items():
        own_rank, alpha = sizes.get(layer, (rank, config.student.lora.alpha or rank))
        factors = (checkpoint.tensor(f"{FACTORS}{name}.{part}") for part in ("lora_A", "lora_B"))
        lora[layer] = (*factors, alpha / own_rank)
    return lora


def student_files(run: Path, config: Config, step: int | None, work: Path) -> dict[str, Path]:
    """Finds the files that a run's student is loaded from.

    Args:
        run: The run's folder.
        config: Its configuration, of a diffusers model.
        step: Of the checkpoint; None for the newest student.
        work: A folder that an adapter of a checkpoint is written to.

    Returns:
        ``{"lora": folder}``, or ``{"transformer": folder}`` where all weights were trained.

    Raises:
        UserError: There is no such student.
    """
    if step is not None:
        from danceopd.models.lora_files import save_lora

        folder = work / f"step-{step}"
        save_lora(lora_of(config, checkpoint_of(run, step)), folder, pipeline_class_of(config.model))
        return {"lora": folder}
    if not any((run / "student").glob("*.safetensors")):
        raise UserError(f"{run} holds no student yet: its first checkpoint writes it; train on with danceopd train")
    return {"lora" if config.student.lora else "transformer": run / "student"}
