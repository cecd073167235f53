"""The trainer from Python: what `danceopd train` does."""

from collections.abc import Callable, Sequence
from pathlib import Path

from danceopd.config.reading import load_config, parse_config
from danceopd.config.sections import Config
from danceopd.planning.dry_run import with_memory_chosen
from danceopd.support.hub import downloads
from danceopd.support.paths import draws_miniature
from danceopd.training.loop import Build, train


def distill(
    config: Config | dict | str | Path,
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
    callbacks: Sequence[Callable[[dict], object]] = (),
) -> Path:
    """Trains a student as a configuration says, going on from the newest checkpoint of its folder if there is one.

    Args:
        config: A YAML file, its values, or a checked configuration.
        overrides: ``key.sub=value``, as on the command line.
        overwrite: Starts again where a finished or another run lies.
        callbacks: Each is given every update's record: ``step``, ``loss``, ``loss_by_capability``, ``gradient_norm``,
            ``learning_rate``, ``network_evaluations``, ``skipped``, and how fast it was: ``samples_per_second``,
            ``tokens_per_second``, ``mfu`` (on a card that is known), ``peak_memory_gib`` and ``phases``.

    Returns:
        The folder of the run.

    Raises:
        UserError: For anything that can be mended, with every mistake of the configuration by its key.

    Example:
        >>> records = []
        >>> folder = distill("configs/demo.yaml", ["training.max_steps=5"], callbacks=[records.append])
    """
    with downloads():  # of what is named by an id of the hub
        if isinstance(config, str | Path):
            config = load_config(config, list(overrides))
        elif isinstance(config, dict):
            config = parse_config(config, list(overrides))
        elif overrides:
            config = parse_config(config.to_dict(), list(overrides))
        config = with_memory_chosen(config, examiner_of(config), overwrite)
    return train(config, builder_of(config), overwrite, callbacks=callbacks)


def builder_of(config: Config) -> Build:
    """Finds what puts a run's parts together: the model's builder, or the embedded network's.

    Args:
        config: The run's.

    Returns:
        ``build(config, ranks, settings) -> Parts``.
    """
    if draws_miniature(config.model):
        from danceopd.miniature.build import build as build_miniature

        return build_miniature
    if config.model:
        from danceopd.training.assembly.build import build_model  # imports diffusers, which takes its time

        return build_model
    from danceopd.world.build import build

    return build


def examiner_of(config: Config) -> Callable:
    """Finds what a dry run looks at networks and data with: the model's examiner, or the embedded network's.

    Args:
        config: The run's.

    Returns:
        The function that `danceopd.planning.dry_run.dry_run` takes.
    """
    if config.model:
        from danceopd.planning.models import examine  # imports diffusers, which takes its time
    else:
        from danceopd.world.dry_run import examine
    return examine
