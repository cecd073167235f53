"""Sample grids of a run: each capability's fixed samples, by the student and by its source, from the same noise."""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from danceopd.config.sections import Config
from danceopd.core.batch import Batch
from danceopd.core.fields import Field, within
from danceopd.core.rollout import sample
from danceopd.core.schedule import sigma_grid
from danceopd.data.sampler import draw_batch
from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.pictures import labelled_grid
from danceopd.support.run_log import RunLog
from danceopd.training.asking import as_student, guidance_scales
from danceopd.training.assembly.parts import Parts
from danceopd.training.rows import Rows, in_parts

PREVIEW_SAMPLES, MODEL_SAMPLES = 8, 4  # of each capability: the embedded network's grid, a model's
STREAM = 2  # of a step's randomness, which no update draws from


class Previews:
    """Draws sample grids. Nothing of it is counted as network evaluations.

    Args:
        config: The run's.
        parts: Its parts.
        rows: How many rows a forward takes.
    """

    def __init__(self, config: Config, parts: Parts, rows: Rows):
        self.config, self.parts, self.rows = config, parts, rows
        self._from_sources: list[torch.Tensor] | None = None

    def show(self, step: int, network: Field, log: RunLog) -> None:
        """Writes the grid of a step; what goes wrong with it is said, and ends no run.

        Args:
            step: Number of updates that are done.
            network: The network to draw with.
            log: Is told what goes wrong.
        """
        try:
            self.write(self.config.training.output_dir / "samples" / f"step-{step:08d}.png", network)
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            warning = f"no sample grid: {str(error).splitlines()[0]}; the run goes on without it"
            tqdm.write(f"warning at step {step}: {warning}", file=sys.stderr)
            log.write(step, {"warning": warning})

    @torch.no_grad()
    def write(self, path: Path, network: Field) -> None:
        """Writes a PNG of each capability's samples: the pictures to edit, the network's, its source's.

        A model's VAE is loaded for as long as this takes.

        Args:
            path: The file.
            network: The network to draw with.

        Raises:
            UserError: If the VAE cannot be loaded.
        """
        batches = [self._samples(m) for m in range(len(self.config.capabilities))]
        student = as_student(self.config, self.parts, network)
        drawn = [self._draw(student, batch) for batch in batches]
        if self._from_sources is None:  # they stay the same
            pairs = zip(self.parts.fields, batches, strict=True)
            self._from_sources = [self._draw(field, batch) for field, batch in pairs]
        decode = self.parts.load_decoder() if self.parts.load_decoder else lambda pictures: pictures
        rows = []
        for m, (name, capability) in enumerate(self.config.capabilities.items()):
            sets = {f"{name}: student": drawn[m], f"{name}: its source {capability.source}": self._from_sources[m]}
            edited = batches[m].conditioning.source
            if edited is not None:
                sets = {f"{name}: to edit": edited[0] if isinstance(edited, tuple) else edited} | sets
            rows += [(label, [decode(x[None])[0] for x in latents]) for label, latents in sets.items()]
        write_atomic(path, labelled_grid(rows))

    def _samples(self, m: int) -> Batch:
        """Draws the fixed samples of one capability."""
        only, count = [float(i == m) for i in range(len(self.config.capabilities))], PREVIEW_SAMPLES
        count, scales = MODEL_SAMPLES if self.config.model else count, guidance_scales(self.config)
        batch = draw_batch(self.parts.samples, only, count, self.config.training.seed, 0, scales, stream=STREAM)
        return batch.to(self.parts.device)

    def _draw(self, field: Field, batch: Batch) -> torch.Tensor:
        """Draws finished samples of a batch: [B, ...]."""
        evaluation = self.config.evaluation
        if self.parts.drawing_sigmas:
            sigmas = self.parts.drawing_sigmas[tuple(batch.noise.shape[1:])]
        else:
            sigmas = sigma_grid(evaluation.num_inference_steps, self.config.rollout.shift)
        field = within(field, lambda network: in_parts(network, self.rows))
        return sample(field, batch.noise, batch.conditioning, sigmas, evaluation.solver)
