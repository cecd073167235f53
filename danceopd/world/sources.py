"""Trains the embedded networks: one base and five specialists, by ordinary flow matching on the world."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from danceopd.core.conditioning import Conditioning
from danceopd.core.schedule import shift_sigma, sigma_grid
from danceopd.support.files import write_atomic
from danceopd.world.dit import DiT, DiTConfig
from danceopd.world.edits import GLOBAL_KINDS, KINDS, LOCAL_KINDS, sample_edits
from danceopd.world.files import SHIPPED, load_model, save_model, shipped_sources
from danceopd.world.prompts import draw, draw_tasks, sample_prompts
from danceopd.world.sampling import make_conditioning
from danceopd.world.scene import render
from danceopd.world.stages import generator_of, run_stage

SHIFT = 5.0  # of the training noise levels and of every sampler of these networks: layout is decided near noise

EMPTY_PROMPT_SHARE = 0.1

COMPILE_FROM = 200  # steps; a shorter stage is done before compiling pays

# Position is learned slowest and single objects at once, so they get more and less of the data.
TASK_WEIGHTS = {
    "single_object": 0.5,
    "two_object": 1.0,
    "counting": 1.0,
    "colors": 0.75,
    "position": 2.5,
    "color_attr": 2.0,
}


@dataclass(frozen=True)
class Stage:
    """One network of the recipe.

    Attributes:
        start_from: The network that it begins as; None for random weights.
        mix: The share of each capability.
        steps: Number of updates.
        seed: Of data and noise.
        batch_size: Samples of an update.
        learning_rate: Its largest value.
        decay: The share of updates with a falling rate.
        task_weights: Of text-to-image tasks.
    """

    start_from: str | None
    mix: dict[str, float]
    steps: int
    seed: int
    batch_size: int = 128
    learning_rate: float = 1.5e-3
    decay: float = 0.5
    task_weights: dict[str, float] = field(default_factory=lambda: TASK_WEIGHTS)


TRUNK = "trunk"  # the common ancestor; it does not ship

STAGES = {
    TRUNK: Stage(None, {"t2i": 0.6, "local": 0.26, "global": 0.14}, steps=2000, seed=0, decay=0.0),
    "base": Stage(TRUNK, {"t2i": 0.6, "local": 0.26, "global": 0.14}, steps=500, seed=6, decay=1.0),
    "t2i": Stage(TRUNK, {"t2i": 1.0}, steps=2500, seed=1),
    "edit": Stage(TRUNK, {"local": 0.65, "global": 0.35}, steps=2500, seed=2),
    "local": Stage(TRUNK, {"local": 1.0}, steps=1000, seed=3),
    "global": Stage(TRUNK, {"global": 1.0}, steps=1000, seed=4),
    "style": Stage(TRUNK, {"style": 1.0}, steps=1000, seed=5),
}


def training_batch(
    capability: str, n: int, stage: Stage, text_length: int, generator: torch.Generator
) -> tuple[torch.Tensor, Conditioning]:
    """Draws n clean pictures [n, 3, 32, 32] of one capability, and what they are conditioned on."""
    if capability in ("t2i", "style"):
        tasks = draw_tasks(n, stage.task_weights, generator)
        prompts, scene = sample_prompts(tasks, generator, style=int(capability == "style"))
        source = None
    else:
        kinds = LOCAL_KINDS if capability == "local" else GLOBAL_KINDS
        index = torch.tensor([KINDS.index(kind) for kind in kinds])[draw(n, len(kinds), generator)]
        prompts, before, scene = sample_edits(index, generator)
        source = render(before)
    texts = [prompt.text for prompt in prompts]
    for i in (torch.rand(n, generator=generator) < EMPTY_PROMPT_SHARE).nonzero()[:, 0].tolist():
        texts[i] = ""
    return render(scene), make_conditioning(texts, source, text_length)


def update_batch(stage: Stage, text_length: int, step: int) -> tuple[torch.Tensor, Conditioning]:
    """Draws the training batch of an update; the seed and the update alone decide it.

    Updates alternate between pictures with and without a source picture, in the stage's shares, so that one batch is
    one forward.
    """
    generator = generator_of(stage.seed, step)
    capability = list(stage.mix)[int(torch.multinomial(torch.tensor(list(stage.mix.values())), 1, generator=generator))]
    return training_batch(capability, stage.batch_size, stage, text_length, generator)


def flow_matching_loss(
    model: DiT, clean: torch.Tensor, conditioning: Conditioning, generator: torch.Generator
) -> torch.Tensor:
    """Returns E sigma^2 ||v_theta - (eps - x)||^2, which for this network is the error of its clean estimate."""
    n = len(clean)
    sigma = shift_sigma(torch.rand(n, generator=generator), SHIFT).clamp(min=1e-3)
    noise = torch.randn(clean.shape, generator=generator)
    s = sigma.view(n, 1, 1, 1)
    velocity = model((1 - s) * clean + s * noise, sigma, conditioning)
    return ((velocity - (noise - clean)) * s).square().mean()


def train_source(name: str, folder: Path) -> Path:
    """Trains one stage of the recipe, going on from folder/name.pt; returns folder/name.safetensors (EMA, fp16)."""
    stage = STAGES[name]
    torch.manual_seed(stage.seed)
    if stage.start_from:
        model = load_model(folder / f"{stage.start_from}.safetensors")
    else:
        model = DiT(DiTConfig())
    if stage.steps >= COMPILE_FROM:
        model._forward = torch.compile(model._forward, dynamic=False)  # the average, which is only saved, keeps it too

    def loss(step: int) -> torch.Tensor:
        clean, conditioning = update_batch(stage, model.config.text_length, step)
        return flow_matching_loss(model, clean, conditioning, generator_of(stage.seed, step + 500_000))

    average = run_stage(
        folder,
        name,
        model,
        loss,
        steps=stage.steps,
        learning_rate=stage.learning_rate,
        decay=stage.decay,
        matrices=lambda key, p: key.startswith("blocks.") and p.ndim == 2 and "modulation" not in key,
    )
    save_model(average, folder / f"{name}.safetensors", torch.float16)
    return folder / f"{name}.safetensors"


def score_sources(seed: int = 1234, per_task: int = 100, per_kind: int = 100) -> list[dict]:
    """Scores every shipped network on every task, own or not: name, and each score with its standard error."""
    from danceopd.world.scoring import Sampler, score_gedit, score_geneval  # not needed to train

    sampler, rows = Sampler(sigma_grid(16, SHIFT)), []
    for name in shipped_sources():
        network = load_model(SHIPPED / f"{name}.safetensors")
        rows.append(
            {
                "name": name,
                "T2I": score_geneval(network, sampler, seed, per_task),
                "T2I as sketch": score_geneval(network, sampler, seed, per_task, style=1),
                "Edit": score_gedit(network, sampler, seed, per_kind),
                "Local": score_gedit(network, sampler, seed, per_kind, kinds=LOCAL_KINDS),
                "Global": score_gedit(network, sampler, seed, per_kind, kinds=GLOBAL_KINDS),
            }
        )
    return rows


def write_card(folder: Path) -> Path:
    """Scores the shipped networks and writes their model card beside them; folder holds their training logs."""
    columns = ("T2I", "T2I as sketch", "Edit", "Local", "Global")
    scores = ["| network | " + " | ".join((*columns, "share of sketches")) + " |", "|---" * 7 + "|"]
    for row in score_sources():
        cells = [
            f"{row[c].get('overall', row[c].get('average')):.3f} ± {row[c]['standard_error']:.3f}" for c in columns
        ]
        scores.append(f"| {row['name']} | {' | '.join(cells)} | {row['T2I as sketch']['style']:.2f} |")
    recipe = [
        "| network | starts from | data (share) | steps | samples | seed | training time |",
        "|---" * 7 + "|",
    ]
    for name, stage in STAGES.items():
        mix = ", ".join(f"{k} {v:g}" for k, v in stage.mix.items())
        seconds = torch.load(folder / f"{name}.pt", weights_only=True)["seconds"]
        recipe.append(
            f"| {name} | {stage.start_from or 'nothing'} | {mix} | {stage.steps} | {stage.steps * stage.batch_size:,} "
            f"| {stage.seed} | {seconds / 60:.0f} min |"
        )
    text = CARD.format(
        parameters=sum(p.numel() for p in DiT(DiTConfig()).parameters()) / 1e6,
        scores="\n".join(scores),
        recipe="\n".join(recipe),
    )
    write_atomic(SHIPPED / "README.md", text.encode())
    return SHIPPED / "README.md"


CARD = """# The embedded networks

A base and five specialists for the picture world (32 x 32 px), each a small diffusion transformer with
{parameters:.2f} M parameters (`danceopd/world/dit.py`) in half precision. They exist to show and test
distillation; they draw nothing but the objects, colours and backgrounds of the picture world.

## Scores

GenEval-shaped overall (0 to 1) for text-to-image, GEdit-shaped average (0 to 10) for edits, ± the standard
error; 16 Euler steps, shift 5, no guidance, seed 1234, 100 pictures for each task and kind, pairs seen in training.
Made by `danceopd sources card`.

{scores}

## Recipe

Flow matching on pictures drawn from the world's seed (no picture is stored), Muon and AdamW at 1.5e-3, batches
of 128, noise levels with shift 5, 10 % empty prompts, an exponential average of 0.999 as the result;
`danceopd sources train` runs it again. Times are on one core (trunk and base: two), beside other work.

{recipe}

## Data and licence

Objects are Noto Emoji (Apache-2.0, `../NOTICE`); the networks are under the project's licence.
Held out of all training: each class in one colour, and six pairs of classes (`danceopd/world/prompts.py`).
"""
