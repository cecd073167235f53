"""Draws or edits pictures with a pipeline of diffusers, for a row of a grid."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from danceopd.evaluation.gedit.draw import Editing, edit, size_of
from danceopd.evaluation.geneval.draw import check_draws_text
from danceopd.evaluation.grid import Draw, pixels
from danceopd.evaluation.pipelines import call_options, check_takes, drawn_by, load_pipeline
from danceopd.models.backbones import backbone_of
from danceopd.models.loading import class_name_of, multiple_of
from danceopd.models.lora_files import lora_file
from danceopd.support.errors import UserError


@dataclass(frozen=True)
class Pipeline:
    """A diffusers pipeline that draws, or with a picture edits it; None leaves a value to the pipeline.

    Attributes:
        model, lora, transformer, device, dtype, weight: As for evaluation.pipelines.load_pipeline.
        picture: The picture to edit.
        resolution: The square root of a picture's number of pixels.
        num_inference_steps: Solver steps.
        max_sequence_length: Tokens of a prompt.
    """

    model: Path
    lora: Path | None = None
    weight: float = 1.0
    transformer: Path | None = None
    picture: Image.Image | None = None
    resolution: int | None = None
    num_inference_steps: int | None = None
    max_sequence_length: int | None = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def check(self) -> None:
        """Checks by names and configurations that the pipeline does what is asked; a UserError if not.

        That the LoRA is there is checked too, since a pipeline may take minutes to load before its LoRA is read.
        """
        if self.picture is None:
            check_draws_text(self.model)
        elif "edit" not in backbone_of(self.model).tasks(self.model):
            name = class_name_of(self.model)
            raise UserError(f"{self.model} is a {name}, which draws from text alone; danceopd sample draws with it")
        if self.resolution and self.resolution < (least := multiple_of(backbone_of(self.model), self.model)):
            raise UserError(f"--resolution {self.resolution} is less than a picture of {self.model}; at least {least}")
        check_takes(self.model, None if self.picture else self.resolution, self.max_sequence_length)
        if self.picture is not None:  # of a shape of its own, whose sides are rounded to what the pipeline takes
            self._size()
        if self.lora:
            lora_file(self.lora)

    def load(self) -> Draw:
        """Loads the pipeline; raises as load_pipeline."""
        self.check()
        pipeline = load_pipeline(self.model, self.lora, self.transformer, self.device, self.dtype, weight=self.weight)
        picture = self.picture

        def draw(prompt: str, seed: int, guidance_scale: float | None) -> torch.Tensor:
            how = {"num_inference_steps": self.num_inference_steps, "max_sequence_length": self.max_sequence_length}
            if picture is not None:
                editing = Editing(guidance_scale=guidance_scale, seed=seed, **how)
                return pixels(edit(pipeline, picture, prompt, self._size(), seed, editing))
            size = (self.resolution, self.resolution) if self.resolution else None
            options = call_options(pipeline, guidance_scale, size, **how)
            generator = torch.Generator().manual_seed(seed)
            drawn = drawn_by(pipeline, prompt=prompt, generator=generator, **options)
            if not np.isfinite(drawn).all():
                raise UserError(f"the model draws no finite numbers for {prompt!r}; try --dtype bfloat16 or float32")
            return pixels(pipeline.image_processor.numpy_to_pil(drawn)[0])

        return draw

    def _size(self) -> tuple[int, int]:
        """Returns (height, width) of the edit; a UserError where the pipeline takes no picture of this shape."""
        picture, family = self.picture, backbone_of(self.model)
        side = self.resolution or min(1024, round(math.sqrt(picture.width * picture.height)))
        return size_of(picture, side, multiple_of(family, self.model), family)
