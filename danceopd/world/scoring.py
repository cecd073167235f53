"""Scores of a velocity field on the picture world: GenEval's six tasks and GEdit-Bench's kinds, both exact."""

from dataclasses import dataclass
from pathlib import Path

import torch

from danceopd.config.sections import Config
from danceopd.core.fields import Field, Operator, guided
from danceopd.core.rollout import sample
from danceopd.core.schedule import sigma_grid
from danceopd.evaluation.statistics import standard_error
from danceopd.support.errors import UserError
from danceopd.support.texts import filled
from danceopd.world.detector import detect
from danceopd.world.dit import DiT, DiTConfig
from danceopd.world.edits import HELD_OUT_KINDS, KINDS, Edit, sample_edits
from danceopd.world.files import load_model, resolve_weights
from danceopd.world.layout import write_pictures
from danceopd.world.prompts import PAIR_TASKS, TASKS, Prompt, sample_prompts
from danceopd.world.sampling import make_conditioning
from danceopd.world.scene import Scene, render
from danceopd.world.scores import edit_scores, geneval_correct, style_share
from danceopd.world.tokenizer import tokenize

HELD_OUT_SEED = 1_000_000  # added to the seed, so that the held-out pictures are others


@dataclass(frozen=True)
class Sampler:
    """How pictures are drawn for an evaluation.

    Attributes:
        sigmas: Noise levels [N + 1].
        solver: Of core.rollout.
        batch_size: Pictures at a time.
        text_length: Tokens of a prompt.
        image_size: Sides in pixels.
        device: Where it is drawn.
    """

    sigmas: torch.Tensor
    solver: str = "euler"
    batch_size: int = 128
    text_length: int = 10
    image_size: int = 32
    device: torch.device | str = "cpu"

    @torch.inference_mode()
    def __call__(self, field: Field, prompts: list[str], source: torch.Tensor | None, seed: int) -> torch.Tensor:
        """Draws one picture a prompt: [B, 3, H, W] on the CPU.

        The noise depends on the seed and the place in the list.
        """
        shape = (len(prompts), 3, self.image_size, self.image_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        texts = field.texts() if isinstance(field, Operator) else ()
        said = {text: [filled(text, {"prompt": prompt}) for prompt in prompts] for text in texts}
        conditioning = make_conditioning(prompts, source, self.text_length, said)
        images = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            z = noise[part].to(self.device)
            images.append(sample(field, z, conditioning[part].to(self.device), self.sigmas, self.solver).cpu())
        return torch.cat(images)


def make_sampler(config: Config, network: DiTConfig, device: torch.device | str = "cpu") -> Sampler:
    """Makes the evaluation's sampler as a configuration has it."""
    sigmas = sigma_grid(config.evaluation.num_inference_steps, config.rollout.shift)
    batch_size = config.evaluation.batch_size
    return Sampler(sigmas, config.evaluation.solver, batch_size, network.text_length, network.image_size, device)


def t2i_set(seed: int, per_task: int, split: str = "seen", style: int = 0) -> tuple[list[Prompt], Scene]:
    """Draws the evaluation's prompts, `per_task` of each task in turn, and one right scene for each."""
    tasks = TASKS if split == "seen" else PAIR_TASKS
    index = torch.tensor([TASKS.index(task) for task in tasks]).repeat(per_task)
    return sample_prompts(index, torch.Generator().manual_seed(seed), split=split, style=style)


def edit_set(
    seed: int, per_kind: int, split: str = "seen", kinds: tuple[str, ...] | None = None
) -> tuple[list[Edit], Scene, Scene]:
    """Draws the evaluation's instructions, `per_kind` of each kind in turn, the scenes to edit and what is expected.

    Args:
        seed: Of all of them.
        per_kind: Number of edits of each kind.
        split: "seen" or "held_out".
        kinds: All that the split has, if not given.
    """
    kinds = kinds or (KINDS if split == "seen" else HELD_OUT_KINDS)
    index = torch.tensor([KINDS.index(kind) for kind in kinds]).repeat(per_kind)
    return sample_edits(index, torch.Generator().manual_seed(seed + 1), split=split)


def summary(values: torch.Tensor, labels: list[str], mean_name: str) -> dict:
    """Returns the mean of the groups' means under its name, its standard error, and each group's mean."""
    groups = {}
    for label, value in zip(labels, values.tolist(), strict=True):
        groups.setdefault(label, []).append(value)
    means = {label: sum(v) / len(v) for label, v in groups.items()}
    error = standard_error([torch.tensor(v) for v in groups.values()])
    return {mean_name: sum(means.values()) / len(means), "standard_error": error, **means}


def score_geneval(
    field: Field,
    sampler: Sampler,
    seed: int,
    per_task: int,
    split: str = "seen",
    style: int = 0,
    pictures: Path | None = None,
) -> dict:
    """Scores a field by GenEval's tasks.

    Args:
        field: What draws.
        sampler: How it draws.
        seed: Of prompts and noise.
        per_task: Pictures of each task.
        split: "seen" or "held_out".
        style: With 1 the prompts ask for sketches.
        pictures: A new folder, where they are kept in GenEval's layout.

    Returns:
        {"overall", "standard_error", and each task's share of right pictures}; overall is the mean of the tasks. With
        style 1 also "style", the share of the objects found that are sketches.
    """
    prompts, _ = t2i_set(seed, per_task, split, style)
    images = sampler(field, [prompt.text for prompt in prompts], None, seed)
    detection = detect(images)
    correct = geneval_correct(prompts, detection)
    if pictures:
        write_pictures(pictures, prompts, images, correct)
    result = summary(correct.float(), [prompt.task for prompt in prompts], "overall")
    if style:
        result["style"] = float(style_share(detection, style).mean())
    return result


def score_gedit(
    field: Field,
    sampler: Sampler,
    seed: int,
    per_kind: int,
    split: str = "seen",
    kinds: tuple[str, ...] | None = None,
) -> dict:
    """Scores a field by GEdit-Bench's kinds.

    Args:
        field: What draws.
        sampler: How it draws.
        seed: Of edits and noise.
        per_kind: Pictures of each kind.
        split: "seen" or "held_out".
        kinds: All that the split has, if not given.

    Returns:
        {"average", "standard_error", each kind's mean O in [0, 10], "sc", "pq"}; average is the mean of the kinds.
    """
    edits, source, expected = edit_set(seed, per_kind, split, kinds)
    detection = detect(sampler(field, [edit.text for edit in edits], render(source), seed + 1))
    scores = edit_scores(edits, source, expected, detection)
    result = summary(scores["o"], [edit.kind for edit in edits], "average")
    return {**result, "sc": float(scores["sc"].mean()), "pq": float(scores["pq"].mean())}


def score_row(
    name: str,
    field: Field,
    sampler: Sampler,
    seed: int,
    per_task: int,
    per_kind: int,
    held_out: bool = True,
    pictures: Path | None = None,
) -> dict:
    """Scores a field for one row of results.json: by both benchmarks, on seen pairs and, if asked, on held-out
    ones.

    Args:
        name: The row's.
        field: What draws.
        sampler: How it draws.
        seed: Of all.
        per_task, per_kind: Pictures of each task and kind.
        held_out: Whether held-out pairs are scored too.
        pictures: A new folder, where GenEval's of the seen pairs are kept.
    """
    geneval = score_geneval(field, sampler, seed, per_task, pictures=pictures)
    gedit = score_gedit(field, sampler, seed, per_kind)
    if held_out:
        other = seed + HELD_OUT_SEED
        geneval["held_out"] = score_geneval(field, sampler, other, per_task, "held_out")
        gedit["held_out"] = score_gedit(field, sampler, other, per_kind, "held_out")
    return {"name": name, "seed": seed, "geneval": geneval, "gedit": gedit}


def as_field(network: DiT, guidance_scale: float = 1.0) -> Field:
    """Returns a network as the field that is sampled on its device, guided if its scale is not 1."""
    empty = tokenize([""], network.config.text_length)[0].to(next(network.parameters()).device)
    return guided(network, empty, guidance_scale)


def load_field(
    weights: str, num_inference_steps: int, shift: float, solver: str, guidance_scale: float
) -> tuple[Field, Sampler]:
    """Loads an embedded network, by its name or its file, as a field with the sampler that draws with it.

    Raises:
        UserError: The file is damaged, or the number of steps or the shift is of no use.
        FileNotFoundError: There is no such network.
    """
    network = load_model(resolve_weights(weights))
    try:
        sigmas = sigma_grid(num_inference_steps, shift)
    except ValueError as error:
        raise UserError(str(error)) from None
    size = network.config
    sampler = Sampler(sigmas, solver, text_length=size.text_length, image_size=size.image_size)
    return as_field(network, guidance_scale), sampler
