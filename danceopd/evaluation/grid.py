"""Draws pictures in rows, one for each network, prompt and guidance scale, with a column for each seed.

Nothing here imports diffusers, which the embedded networks are drawn with without; its pipelines' rows are drawn by
evaluation.grid_pipeline.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from danceopd.support.errors import UserError
from danceopd.support.hints import did_you_mean
from danceopd.support.hub import located, near
from danceopd.support.pictures import labelled_grid, png

Draw = Callable[[str, int, float | None], torch.Tensor]  # (prompt, seed, guidance scale) -> [3, H, W] in [-1, 1]


@dataclass(frozen=True)
class Network:
    """What a row is drawn with.

    Attributes:
        label: Its name in the grid, "" where there is one alone.
        load: Loads it as what draws.
    """

    label: str
    load: Callable[[], Draw]


def found(what: str, lora: Path | None, base: Path | None, networks: Iterable[str] = ()) -> dict[str, Path]:
    """Finds what a name draws with.

    Args:
        what: A pipeline's folder, an id of the hub, a name that ships, or a LoRA.
        lora: A LoRA for the pipeline.
        base: The pipeline of a LoRA; the one that its file names if not given.
        networks: Other names that could have been meant.

    Returns:
        ``model``, and ``lora`` where there is one, as `evaluation.grid_pipeline.Pipeline` takes them.

    Raises:
        UserError: There is nothing of that name, or the LoRA's pipeline is not known.
    """
    path = _located(Path(what).expanduser())
    if any((path / name).is_file() for name in ("model_index.json", "modular_model_index.json")):
        if base:
            raise UserError(f"{what} is a pipeline; --base is for a LoRA: leave it out, and give a LoRA by --lora")
        return {"model": path} | ({"lora": lora} if lora else {})
    if lora:
        raise UserError(f"{what} is no pipeline's folder, which --lora is for; give the pipeline first")
    if not path.exists():
        hint = near(path) or did_you_mean(what, networks, "")
        raise UserError(f"there is no {what}; give a run's folder, a pipeline, a LoRA or a network{hint}")
    from danceopd.models.lora_files import trained_for  # imports diffusers, which a mistyped name is said without

    trained = base or trained_for(path)
    if trained is None:
        raise UserError(f"{what} does not name the model that it is for; give its pipeline by --base MODEL")
    model = _located(Path(trained))
    if not model.exists():
        raise UserError(f"{what} is for {trained}, which is not here; give its pipeline by --base MODEL")
    return {"model": model, "lora": path}


def _located(path: Path) -> Path:
    try:
        return located(path)
    except ValueError as error:
        raise UserError(str(error)) from None


def pixels(picture: Image.Image) -> torch.Tensor:
    """Returns a picture as [3, H, W] float32 in [-1, 1]."""
    values = torch.from_numpy(np.asarray(picture.convert("RGB")).copy())
    return values.permute(2, 0, 1).float() / 127.5 - 1


def draw_grid(
    networks: Sequence[Network],
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance_scales: Sequence[float | None],
    first: tuple[str, torch.Tensor] | None = None,
    progress: Callable = lambda items: items,
) -> bytes:
    """Draws every combination and puts them together.

    Args:
        networks: What draws, one loaded at a time.
        prompts: The prompts, or instructions.
        seeds: Of the noise, a column each.
        guidance_scales: None leaves it to the pipeline.
        first: A label and a picture that stand above the grid: the one to edit.
        progress: Wraps the list of rows (tqdm fits).

    Returns:
        A PNG; a single picture without a label.
    """
    rows = [(network, prompt, scale) for network in networks for prompt in prompts for scale in guidance_scales]
    drawn, loaded, draw = [], None, None
    for network, prompt, scale in progress(rows):
        if network is not loaded:
            draw = None  # what was loaded leaves before the next comes
            loaded, draw = network, network.load()
        parts = [network.label, f"guidance {scale:g}" if len(guidance_scales) > 1 else "", prompt]
        drawn.append((", ".join(filter(None, parts)), [draw(prompt, seed, scale) for seed in seeds]))
    if len(rows) == len(seeds) == 1 and first is None:
        return png(drawn[0][1][0])
    if first:
        drawn.insert(0, (first[0], [first[1]]))
    return labelled_grid(drawn, [f"seed {seed}" for seed in seeds], least=192)
