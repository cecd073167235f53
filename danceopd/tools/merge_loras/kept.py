"""Looks at what earlier merges left: nothing of another run is written over, and none goes on as another."""

from pathlib import Path

from danceopd.config.reading import read_run_config
from danceopd.config.sections import Config
from danceopd.support.errors import UserError
from danceopd.support.texts import parse_object
from danceopd.tools.merge_loras.given import beside
from danceopd.tools.provenance import content_hash
from danceopd.training.checkpoints import checkpoints

COMPARISON = "comparison.json"  # in a run's folder: what was measured, and the hashes of the files that were written


def check_output(output: Path, run: Path) -> None:
    """Refuses to write over files that another run, or anything else, has written.

    Args:
        output: The file to write.
        run: The folder of the run that will write it.

    Raises:
        UserError: There is such a file.
    """
    for path in filter(Path.exists, (output, *beside(output))):
        if content_hash(path) not in written_by(run):
            raise UserError(
                f"-o {output}: {path} is there, and the run in {run} did not write it; give another file, or "
                "--overwrite, which writes over it and trains anew"
            )


def written_by(run: Path) -> list[str]:
    """Returns the hashes of the files that a run has written, as `provenance.content_hash` names them."""
    try:
        return parse_object((run / COMPARISON).read_text(encoding="utf-8")).get("written", [])
    except (OSError, ValueError):
        return []


def check_run(config: Config) -> None:
    """Refuses to go on with a run that began with other prompts, weights or LoRAs, by the options that name them.

    Args:
        config: The merge's, whose folder may hold a run.

    Raises:
        UserError: It holds one that differs.
    """
    run = config.training.output_dir
    if not checkpoints(run / "checkpoints"):
        return
    began = read_run_config(run)
    if began.networks().keys() != config.networks().keys():
        what = "the LoRAs differ"
    elif _prompts_of(began) != _prompts_of(config):
        what = "--prompts, --trigger or --no-pairs differ"
    elif _weights_of(began) != _weights_of(config):
        what = "--weight differs"
    elif _guidance_of(began) != _guidance_of(config):
        what = "--guidance-scale differs"
    else:
        return
    raise UserError(f"{what} from the run in {run}: give --work OTHER, or --overwrite, which trains anew")


def _prompts_of(config: Config) -> dict[str, str]:
    """Returns the prepared file's name of each route, which says its content."""
    return {name: Path(str(capability.data.prepared)).name for name, capability in config.capabilities.items()}


def _weights_of(config: Config) -> dict[str, list]:
    """Returns each LoRA's weight, and of one with weights of layers the folder's name, which says them."""
    return {
        name: [(lora.scale, lora.path.name if lora.path.parent.name == "weighted" else None) for lora in source.lora]
        for name, source in config.networks().items()
    }


def _guidance_of(config: Config) -> dict[str, tuple]:
    return {name: (source.guidance_scale, source.embedded_guidance) for name, source in config.networks().items()}
