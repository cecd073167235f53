"""Trains the whole miniature from its seeds: the VAE, the base, and the sources, each going on where it stopped."""

from collections.abc import Callable, Iterable
from pathlib import Path

from danceopd.miniature import base, sources, vae
from danceopd.miniature.pipeline import save
from danceopd.support.errors import UserError

STAGES = ("vae", "base", *sources.RECIPES)


def train(folder: Path, stages: Iterable[str] = STAGES, say: Callable[[str], None] = print) -> None:
    """Trains stages of the recipe, in order, and whatever they stand on.

    Args:
        folder: Holds states, data and results: folder/pipeline, and folder/NAME for each source.
        stages: Of STAGES.
        say: Is told what begins.

    Raises:
        UserError: There is no such stage.
    """
    if unknown := [name for name in stages if name not in STAGES]:
        raise UserError(f"no stage named {', '.join(unknown)}; there are {', '.join(STAGES)}")
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = folder / "pipeline"
    if not (pipeline / "model_index.json").exists():
        say("vae")
        encoder = vae.train(folder)
        if set(stages) == {"vae"}:
            return
        say("base")
        tokenizer, text_encoder, transformer = base.train(folder, encoder)
        save(pipeline, tokenizer, text_encoder, encoder, transformer)
    for name in stages:
        if name in sources.RECIPES and not (folder / name).is_dir():
            say(name)
            sources.train(folder, pipeline, name)
