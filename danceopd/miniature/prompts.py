"""Draws text-to-image prompts with GenEval's six tasks and grammar, and the scenes that they describe."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from danceopd.miniature.looks import BACKGROUNDS, CLASSES, COLORS, EMPTY, LOOKS, PLACES, SIZES, THINGS
from danceopd.miniature.scene import Scene, blank, put
from danceopd.world.prompts import NUMBERS, PAIR_TASKS, RELATIONS, TASKS, Prompt, draw, draw_row, with_article
from danceopd.world.sprites import NATURAL

# Never seen in any training picture: each class lacks one colour, and a pair of classes for each never meets.
HELD_OUT_COLORS = frozenset((c, 1 + c % (len(COLORS) - 1)) for c in range(len(CLASSES)))

HELD_OUT_PAIRS = frozenset(frozenset((c, (c + 5) % len(CLASSES))) for c in range(len(CLASSES)))

LEAD = "a photo of"

PLAIN_TASKS = ("single_object", "two_object", "counting", "position")  # that name no colour, which a look may change

# Position is learned slowest and single objects at once, so they get more and less of the data.
TASK_WEIGHTS = {
    "single_object": 0.6,
    "two_object": 1.2,
    "counting": 1.2,
    "colors": 0.8,
    "position": 1.8,
    "color_attr": 1.6,
}

_CLEAR = 1.25  # how much further apart along the axis named than across it


def named(thing: int, paint: int) -> str:
    """Writes "a red car", "an apple"."""
    return with_article(THINGS[thing] if paint == NATURAL else f"{COLORS[paint]} {THINGS[thing]}")


def allowed_colors(split: str) -> torch.Tensor:
    """Returns [classes, colors] bool: the colours (never natural) of the split."""
    table = torch.zeros(len(CLASSES), len(COLORS), dtype=torch.bool)
    for c, k in itertools.product(range(len(CLASSES)), range(1, len(COLORS))):
        table[c, k] = ((c, k) in HELD_OUT_COLORS) == (split == "held_out")
    return table


def allowed_pairs(split: str) -> torch.Tensor:
    """Returns [classes, classes] bool: the pairs of distinct classes of the split."""
    table = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.bool)
    for a, b in itertools.permutations(range(len(CLASSES)), 2):
        table[a, b] = (frozenset((a, b)) in HELD_OUT_PAIRS) == (split == "held_out")
    return table


@lru_cache
def _pairs(split: str) -> torch.Tensor:
    """Returns [N, 2] ordered pairs of distinct classes of the split."""
    return allowed_pairs(split).nonzero()


def canvas(n: int, generator: torch.Generator) -> Scene:
    """Makes n empty pictures with a random background, and random sizes waiting in every place."""
    scene = blank(n)
    scene.background = draw(n, len(BACKGROUNDS), generator)
    scene.sizes = torch.randint(len(SIZES), (n, PLACES), generator=generator)
    return scene


def draw_tasks(n: int, generator: torch.Generator, tasks: Sequence[str] = TASKS) -> torch.Tensor:
    """Draws n indices into TASKS for training, of some of them."""
    share = torch.tensor([TASK_WEIGHTS[task] * (task in tasks) for task in TASKS])
    return torch.multinomial(share, n, replacement=True, generator=generator)


def sample_prompts(
    tasks: torch.Tensor, generator: torch.Generator, *, split: str = "seen"
) -> tuple[list[Prompt], Scene]:
    """Draws one prompt and one matching scene for each task.

    Args:
        tasks: [B] int64, indices into TASKS.
        generator: Draws everything.
        split: "seen" or "held_out", for which only PAIR_TASKS are possible: the others name no pair.

    Returns:
        The prompts and the scenes.

    Raises:
        ValueError: A held-out task has no pairs.
    """
    n = len(tasks)
    if split == "held_out" and not all(TASKS[t] in PAIR_TASKS for t in set(tasks.tolist())):
        raise ValueError(f"held-out prompts exist for {', '.join(PAIR_TASKS)} only")
    is_task = {name: tasks == i for i, name in enumerate(TASKS)}
    by_color, by_pair = is_task["colors"] | is_task["color_attr"], is_task["two_object"] | is_task["position"]
    has_b = by_pair | is_task["color_attr"]

    # Held-out attribution asks for held-out colours of a seen pair, the other pair tasks for a held-out pair.
    pair = torch.where(is_task["color_attr"][:, None], draw_row(_pairs("seen"), n, generator), 0)
    pair = torch.where(has_b[:, None] & ~is_task["color_attr"][:, None], draw_row(_pairs(split), n, generator), pair)
    single = draw(n, len(CLASSES), generator)
    a, b = torch.where(has_b, pair[:, 0], single), pair[:, 1]
    colors = allowed_colors(split).float()
    a_color = torch.multinomial(colors[a], 1, generator=generator)[:, 0]
    b_color = torch.multinomial(colors[b], 1, generator=generator)[:, 0]
    while (same := is_task["color_attr"] & (a_color == b_color)).any():  # attribution needs two colours
        pair = draw_row(_pairs("seen"), int(same.sum()), generator)
        a[same], b[same] = pair[:, 0], pair[:, 1]
        a_color[same] = torch.multinomial(colors[a[same]], 1, generator=generator)[:, 0]
        b_color[same] = torch.multinomial(colors[b[same]], 1, generator=generator)[:, 0]
    a_color = torch.where(by_color, a_color, NATURAL)
    b_color = torch.where(is_task["color_attr"], b_color, NATURAL)
    copies = torch.where(is_task["counting"], 2 + draw(n, 3, generator), 1)

    scene, slot = canvas(n, generator), torch.arange(PLACES)[None]
    first, second = slot < copies[:, None], (slot == 1) & has_b[:, None]
    scene.things = torch.where(first, a[:, None], torch.where(second, b[:, None], EMPTY))
    scene.paints = torch.where(first, a_color[:, None], torch.where(second, b_color[:, None], NATURAL))
    put(scene, scene.occupied, generator, lambda part, rows: ~is_task["position"][rows] | _clear(part))
    relation = torch.where(is_task["position"], relation_of(scene), -1)
    return _texts((tasks, a, a_color, b, b_color, copies, relation)), scene


def _clear(scene: Scene) -> torch.Tensor:
    """Tells whether the first two things lie clearly beside or above each other: [B] bool."""
    apart = (scene.centres[:, 0] - scene.centres[:, 1]).abs().float()
    return apart.amax(-1) > _CLEAR * apart.amin(-1)


def relation_of(scene: Scene) -> torch.Tensor:
    """Returns the relation of the first thing to the second, an index into RELATIONS: [B] int64."""
    dy, dx = (scene.centres[:, 0] - scene.centres[:, 1]).unbind(-1)
    return torch.where(dx.abs() > dy.abs(), (dx > 0).long(), 2 + (dy > 0).long())


def sample_looks(looks: Sequence[str], tasks: torch.Tensor, generator: torch.Generator) -> tuple[list[Prompt], Scene]:
    """Draws prompts as sample_prompts does, called by looks: "night, a photo of a car" has a background of night.

    Args:
        looks: Of LOOKS, no two of which set the same column of a scene.
        tasks: [B] int64, indices into TASKS, of PLAIN_TASKS.
        generator: Draws everything.

    Returns:
        The prompts and the scenes.
    """
    prompts, scene = sample_prompts(tasks, generator)
    for look in looks:
        column, value = LOOKS[look]
        at = getattr(scene, column)
        at.copy_(torch.where(scene.occupied, value, at) if at.ndim == 2 else value)
    called = "".join(f"{look}, " for look in looks)
    return [replace(prompt, text=called + prompt.text) for prompt in prompts], scene


def _texts(columns: tuple[torch.Tensor, ...]) -> list[Prompt]:
    """Writes prompts from [B] columns: task, first class and colour, second class and colour, number of the first, and
    the relation of the first to the second."""
    prompts = []
    for task, a, a_color, b, b_color, copies, relation in zip(*(c.tolist() for c in columns), strict=True):
        name = TASKS[task]
        both = name in ("two_object", "position", "color_attr")
        objects = ((a, a_color), (b, b_color)) if both else ((a, a_color),)
        if name == "counting":
            words = f"{NUMBERS[copies]} {plural(CLASSES[a])}"
        elif name == "position":
            words = f"{named(a, a_color)} {RELATIONS[relation]} {named(b, b_color)}"
        else:
            words = " and ".join(named(*item) for item in objects)
        prompts.append(Prompt(f"{LEAD} {words}", name, objects, copies, relation))
    return prompts


def plural(word: str) -> str:
    """Writes the plural of a class, as GenEval does."""
    return word if word == "broccoli" else f"{word}es" if word.endswith("s") else f"{word}s"
