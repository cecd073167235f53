"""Scores what the miniature's pipeline draws, with a LoRA or without: GenEval's tasks, and edits of GEdit's kinds."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import Field, guided
from danceopd.core.rollout import sample
from danceopd.evaluation.pipelines import load_pipeline
from danceopd.miniature.detector import Detection, detect
from danceopd.miniature.edits import ALL, GLOBAL_KINDS, KINDS, LOCAL_KINDS, sample_edits
from danceopd.miniature.looks import IMAGE_SIZE, LOOKS
from danceopd.miniature.pipeline import TEXT_LENGTH
from danceopd.miniature.prompts import PLAIN_TASKS, sample_looks, sample_prompts
from danceopd.miniature.scene import Scene, render
from danceopd.miniature.scores import edit_scores, geneval_correct
from danceopd.models.backbones import flux2
from danceopd.models.shared_base import SharedBase
from danceopd.world.edits import Edit
from danceopd.world.prompts import PAIR_TASKS, TASKS, Prompt
from danceopd.world.scoring import summary
from danceopd.world.sprites import NATURAL

BATCH = 64  # pictures at a time

Draw = Callable[[list[str], torch.Tensor | None, int], torch.Tensor]  # (prompts, pictures, seed) -> pictures


class Canvas:
    """Draws pictures with any velocity field of the miniature, many at a time, each from a source picture of its own.

    Args:
        folder: The pipeline's, whose text encoder, VAE and schedule are taken.
        num_inference_steps: Solver steps of the pipeline's own schedule.
    """

    def __init__(self, folder: Path, num_inference_steps: int = 16) -> None:
        self._text = flux2.text_encoder(folder, max_sequence_length=TEXT_LENGTH)
        self._encode, self._decode = flux2.picture_codec(folder)
        self._shape = flux2.latent_shape(folder, IMAGE_SIZE, IMAGE_SIZE)
        self._sigmas = flux2.sigmas(folder, num_inference_steps, IMAGE_SIZE, IMAGE_SIZE)
        self.empty_prompt = {key: value[0] for key, value in self._text([""]).items()}

    @torch.inference_mode()
    def draw(self, field: Field, prompts: list[str], pictures: torch.Tensor | None, seed: int) -> torch.Tensor:
        """Draws a picture of each prompt.

        Args:
            field: The velocity field.
            prompts: B of them.
            pictures: To edit, [B, 3, 64, 64] in [-1, 1]; None for text-to-image.
            seed: Of the noise, which depends on the place in the list too.

        Returns:
            [B, 3, 64, 64] in [-1, 1].
        """
        noise, images = torch.randn(len(prompts), *self._shape, generator=torch.Generator().manual_seed(seed)), []
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            source = None if pictures is None else self._encode(pictures[part])
            conditioning = Conditioning(self._text(prompts[part]), source)
            images.append(self._decode(sample(field, noise[part], conditioning, self._sigmas)))
        return torch.cat(images)

    def drawer(self, field: Field, guidance_scale: float = 1.0) -> Draw:
        """Returns what draws with a field, guided by the empty prompt where the scale is not 1."""
        return partial(self.draw, guided(field, self.empty_prompt, guidance_scale))


def field_of(folder: Path, lora: Path | None = None) -> Field:
    """Loads the pipeline's transformer as a field, with a LoRA that diffusers reads and merges."""
    if lora is None:
        return SharedBase(flux2.load_transformer(folder), [], flux2.velocity).field(-1)
    pipeline = load_pipeline(folder, lora, dtype=torch.float32)
    pipeline.fuse_lora()
    return SharedBase(pipeline.transformer, [], flux2.velocity).field(-1)


def t2i_set(seed: int, per_task: int, split: str = "seen") -> tuple[list[Prompt], Scene]:
    """Draws the evaluation's prompts, `per_task` of each task in turn, and one right scene for each."""
    tasks = TASKS if split == "seen" else PAIR_TASKS
    index = torch.tensor([TASKS.index(task) for task in tasks]).repeat(per_task)
    return sample_prompts(index, torch.Generator().manual_seed(seed), split=split)


def edit_set(
    seed: int, per_kind: int, kinds: tuple[str, ...] = KINDS, classes: range = ALL
) -> tuple[list[Edit], Scene, Scene]:
    """Draws the evaluation's instructions, `per_kind` of each kind in turn, the scenes to edit and what is expected;
    no object is of other classes."""
    index = torch.tensor([KINDS.index(kind) for kind in kinds]).repeat(per_kind)
    return sample_edits(index, torch.Generator().manual_seed(seed + 1), classes=classes)


def drawn_prompts(draw: Draw, seed: int, per_task: int, split: str = "seen") -> tuple[list[Prompt], Detection]:
    """Draws the evaluation's prompts, and returns them with what the detector finds in each picture."""
    prompts, _ = t2i_set(seed, per_task, split)
    return prompts, detect(draw([prompt.text for prompt in prompts], None, seed))


def score_geneval(draw: Draw, seed: int, per_task: int, split: str = "seen") -> dict:
    """Scores what draws by GenEval's tasks.

    Args:
        draw: As Canvas.drawer returns it.
        seed: Of prompts and noise.
        per_task: Pictures of each task.
        split: "seen" or "held_out".

    Returns:
        {"overall", "standard_error", and each task's share of right pictures}; overall is the mean of the tasks.
    """
    prompts, detection = drawn_prompts(draw, seed, per_task, split)
    return summary(geneval_correct(prompts, detection).float(), [prompt.task for prompt in prompts], "overall")


def look_marks(draw: Draw, looks: Sequence[str], seed: int, pictures: int) -> torch.Tensor:
    """Draws prompts that looks call, and measures how much of each is there as all of the looks have it.

    Args:
        draw: As Canvas.drawer returns it.
        looks: Of LOOKS; none for prompts as they are, whose pictures must be photos in the natural tone.
        seed: Of prompts and noise.
        pictures: Their number.

    Returns:
        [pictures] float32 in [0, 1]: of the things that are asked for or found, the share that is both and in the
        looks; 0 where the whole picture is not in them.
    """
    tasks = torch.tensor([TASKS.index(task) for task in PLAIN_TASKS]).repeat(-(-pictures // len(PLAIN_TASKS)))
    prompts, _ = sample_looks(looks, tasks[:pictures], torch.Generator().manual_seed(seed))
    detection = detect(draw([prompt.text for prompt in prompts], None, seed))
    good, whole = detection.found, torch.ones(len(prompts), dtype=torch.bool)
    wanted = dict(LOOKS[look] for look in looks) if looks else {"style": 0, "tone": 0, "paints": NATURAL}
    for column, value in wanted.items():
        if column == "style":
            good = good & (detection.style == value)
        elif column == "paints":
            good = good & (detection.scene.paints == value)
        else:
            whole &= getattr(detection.scene, column) == value
    marks = []
    for prompt, found, things, seen in zip(prompts, good, detection.scene.things, detection.found, strict=True):
        asked = Counter(thing for thing, _ in prompt.objects for _ in range(prompt.count))
        both = (asked & Counter(things[found].tolist())).total()
        marks.append(both / (asked.total() + int(seen.sum()) - both))
    return torch.tensor(marks) * whole


def edit_marks(
    draw: Draw, seed: int, per_kind: int, kinds: tuple[str, ...] = KINDS, classes: range = ALL
) -> tuple[list[Edit], dict[str, torch.Tensor]]:
    """Draws the evaluation's edits, and returns them with the scores of each picture (miniature.scores.edit_scores)."""
    edits, source, expected = edit_set(seed, per_kind, kinds, classes)
    detection = detect(draw([edit.text for edit in edits], render(source), seed + 1))
    return edits, edit_scores(edits, source, expected, detection)


def score_gedit(draw: Draw, seed: int, per_kind: int, kinds: tuple[str, ...] = KINDS, classes: range = ALL) -> dict:
    """Scores what draws by GEdit-Bench's kinds.

    Args:
        draw: As Canvas.drawer returns it.
        seed: Of edits and noise.
        per_kind: Pictures of each kind.
        kinds: Those that are asked.
        classes: Of the objects in the pictures.

    Returns:
        {"average", "standard_error", each kind's mean O in [0, 10], "sc", "pq", "local", "global"}; average is the mean
        of the kinds, local and global hold the same of their own kinds.
    """
    edits, scores = edit_marks(draw, seed, per_kind, kinds, classes)

    def of(group: tuple[str, ...]) -> dict:
        among = [i for i, edit in enumerate(edits) if edit.kind in group]
        return summary(scores["o"][among], [edits[i].kind for i in among], "average")

    groups = {"local": LOCAL_KINDS, "global": GLOBAL_KINDS}
    parts = {name: of(group) for name, group in groups.items() if set(group) & set(kinds)}
    return {**of(kinds), "sc": float(scores["sc"].mean()), "pq": float(scores["pq"].mean()), **parts}
